"""`longspan export`: write a trained run as a folder that stock transformers loads, and compare what it computes.

Legend: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longspan.engines.loading import locate_run
from longspan.engines.run_index import SUBJECTS
from longspan.engines.trained_run import SUBJECT, TrainedRun, Weights
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.extras import require
from longspan.foundation.randomness import torch_generator
from longspan.models.interchange import DTYPES, Written, read_folder, write_folder
from longspan.models.interchange.config_keys import CONFIG
from longspan.models.language_model import LanguageModel
from longspan.report.numbers import byte_size, scaled
from longspan.terminal import print_json

ROWS, LONGEST, CACHED = 2, 512, 16
LIMIT = 1e-5
"""Largest difference of logits, as a share of the largest logit, or of 10 where that is more."""


@dataclass(frozen=True)
class Differences:
    """Largest absolute differences of logits, each against the model in fp32 with the written (rounded) weights.

    Attributes:
        largest_logit: for scale.
        rounding: of the weights as trained.
        read_back: of the folder, read by Longspan.
        transformers: of the folder in transformers, in one pass; None: not asked for.
        transformers_cached: with its cache, a prompt and then token by token; None: not asked for, or it has none.
    """

    largest_logit: float
    rounding: float
    read_back: float
    transformers: float | None = None
    transformers_cached: float | None = None

    @property
    def limit(self) -> float:
        """The largest one allowed, rounding aside."""
        return LIMIT * max(10.0, self.largest_logit)


def find_trained_run(name: str, select: dict[str, str]) -> TrainedRun:
    """The run that a folder and selectors name.

    Raises:
        UserError: the folder holds no run, or none or several subjects of a study fit; the choices are named.
    """
    folder = Path(name).expanduser()
    run = locate_run(folder, select)
    if run is None and (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} holds {CONFIG}: it is a Hugging Face folder already",
            "a run's folder, or a study's folder with selectors",
            "use it as it is; for another dtype or context export its run again, with --force where it may be replaced",
        )
    if run is None:
        problem = f"{folder} holds neither {SUBJECT} nor {SUBJECTS}" if folder.exists() else f"{folder} is not there"
        raise UserError(problem, "a run's folder, or a study's folder with selectors", "check the path")
    return TrainedRun.open(run)


def export(
    run: TrainedRun,
    folder: Path,
    *,
    weights: Weights = "best",
    dtype: str = "fp32",
    context: int | None = None,
    check: bool = False,
    replace: bool = False,
    json: bool = False,
) -> None:
    """Write the folder, compare it, and say what is there.

    Args:
        run: whose weights.
        folder: a new or empty one.
        weights: `best` or `last`.
        dtype: a key of `DTYPES`.
        context: stored as the length that the model is made for; None: the training context.
        check: compare with transformers too.
        replace: put it in the place of an earlier export.
        json: print one object.

    Raises:
        UserError: a model that no class of transformers computes, or a folder that is taken.
        DataError: the folder would compute something else; nothing is written then.
        MissingExtra: `check` without transformers.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype = {dtype!r}", ", ".join(DTYPES), "choose one of these")
    context = context or run.context
    if context is None:
        raise UserError(f"the context of {run.name} is not known", "a number of tokens", "give it with --context")
    shown = min(context, LONGEST)
    transformers = require("transformers") if check else None
    say: Callable[[str], object] = str if json else _say
    say(f"reading the {weights} weights of {run.name}")
    model = run.load_model(weights).eval()
    found: list[Differences] = []

    def verify(partial: Path) -> None:
        say(f"comparing logits{f' with transformers {transformers.__version__} too' if transformers else ''}")
        found.append(_compare(model, partial, DTYPES[dtype], run.tokenizer.vocab_size, shown, transformers))

    say(f"writing {folder}")
    written = write_folder(
        model,
        folder,
        context=context,
        tokenizer=run.tokenizer,
        markers=run.markers,
        dtype=DTYPES[dtype],
        replace=replace,
        verify=verify,
    )
    numbers = {
        "subject": run.name,
        "weights": weights,
        "folder": str(folder),
        "architecture": written.architecture,
        "mixers": run.model.describe_mixers(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": dtype,
        "context": context,
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir())},
    }
    (differences,) = found
    if json:
        version = transformers.__version__ if transformers else None
        compared = {**vars(differences), "limit": differences.limit, "transformers_version": version}
        print_json({**numbers, "differences": compared, "notes": list(written.notes)})
    else:
        _print(numbers, differences, written, transformers)


