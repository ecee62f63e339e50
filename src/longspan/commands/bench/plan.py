"""In which order models are measured, what that is expected to take, and how to go on where the time was short."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.measured import OURS, Measured
from longspan.commands.bench.own import LEAST_REPEATS, LEAST_WINDOWS, rows_of
from longspan.commands.bench.peers import Peer, peers_of
from longspan.commands.bench.setting import Setting, default_setting
from longspan.models.budget import forward_flops_per_token, training_flops_per_token
from longspan.models.config import ModelConfig
from longspan.training.run import WARMUP_STEPS

LEFT_OUT = "no time was left (raise --seconds)"
CUT_OFF = "not done when the time was over (raise --seconds)"
STOPPED = "stopped before it was measured"
LATE = (LEFT_OUT, CUT_OFF, STOPPED)
"""Why something has no rate that may have one another time."""
OWN_SHARE, PEER_SHARE = 0.3, 0.1
"""Of the matmul rate, for what a cell is expected to take: below what was measured of most."""
FEWEST_STEPS, FEWEST_PROMPTS = WARMUP_STEPS + 2 * LEAST_WINDOWS, LEAST_REPEATS + 1
TOKEN_SECONDS = 3e-4
"""Of one layer for one token, where the host starts every kernel."""
START_SECONDS = {"cuda": 15.0, "cpu": 0.0}
"""Compiling of a pattern's layers."""
PEER_START_SECONDS = {"cuda": (15.0, 40.0), "cpu": (1.0, 1.0)}
"""Of a peer of attention alone, and of one with other mixers, whose first step may be plain torch over whole rows."""


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


def plan(setting: Setting, models: dict[str, ModelConfig], *, peers: bool) -> list[Cell]:
    """What is measured, in order: everything at the shortest context, Longspan before its peers, then at longer ones.

    So a run that ends early has compared all patterns with each other and with the peers at one context at least.
    """
    cells = []
    for context in sorted(setting.contexts):
        cells += [Cell(context, pattern, None) for pattern in models]
        if peers:
            cells += [Cell(context, p, peer) for p in models for peer in peers_of(models[p], setting)]
    return cells


def expected_seconds(cell: Cell, config: ModelConfig, setting: Setting, ceilings: Ceilings) -> float:
    """The least that a cell takes, roughly: its fewest steps and prompts at a share of the matmul rate."""
    vocab, rate = setting.vocab_size, ceilings.matmul * (OWN_SHARE if cell.peer is None else PEER_SHARE)
    step = rows_of(setting, cell.context) * cell.context * training_flops_per_token(config, vocab, cell.context)
    prompt = cell.context * forward_flops_per_token(config, vocab, cell.context)
    decode = setting.new_tokens * len(config.layers()) * TOKEN_SECONDS
    start = START_SECONDS[setting.device.type]
    if cell.peer is not None:
        attention_alone = {config.mixer(layer)[0].name for layer in config.layers()} == {"attention"}
        start = PEER_START_SECONDS[setting.device.type][0 if attention_alone else 1]
    return start + (FEWEST_STEPS * step + FEWEST_PROMPTS * prompt) / rate + FEWEST_PROMPTS * decode


def to_go_on(
    setting: Setting, models: dict[str, ModelConfig], ceilings: Ceilings, found: Sequence[Measured]
) -> str | None:
    """The command that measures what was left out, and what else is of the same contexts; None where nothing was."""
    late = {(each.context, each.pattern, each.who) for each in found if each.failure in LATE}
    if not late:
        return None
    contexts = sorted({context for context, _, _ in late})
    peers = any(each.who != OURS for each in found)
    # Peers may be many times slower than expected.
    needed = sum(
        2 * expected_seconds(cell, models[cell.pattern], setting, ceilings)
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
