"""Models that a study asks as they are: what they are, and how they become a run's folder like any other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig
from longspan.engines.loading import locate_run, trained_context
from longspan.engines.opening import BYTES, Described, describe
from longspan.engines.source import ModelSource
from longspan.engines.trained_run import TOKENIZER, TRAINING, TrainedRun, describe_run
from longspan.foundation.errors import UserError
from longspan.foundation.files import sha256_file, write_json
from longspan.models.config import ModelConfig
from longspan.models.interchange import read_config, read_folder, read_tokenizer, resolve, tokenizer_settings
from longspan.models.segments import Isolation
from longspan.training.checkpoint import TrainingState, save_checkpoint


@dataclass(frozen=True)
class Examined:
    """What is known of a model before its weights are read.

    Attributes:
        folder: where it lies.
        model, vocab_size: its configuration and the rows of its embedding; None where Longspan's own models do not
            hold it.
        tokenizer: settings that load its tokenizer for the corpus it is asked about.
        markers: whether a boundary token precedes each document.
        isolation: what it was trained with; a model from elsewhere sees each document as if it were alone.
        context: tokens of a training row; None where its files do not say.
        fingerprint: all that determines its answers.
        elsewhere: what is known of a model that is asked where it is and not imported: one that another engine runs,
            or a shape.
    """

    folder: Path
    model: ModelConfig | None
    vocab_size: int | None
    tokenizer: TokenizerConfig
    markers: bool
    isolation: Isolation
    context: int | None
    fingerprint: dict[str, Any]
    elsewhere: Described | None = None


@cache
def _examine(source_json: str) -> Examined:
    source = ModelSource.model_validate_json(source_json)
    if source.kind == "shape":
        return _shape(source)
    if source.engine != "native":
        return _elsewhere(source)
    if source.checkpoint is not None:
        return _checkpoint(source, Path(source.checkpoint).expanduser())
    assert source.pretrained is not None
    folder = resolve(source.pretrained, source.revision)
    model, vocab_size = read_config(folder)
    tokenizer, markers = read_tokenizer(folder)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{folder}: a tokenizer of {tokenizer.vocab_size} entries for a model of {vocab_size} rows",
            "at least a row for each entry",
            "put the tokenizer beside it that the model was trained with",
        )
    files = sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")])
    return Examined(
        folder=folder,
        model=model,
        vocab_size=vocab_size,
        tokenizer=tokenizer_settings(folder),
        markers=markers,
        isolation="full",
        context=trained_context(folder),
        fingerprint={"files": {file.name: sha256_file(file) for file in files}, "tokenizer": tokenizer.fingerprint},
    )


def examine(source: ModelSource) -> Examined:
    """Find a model and read its description; what is needed of a hub id's files is fetched.

    Raises:
        UserError: it is not there, or of a kind that cannot be represented.
    """
    return _examine(source.model_dump_json())


def _elsewhere(source: ModelSource) -> Examined:
    found = describe(source)
    return Examined(
        folder=found.folder,
        model=None,
        vocab_size=None,
        tokenizer=tokenizer_settings(found.folder),
        markers=found.markers,
        isolation="full",
        context=None if source.kind == "endpoint" else trained_context(found.folder),
        fingerprint=found.fingerprint,
        elsewhere=found,
    )


def _shape(source: ModelSource) -> Examined:
    found = describe(source)
    model, rows = source.shape_config()
    return Examined(
        folder=found.folder,
        model=model,
        vocab_size=rows,
        tokenizer=BYTES,
        markers=False,
        isolation="full",
        context=None,
        fingerprint=found.fingerprint,
        elsewhere=found,
    )


def _checkpoint(source: ModelSource, folder: Path) -> Examined:
    found = locate_run(folder, {})
    if found is None:
        raise UserError(
            f"checkpoint {source.checkpoint} holds no run of Longspan",
            "a run's folder, e.g. runs/jobs/train-0123456789abcdef",
            "check the path; for Hugging Face weights write `pretrained:`",
        )
    run = TrainedRun.open(found)
    return Examined(
        folder=found,
        model=run.model,
        vocab_size=run.vocab_size,
        tokenizer=TokenizerConfig(kind="pretrained", pretrained=str(found / TOKENIZER)),
        markers=run.markers,
        isolation=run.isolation,
        context=run.context,
        fingerprint={"weights": run.weights_sha256(source.weights), "model": run.description["model"]},
    )


def import_model(source: ModelSource, folder: Path, name: str) -> None:
    """Make `folder` a run's folder that holds the model as it is, in fp32."""
    found = examine(source)
    plugins: list[Path] = []
    ends: frozenset[int] = frozenset()
    tokenizer: Tokenizer
    if source.checkpoint is not None:
        run = TrainedRun.open(found.folder)
        model, tokenizer = run.load_model(source.weights), run.tokenizer
        plugins, ends = run.plugins, run.ends
    else:
        model, tokenizer = read_folder(found.folder).float(), read_tokenizer(found.folder)[0]
    describe_run(
        folder,
        name=name,
        model=model.config.model_dump(mode="json"),
        vocab_size=model.vocab_size,
        tokenizer=tokenizer,
        markers=found.markers,
        isolation=found.isolation,
        context=found.context,
        plugins=plugins,
        ends=ends,
    )
    training = folder / TRAINING
    save_checkpoint(training / "checkpoints" / "best", found.fingerprint, TrainingState(), model)
    write_json(training / "result.json", {"imported": str(found.folder)})