@torch.no_grad()
def _compare(
    model: LanguageModel, folder: Path, dtype: torch.dtype, vocab_size: int, num_tokens: int, transformers: Any
) -> Differences:
    tokens_BT = torch.randint(0, vocab_size, (ROWS, num_tokens), generator=torch_generator(0, "export", "tokens"))
    trained_BTV = _logits(model, tokens_BT)
    rounded = model if dtype == torch.float32 else copy.deepcopy(model).cast(dtype).to(torch.float32)
    expected_BTV = _logits(rounded, tokens_BT)
    largest = float(expected_BTV.abs().max())
    rounding = _difference(trained_BTV, expected_BTV)
    back_BTV = _logits(read_folder(folder, dtype=torch.float32), tokens_BT)
    found = Differences(largest, rounding, _difference(back_BTV, expected_BTV))
    if transformers is not None:
        theirs = _in_transformers(transformers, folder, tokens_BT, expected_BTV)
        found = Differences(largest, rounding, found.read_back, *theirs)
    for where in ("read_back", "transformers", "transformers_cached"):
        value = getattr(found, where)
        # Written so that NaN fails.
        if value is not None and not value <= found.limit:
            raise DataError(
                f"the written folder computes something else: logits differ by {value:.2g} ({where.replace('_', ' ')})",
                f"at most {found.limit:.2g}",
                "nothing was written; report it with the model's configuration",
            )
    return found


def _in_transformers(
    transformers: Any, folder: Path, tokens_BT: Tensor, expected_BTV: Tensor
) -> tuple[float, float | None]:
    """Differences in one pass and with a cache, None where the folder says that there is none."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    whole = _difference(model(input_ids=tokens_BT, use_cache=False).logits, expected_BTV)
    if not model.config.use_cache:
        return whole, None
    prompt = max(1, tokens_BT.shape[1] - CACHED)
    cache: dict[str, Any] = {}
    parts = []
    for part_BT in torch.split(tokens_BT, [prompt, *[1] * (tokens_BT.shape[1] - prompt)], dim=1):
        out = model(input_ids=part_BT, use_cache=True, **cache)
        name = "past_key_values" if "past_key_values" in out else "cache_params"
        cache = {name: out[name]}
        parts.append(out.logits)
    return whole, _difference(torch.cat(parts, dim=1), expected_BTV)


def _logits(model: LanguageModel, tokens_BT: Tensor) -> Tensor:
    return model.logits(model(tokens_BT)[0])


def _difference(one_BTV: Tensor, other_BTV: Tensor) -> float:
    return float((one_BTV - other_BTV).abs().max())


def _print(numbers: dict[str, Any], differences: Differences, written: Written, transformers: Any) -> None:
    limit = f"(limit {differences.limit:.1e}; the largest logit is {differences.largest_logit:.3g})"
    print(
        f"wrote {written.folder}: {written.architecture}, {numbers['mixers']}, "
        f"{scaled(numbers['parameters'])} parameters, {numbers['dtype']}, context {numbers['context']}"
    )
    for name, size in numbers["files"].items():
        print(f"  {name}  {byte_size(size)}")
    print(f"read back: logits differ by {differences.read_back:.1e} {limit}")
    if transformers is not None:
        cached = differences.transformers_cached
        shown = f", with its cache by {cached:.1e}" if cached is not None else ""
        print(f"transformers {transformers.__version__}: logits differ by {differences.transformers:.1e}{shown}")
    if numbers["dtype"] != "fp32":
        print(f"rounding to {numbers['dtype']}: logits differ from the trained ones by {differences.rounding:.1e}")
    for note in written.notes:
        print(f"note: {note}")
    print(f'use it: AutoModelForCausalLM.from_pretrained("{written.folder}"), longspan generate {written.folder}')


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
