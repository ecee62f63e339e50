"""Checkpoints of several processes: whole weights for everybody, the optimizer in the parts that each rank holds.

`model.safetensors` and `training_state.json` are those of one process, so whatever reads a checkpoint reads these too.
`optimizer/` is written by all ranks at once (torch.distributed.checkpoint) and read by any number of them, also by one.
On several hosts the folder must be one that all of them see.
"""

from __future__ import annotations

import errno
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longspan.foundation.errors import DataError
from longspan.foundation.files import atomic_directory, write_json
from longspan.foundation.randomness import stream_seed
from longspan.training.checkpoint import (
    OPTIMIZER,
    STATE,
    WEIGHTS,
    TrainingState,
    check_configuration,
    described,
    load_checkpoint,
    load_optimizer,
    load_weights,
    optimizer_tensors,
    random_state,
    read_state,
    restore_random_state,
    save_tensors,
)
from longspan.training.distributed import Spread, own_part
from longspan.training.ranks import Ranks

PARTS = "optimizer"
RANDOM = "random_of_ranks"


def save_sharded(
    folder: Path,
    configuration: Mapping[str, Any],
    state: TrainingState,
    spread: Spread,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
) -> None:
    """`save_checkpoint` for several ranks; all of them must call it.

    Raises:
        DataError: no space left, on every rank; the older checkpoint is still there.
    """
    ranks = spread.ranks
    weights = spread.whole()
    written = described(configuration, state)
    if optimizer is not None:
        states = ranks.gathered(random_state(device))
        written |= {"random": states[0], RANDOM: states}

    with ExitStack() as stack:

        def begin() -> Path:
            partial = stack.enter_context(atomic_directory(folder))
            save_tensors(weights, partial / WEIGHTS)
            write_json(partial / STATE, written)
            return partial

        partial = ranks.on_first(begin)
        if optimizer is not None:
            _save_parts(optimizer_tensors(spread.model, optimizer), partial / PARTS)
        ranks.on_first(stack.close)


def load_sharded_weights(folder: Path, configuration: Mapping[str, Any], model: nn.Module) -> None:
    """Weights of a checkpoint into a model that is still whole; nothing where there is no checkpoint.

    Raises:
        UserError: the checkpoint is of another configuration.
        DataError: a file of it is damaged.
    """
    if folder.exists():
        check_configuration(folder, read_state(folder)["configuration"], configuration)
        load_weights(folder, model)


def load_state(
    folder: Path,
    configuration: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    ranks: Ranks,
    seed: int,
) -> TrainingState | None:
    """What `load_checkpoint` does, for any number of ranks and a checkpoint of any number.

    Args:
        model: where there are several ranks, spread over them and with the checkpoint's weights.
        seed: of the run, for the random numbers of ranks that the checkpoint did not have.

    Returns:
        the state, or None where there is no checkpoint.
    """
    if ranks.size == 1 and not (folder / PARTS).exists():
        return load_checkpoint(folder, configuration, model, optimizer)
    if not folder.exists():
        return None
    if ranks.size == 1:
        load_sharded_weights(folder, configuration, model)
    written = read_state(folder)
    if (folder / PARTS).exists():
        _load_parts(folder / PARTS, model, optimizer, alone=ranks.size == 1)
    else:
        load_optimizer(folder / OPTIMIZER, model, optimizer, own_part)
    states = written.get(RANDOM, [written["random"]])
    if ranks.is_first or len(states) == ranks.size:
        restore_random_state(states[ranks.rank], device)
    else:
        torch.manual_seed(stream_seed(seed, "training", ranks.rank, written["state"]["step"]))
    return TrainingState.from_json(written["state"])


def _save_parts(entries: dict[str, Any], folder: Path) -> None:
    """Each rank's parts, written by it; what all of them hold is written once, by one of them."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(entries, storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError) or "no space left" in str(cause).lower():
                raise OSError(errno.ENOSPC, "no space left on device", str(folder)) from error
        raise


def _load_parts(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, alone: bool) -> None:
    """AdamW's state as this model's parameters are held now, from whatever parts it was written in."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        reader = FileSystemReader(folder)
        known = reader.read_metadata().state_dict_metadata
        wanted = {
            f"{name}/{key}": torch.zeros((), device=parameter.device) if key == "step" else torch.zeros_like(parameter)
            for name, parameter in model.named_parameters()
            for key in ("step", "exp_avg", "exp_avg_sq")
        }
        if known.keys() - wanted.keys():
            raise DataError(
                f"{folder}: unknown entry `{min(known.keys() - wanted.keys())}`",
                "AdamW's state",
                f"remove {folder.parent}",
            )
        wanted = {name: tensor.detach() for name, tensor in wanted.items() if name in known}
        with warnings.catch_warnings():
            # It wonders whether one process is meant; it is.
            warnings.simplefilter("ignore", UserWarning)
            load(wanted, storage_reader=reader, no_dist=alone)
    except (CheckpointException, OSError, EOFError) as error:
        raise DataError(
            f"{folder} is not readable ({type(error).__name__})",
            "the files as Longspan wrote them",
            f"remove {folder.parent} and run the same command again",
        ) from None
    for name, parameter in model.named_parameters():
        found = {key: wanted[f"{name}/{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}/{key}" in wanted}
        if found:
            optimizer.state[parameter] = found
