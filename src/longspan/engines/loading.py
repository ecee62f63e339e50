"""From a path or a hub id to an engine: a trained run, a study's folder with selectors, or Hugging Face weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longspan.engines.native import Dtype, NativeEngine, torch_dtype
from longspan.engines.run_index import SUBJECTS, find_run
from longspan.engines.trained_run import SUBJECT, TrainedRun, Weights
from longspan.foundation.config import nearest
from longspan.foundation.errors import UserError
from longspan.foundation.files import digest, sha256_file
from longspan.models.interchange import read_folder, read_tokenizer, resolve
from longspan.models.interchange.config_keys import CONFIG
from longspan.models.interchange.json_object import read_object

ALLOWED = "a run's folder, a study's folder, or a folder or hub id with Hugging Face weights"

NO_LIMIT = 10**9


def load(
    path: str | Path,
    *,
    weights: Weights = "best",
    dtype: Dtype | None = None,
    device: str = "cpu",
    revision: str | None = None,
    select: Mapping[str, Any] | None = None,
    batch_tokens: int = 8_192,
) -> NativeEngine:
    """Load a subject, ready to answer.

    Args:
        path: a run's folder (`runs/jobs/train-...`), a study's folder (`runs/STUDY`), or a folder or hub id with
            Hugging Face weights.
        weights: of a run: `best` or `last`.
        dtype: of the computation; None: fp32.
        device: where it runs.
        revision: branch, tag or commit of a hub id.
        select: which subject of a study, e.g. `{"pattern": "AMAM", "seed": 0}`.
        batch_tokens: most positions in one forward pass.

    Raises:
        UserError: nothing of the kind is there, or an argument that has no meaning for what is there.
    """
    check_device(device)
    folder = Path(path).expanduser()
    run = locate_run(folder, select or {})
    options: dict[str, Any] = {"dtype": dtype or "fp32", "device": device, "batch_tokens": batch_tokens}
    if run is not None:
        if revision is not None:
            raise UserError(f"revision {revision!r} for the run {run}", "revisions of hub ids only", "leave it out")
        return engine_of(TrainedRun.open(run), weights, **options)
    if weights != "best":
        raise UserError(f"weights {weights!r} for {path}", "`best` or `last` of a run trained here", "leave it out")
    _check_place(folder)
    return _from_hugging_face(resolve(path, revision), str(path), **options)


def locate_run(folder: Path, select: Mapping[str, Any]) -> Path | None:
    """The run's folder that a folder and selectors stand for; None where `folder` holds no run of Longspan.

    Raises:
        UserError: selectors for what is no study's folder, or none or several subjects fit them.
    """
    if (folder / SUBJECTS).is_file():
        return find_run(folder, select)
    if select:
        given = " ".join(f"{key}={value}" for key, value in select.items())
        raise UserError(
            f"selectors {given} for {folder}",
            f"selectors with a study's folder (one with {SUBJECTS}) only",
            "leave them out, or name the study's folder",
        )
    return folder if (folder / SUBJECT).is_file() else None


def default_device() -> str:
    """The first CUDA device where there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Refuse a device that is not here.

    Raises:
        UserError: naming the devices that are.
    """
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if device not in (*here, *(["cuda"] if len(here) > 1 else [])):
        why = "torch sees no GPU here" if torch.version.cuda else "this torch was built for CPUs alone"
        fix = f"choose one of these; {why}" if device.startswith("cuda") and len(here) == 1 else "choose one of these"
        raise UserError(f"device = {device!r}", ", ".join(here), fix)


def engine_of(
    run: TrainedRun,
    weights: Weights = "best",
    *,
    dtype: Dtype = "fp32",
    device: str = "cpu",
    batch_tokens: int = 8_192,
) -> NativeEngine:
    """A trained run, ready to answer; see `load`."""
    engine = NativeEngine(
        run.load_model(weights),
        run.tokenizer,
        markers=run.markers,
        isolation=run.isolation,
        fingerprint=_with_dtype(run.fingerprint(weights), dtype),
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        trained_context=run.context,
        end_tokens=run.ends,
        name=run.name,
    )
    engine.weight_bytes = engine.num_parameters * torch_dtype(dtype).itemsize
    return engine


def _from_hugging_face(folder: Path, name: str, *, dtype: Dtype, device: str, batch_tokens: int) -> NativeEngine:
    tokenizer, markers = read_tokenizer(folder)
    files = sorted([folder / CONFIG, *folder.glob("*.safetensors")])
    fingerprint = digest([{file.name: sha256_file(file) for file in files}, tokenizer.fingerprint, markers])
    config = read_object(folder / CONFIG)
    return NativeEngine(
        read_folder(folder, dtype=torch_dtype(dtype)),
        tokenizer,
        markers=markers,
        # Of documents packed in a row it knows nothing: each is shown as if it were alone.
        isolation="full",
        fingerprint=_with_dtype(fingerprint, dtype),
        device=device,
        dtype=dtype,
        batch_tokens=batch_tokens,
        trained_context=trained_context(folder),
        end_tokens=end_tokens(folder, config),
        name=name,
    )


def trained_context(folder: Path) -> int | None:
    """Tokens that Hugging Face weights were made for, where their files say it (without positions: the tokenizer's).

    Args:
        folder: with config.json.
    """
    config = read_object(folder / CONFIG)
    path = folder / "tokenizer_config.json"
    beside = read_object(path).get("model_max_length") if path.is_file() else None
    found = config.get("max_position_embeddings") or beside
    # Transformers writes a huge number where nothing is known.
    return int(found) if found and found < NO_LIMIT else None


def end_tokens(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """The ids that end a text, one or several, as generation of transformers takes them."""
    path = folder / "generation_config.json"
    found = read_object(path).get("eos_token_id") if path.is_file() else None
    ends = found if found is not None else config.get("eos_token_id")
    return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])


def _with_dtype(fingerprint: str, dtype: Dtype) -> str:
    return fingerprint if dtype == "fp32" else digest([fingerprint, dtype])


def _check_place(folder: Path) -> None:
    """Refuse a path that is no folder of weights; what may be a hub id passes."""
    if folder.exists():
        if not (folder / CONFIG).is_file():
            raise UserError(f"{folder} holds no {SUBJECT}, {SUBJECTS} or {CONFIG}", ALLOWED, "check the path")
    elif folder.parent != Path() and folder.parent.is_dir():
        near = nearest(folder.name, [path.name for path in folder.parent.iterdir()])
        fix = f"did you mean `{folder.parent / near[0]}`?" if near else "check the path"
        raise UserError(f"{folder} is not there", ALLOWED, fix)
