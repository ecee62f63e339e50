"""Checkpoints that are whole or absent: weights, optimizer, random numbers, data position, all in one rename."""

from __future__ import annotations

import base64
import dataclasses
import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import atomic_directory, digest, read_json, recover_directory, write_json
from longspan.training.result import Validation

FORMAT = 1
WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "training_state.json"


@dataclass
class TrainingState:
    """Everything of a run that is neither a weight nor an optimizer tensor; plain JSON values.

    Attributes:
        step: finished optimizer steps.
        targets: positions trained on so far that carried loss.
        samples: strings of a task trained on so far; 0 for text.
        evaluated_step: the step of the last evaluation.
        final, best: the last and the lowest validation.
        patience_loss: the loss that the next evaluation must beat by `min_delta`.
        without_improvement: evaluations since then.
        window_nll, window_targets: NLL and targets since the last line in `metrics.jsonl`.
        metrics_bytes: size of `metrics.jsonl` at this point.
        measured_seconds, measured_positions: see `Throughput`.
        seconds: wall time of all sessions so far.
        sessions: processes so far.
        peak_memory_bytes: highest of all sessions.
        data: the batch iterator's own state.
    """

    step: int = 0
    targets: int = 0
    samples: int = 0
    evaluated_step: int = 0
    final: Validation | None = None
    best: Validation | None = None
    patience_loss: float | None = None
    without_improvement: int = 0
    window_nll: float = 0.0
    window_targets: int = 0
    metrics_bytes: int = 0
    measured_seconds: float = 0.0
    measured_positions: int = 0
    seconds: float = 0.0
    sessions: int = 0
    peak_memory_bytes: int = 0
    data: dict[str, Any] = field(default_factory=dict)

    def judge(self, found: Validation, min_delta: float) -> bool:
        """Take in an evaluation of this step; returns whether its loss is the lowest so far."""
        self.evaluated_step, self.final = self.step, found
        if self.patience_loss is None or found.loss < self.patience_loss - min_delta:
            self.patience_loss, self.without_improvement = found.loss, 0
        else:
            self.without_improvement += 1
        better = self.best is None or found.loss < self.best.loss
        self.best = found if better else self.best
        return better

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainingState:
        """The inverse of `dataclasses.asdict`."""
        validations = {key: Validation(**values[key]) if values[key] else None for key in ("final", "best")}
        return cls(**{**values, **validations})


