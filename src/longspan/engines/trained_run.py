"""A trained run's folder: all that is needed to ask its model again, wherever the folder is taken.

subject.json    what it is: model, isolation, markers, training context
tokenizer/      as it was prepared
plugins/        copies of the user's own files that the model needs
training/       what the training loop writes: checkpoints/{best,last}/ and, last, result.json
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longspan.corpus.tokenizer import Tokenizer
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import atomic_directory, digest, read_json, recover_directory, sha256_file, write_json
from longspan.foundation.plugins import load_file
from longspan.models.config import ModelConfig
from longspan.models.language_model import LanguageModel
from longspan.models.segments import Isolation
from longspan.training.checkpoint import WEIGHTS, load_weights

SUBJECT = "subject.json"
TRAINING = "training"
FORMAT = 1
Weights = Literal["best", "last"]
TOKENIZER, _PLUGINS = "tokenizer", "plugins"


@dataclass(frozen=True)
class TrainedRun:
    """What a run's folder says of its subject.

    Attributes:
        folder: where it lies.
        name: for people, e.g. `AMAM seed 0`.
        model: the model's configuration.
        tokenizer: the one it was trained with.
        markers: whether a boundary token precedes each document.
        isolation: what was kept apart in training.
        context: tokens of a training row; None where a model from elsewhere does not say.
        vocab_size: rows of the embedding, at least those of the tokenizer.
        ends: ids that end what it writes, beside the boundary token.
        description: all of `subject.json`.
    """

    folder: Path
    name: str
    model: ModelConfig
    tokenizer: Tokenizer
    markers: bool
    isolation: Isolation
    context: int | None
    vocab_size: int
    ends: frozenset[int]
    description: Mapping[str, Any]

    @staticmethod
    def open(folder: Path) -> TrainedRun:
        """Read a run's folder and load its plugins.

        Raises:
            DataError: `subject.json` is missing or of another format; a file is damaged.
        """
        path = folder / SUBJECT
        if not path.is_file():
            raise DataError(f"{folder} holds no trained run (no {SUBJECT})", "a run's folder", "train it first")
        found = read_json(path)
        if found.get("format") != FORMAT:
            raise DataError(
                f"{path} has the format {found.get('format')!r}", f"format {FORMAT}", "use the Longspan that wrote it"
            )
        for name in found["plugins"]:
            load_file(folder / _PLUGINS / name)
        return TrainedRun(
            folder=folder,
            name=found["name"],
            model=ModelConfig.parse(found["model"], f"{path}: model"),
            tokenizer=Tokenizer.load(folder / TOKENIZER),
            markers=found["markers"],
            isolation=found["isolation"],
            context=found["context"],
            vocab_size=found["vocab_size"],
            ends=frozenset(found.get("ends", ())),
            description=found,
        )

    @property
    def finished(self) -> bool:
        """Whether training came to its end."""
        return (self.folder / TRAINING / "result.json").is_file()

    def checkpoint(self, weights: Weights) -> Path:
        """The folder of `best` (lowest full-validation loss) or `last`.

        Raises:
            UserError: there is none yet, or `best` of a run that goes on.
        """
        if weights not in ("best", "last"):
            raise UserError(f"weights = {weights!r}", "best, last", "choose one of these")
        if weights == "best" and not self.finished:
            raise UserError(
                f"the training of {self.name} in {self.folder} is not finished, so its best weights are not known",
                "a finished run, or its last weights",
                "run the study again to finish it, or choose the weights `last`",
            )
        folder = self.folder / TRAINING / "checkpoints" / weights
        recover_directory(folder)
        if not (folder / WEIGHTS).is_file():
            raise UserError(f"{folder} holds no {WEIGHTS}", "a run that wrote a checkpoint", "train it further")
        return folder

    @property
    def plugins(self) -> list[Path]:
        """The user's own files that the model needs."""
        return [self.folder / _PLUGINS / name for name in self.description["plugins"]]

    def load_model(self, weights: Weights = "best") -> LanguageModel:
        """The model with its trained weights, fp32 on the CPU."""
        model = LanguageModel(self.model, self.vocab_size)
        load_weights(self.checkpoint(weights), model)
        return model

    def fingerprint(self, weights: Weights = "best") -> str:
        """sha256 (hex) of all that determines answers: weights, tokenizer, markers, isolation, configuration."""
        parts = [self.weights_sha256(weights), self.tokenizer.fingerprint, self.isolation, self.markers]
        return digest([*parts, self.description["model"]])

    def weights_sha256(self, weights: Weights = "best") -> str:
        """sha256 (hex) of the file of weights."""
        return sha256_file(self.checkpoint(weights) / WEIGHTS)


def describe_run(
    folder: Path,
    *,
    name: str,
    model: Mapping[str, Any],
    tokenizer: Tokenizer,
    markers: bool,
    isolation: Isolation,
    context: int | None,
    plugins: Sequence[str | Path] = (),
    vocab_size: int | None = None,
    ends: Iterable[int] = (),
) -> None:
    """Make `folder` a run's folder, `subject.json` last; training then writes below `training/`.

    Args:
        folder: may have a run in it already; then the same is written again.
        model: the configuration as plain data.
        plugins: the user's own files, copied.
        vocab_size: rows of the embedding; None: those of the tokenizer.

    The other arguments are the attributes of `TrainedRun`.
    """
    with atomic_directory(folder / TOKENIZER) as partial:
        tokenizer.save(partial)
    names = [f"{number}-{Path(plugin).name}" for number, plugin in enumerate(plugins)]
    with atomic_directory(folder / _PLUGINS) as partial:
        for plugin, copied in zip(plugins, names, strict=True):
            shutil.copyfile(plugin, partial / copied)
    description = {
        "format": FORMAT,
        "name": name,
        "model": dict(model),
        "vocab_size": vocab_size or tokenizer.vocab_size,
        "markers": markers,
        "isolation": isolation,
        "context": context,
        "plugins": names,
        "ends": sorted(ends),
    }
    write_json(folder / SUBJECT, description)
