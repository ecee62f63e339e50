"""In which order models are measured, what that is expected to take, and how to go on where the time was short."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.measured import OURS, PARTS, TOGETHER, Measured, Part
from longspan.commands.bench.own import LEAST_REPEATS, LEAST_WINDOWS, rows_of
from longspan.commands.bench.peers import Peer, peers_of
from longspan.commands.bench.setting import Setting, default_setting
from longspan.models.budget import forward_flops_per_token, training_flops_per_token
from longspan.models.config import ModelConfig
from longspan.training.run import WARMUP_STEPS

STOPPED = "stopped before it was measured"
OWN_SHARE, PEER_SHARE = 0.3, 0.1
"""Of the matmul rate, for what training and prefill are expected to take: below what was measured of most."""
FEWEST_STEPS, FEWEST_PROMPTS = WARMUP_STEPS + 2 * LEAST_WINDOWS, LEAST_REPEATS + 1
TOKEN_SECONDS = 3e-4
"""Of one layer for one token, where the host starts every kernel."""
START_SECONDS = {"cuda": (20.0, 5.0), "cpu": (0.5, 0.2)}
"""Before the first step, and before the first prompt: compiling of a pattern's layers, and of kernels."""
PEER_START_SECONDS = {"cuda": (10.0, 10.0), "cpu": (3.0, 1.0)}
TUNING_SECONDS = (60.0, 20.0)
"""The same of packages that try out many cuts of each of their kernels at its first call."""
OTHER_MODELS = 2
"""The rank of peers that do not compute the same models."""


@dataclass(frozen=True)
class Cell:
    """One model of one pattern at one context, Longspan's own (no peer) or another's."""

    context: int
    pattern: str
    peer: Peer | None

    @property
    def who(self) -> str:
        """The package."""
        return OURS if self.peer is None else self.peer.name


@dataclass(frozen=True)
class Task:
    """Parts of a cell that are measured in one go, and the seconds that they are predicted to take at least."""

    cell: Cell
    parts: tuple[Part, ...]
    seconds: float


def plan(setting: Setting, models: dict[str, ModelConfig], *, peers: bool) -> list[Cell]:
    """What is measured: everything at the shortest context, Longspan before its peers, then at longer ones.

    So a run that ends early has compared all patterns with each other and with the peers at one context at least. Peers
    that compute the same models come before those that have others, which also take longer to start.
    """
    cells = []
    for context in sorted(setting.contexts):
        cells += [Cell(context, pattern, None) for pattern in models]
        if peers:
            theirs = [Cell(context, p, peer) for p in models for peer in peers_of(models[p], setting)]
            cells += sorted(theirs, key=_rank)
    return cells


def expected_seconds(
    cell: Cell, parts: Sequence[Part], config: ModelConfig, setting: Setting, ceilings: Ceilings
) -> float:
    """The least that parts of a cell take, roughly: their fewest steps and prompts at a share of the matmul rate."""
    vocab, rate = setting.vocab_size, ceilings.matmul * (OWN_SHARE if cell.peer is None else PEER_SHARE)
    starts = (START_SECONDS if cell.peer is None else PEER_START_SECONDS)[setting.device.type]
    if cell.peer is not None and not cell.peer.same_weights:
        starts = TUNING_SECONDS
    seconds = 0.0
    if "train" in parts:
        step = rows_of(setting, cell.context) * cell.context * training_flops_per_token(config, vocab, cell.context)
        seconds += starts[0] + FEWEST_STEPS * step / rate
    if "decode" in parts:
        prompt = cell.context * forward_flops_per_token(config, vocab, cell.context)
        decode = setting.new_tokens * len(config.layers()) * TOKEN_SECONDS
        seconds += starts[1] + FEWEST_PROMPTS * (prompt / rate + decode)
    return seconds


def tasks_of(cells: Sequence[Cell], models: dict[str, ModelConfig], setting: Setting, ceilings: Ceilings) -> list[Task]:
    """What the cells of a plan are made of, with predictions, in the order in which it is measured.

    At one context every pattern is trained before any generates, by Longspan and by the peers that compute the same
    models: that is compared most, and one that is slow does not keep the others from it.
    """
    tasks = [
        Task(cell, parts, expected_seconds(cell, parts, models[cell.pattern], setting, ceilings))
        for cell in cells
        for parts in TOGETHER
    ]

    def place(task: Task) -> tuple[int, bool, int, int]:
        rank = _rank(task.cell)
        return task.cell.context, rank == OTHER_MODELS, TOGETHER.index(task.parts), rank

    return sorted(tasks, key=place)


def _rank(cell: Cell) -> int:
    """Longspan before its peers, and peers that compute the same models before those that have others."""
    return 0 if cell.peer is None else 1 if cell.peer.same_weights else OTHER_MODELS


def to_go_on(
    setting: Setting, models: dict[str, ModelConfig], ceilings: Ceilings, found: Sequence[Measured]
) -> str | None:
    """The command that measures what was left out, and what else is of the same contexts; None where nothing was."""
    late = {(each.context, each.pattern, each.who) for each in found if each.late}
    if not late:
        return None
    contexts = sorted({context for context, _, _ in late})
    peers = any(each.who != OURS for each in found)
    # Peers may be many times slower than expected.
    needed = sum(
        2 * expected_seconds(cell, PARTS, models[cell.pattern], setting, ceilings)
        for cell in plan(replace(setting, contexts=tuple(contexts)), models, peers=peers)
    )
    basis = default_setting(setting.device)
    options = {
        "patterns": ",".join(setting.patterns) if setting.patterns != basis.patterns else None,
        "contexts": ",".join(map(str, contexts)),
        "seconds": str(max(10, 10 * math.ceil(needed / 10))),
        "device": setting.device.type,
    }
    for name in ("parameters", "vocab_size", "batch_tokens", "new_tokens", "dtype"):
        value = getattr(setting, name)
        options[name] = str(value) if value != getattr(basis, name) else None
    written = (f"--{name.replace('_', '-')} {shlex.quote(text)}" for name, text in options.items() if text is not None)
    return " ".join(["longspan bench", *written, *([] if peers else ["--no-peers"])])