def save_checkpoint(
    folder: Path,
    configuration: Mapping[str, Any],
    state: TrainingState,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write a checkpoint that replaces an older one in `folder` only when it is complete on disk.

    Args:
        configuration: all that determines the run; a checkpoint is only ever loaded into the same.
        optimizer: given, the checkpoint can be resumed from; without it, it holds weights to be used.

    Raises:
        DataError: no space left; the older checkpoint is still there.
    """
    written = described(configuration, state)
    with atomic_directory(folder) as partial:
        save_tensors(_tensors_of(model), partial / WEIGHTS)
        if optimizer is not None:
            save_tensors(optimizer_tensors(model, optimizer), partial / OPTIMIZER)
            written["random"] = random_state(next(model.parameters()).device)
        write_json(partial / STATE, written)


def described(configuration: Mapping[str, Any], state: TrainingState) -> dict[str, Any]:
    """What `training_state.json` says of every checkpoint."""
    return {
        "format": FORMAT,
        "fingerprint": digest(configuration),
        "configuration": dict(configuration),
        "state": dataclasses.asdict(state),
    }


def load_checkpoint(
    folder: Path, configuration: Mapping[str, Any], model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> TrainingState | None:
    """Go on from the checkpoint in `folder`: fills weights, optimizer and random state in place.

    Returns:
        the state, or None where there is no checkpoint.

    Raises:
        UserError: the checkpoint is of another configuration; both values of what differs are named.
        DataError: a file of it is damaged.
    """
    recover_directory(folder)
    if not folder.exists():
        return None
    written = read_state(folder)
    check_configuration(folder, written["configuration"], configuration)
    load_weights(folder, model)
    load_optimizer(folder / OPTIMIZER, model, optimizer)
    restore_random_state(written["random"], next(model.parameters()).device)
    return TrainingState.from_json(written["state"])


def recover_checkpoint(folder: Path) -> Path:
    """`folder`, after finishing or undoing a write that was killed."""
    recover_directory(folder)
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """`training_state.json`: `format`, `fingerprint`, `configuration`, `state` and, in `last`, `random`.

    Raises:
        DataError: missing, damaged, or of another format.
    """
    path = folder / STATE
    if not path.exists():
        raise DataError(f"{path} is missing", "a checkpoint that Longspan wrote", f"remove {folder} and train again")
    written: dict[str, Any] = read_json(path)
    if written.get("format") != FORMAT:
        raise DataError(
            f"{path} has the checkpoint format {written.get('format')!r}",
            f"format {FORMAT}",
            "use the Longspan version that wrote it, or train again",
        )
    return written


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Copy the weights of a checkpoint into `model`, in place; shapes and names must agree exactly.

    Raises:
        DataError: the file is damaged or belongs to another model.
    """
    path = folder / WEIGHTS
    found = _load_tensors(path)
    wanted = _tensors_of(model)
    shapes = {name: tuple(t.shape) for name, t in wanted.items()}
    for name in sorted(shapes.keys() | found.keys()):
        given = tuple(found[name].shape) if name in found else None
        if given != shapes.get(name):
            raise DataError(
                f"{path}: `{name}` is {given or 'missing'}, the model has {shapes.get(name) or 'no such weight'}",
                "weights of the same model configuration and vocabulary",
                "build the model that the checkpoint's configuration describes",
            )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def check_configuration(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to go on in a folder of another configuration.

    Raises:
        UserError: names every key that differs with both values, and both fingerprints.
    """
    if digest(stored) == digest(wanted):
        return
    differences = list(_differences(stored, wanted))
    raise UserError(
        f"{folder} belongs to another configuration ({digest(stored)[:12]}, wanted {digest(wanted)[:12]}): "
        + "; ".join(differences[:5])
        + (f"; and {len(differences) - 5} more" if len(differences) > 5 else ""),
        "a directory that is empty or of the same configuration",
        "give this run another directory, or set the values back",
    )


def _differences(stored: Any, wanted: Any, path: str = "") -> Iterable[str]:
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        for key in sorted(stored.keys() | wanted.keys()):
            yield from _differences(stored.get(key), wanted.get(key), f"{path}.{key}".lstrip("."))
    elif digest(stored) != digest(wanted):
        yield f"{path} is {_short(stored)} there and {_short(wanted)} here"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    # A tied head is one tensor under its first name.
    seen: set[int] = set()
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state by `PARAMETER/ENTRY`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _placed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    # Cloned, since tensors mapped from a file are not aligned as torch's own, and that can change last bits.
    return tensor.to(like.device).clone()


def load_optimizer(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    place: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = _placed,
) -> None:
    """Fill AdamW's state from one file.

    Args:
        place: makes of a whole tensor what is held beside a parameter (the second argument).

    Raises:
        DataError: the file is damaged or belongs to another model.
    """
    found = _load_tensors(path)
    for name, parameter in model.named_parameters():
        # AdamW keeps its step count as fp32 on the parameter's device when fused, like its moments.
        entries = {key: found.pop(f"{name}/{key}", None) for key in ("step", "exp_avg", "exp_avg_sq")}
        if any(value is None for value in entries.values()):
            if all(value is None for value in entries.values()):
                continue
            raise DataError(f"{path}: the state of `{name}` is incomplete", "all of it", f"remove {path.parent}")
        optimizer.state[parameter] = {
            key: place(value, parameter) for key, value in entries.items() if value is not None
        }
    if found:
        raise DataError(f"{path}: unknown entry `{next(iter(found))}`", "AdamW's state", f"remove {path.parent}")


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write tensors as one safetensors file."""
    try:
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        # The library has no error class for a full disk.
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "no space left on device", str(path)) from error
        raise


def _load_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise DataError(
            f"{path} is not readable ({error})",
            "the file as Longspan wrote it",
            f"remove {path.parent} and run the same command again",
        ) from None


def random_state(device: torch.device) -> dict[str, str]:
    """What torch's global generators would draw next, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {key: base64.b64encode(value.numpy().tobytes()).decode() for key, value in states.items()}


def restore_random_state(states: Mapping[str, str], device: torch.device) -> None:
    """Let torch's global generators go on from there."""
    decoded = {
        key: torch.frombuffer(bytearray(base64.b64decode(value)), dtype=torch.uint8) for key, value in states.items()
    }
    torch.set_rng_state(decoded["cpu"])
    if device.type == "cuda" and "cuda" in decoded:
        torch.cuda.set_rng_state(decoded["cuda"], device)
