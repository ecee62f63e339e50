"""What was measured, for people: the device, the models, and a table with bars for each part."""

from __future__ import annotations

from collections.abc import Sequence

from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.measured import OURS, PARTS, Measured, Part
from longspan.commands.bench.plan import to_go_on
from longspan.commands.bench.setting import Setting
from longspan.models.budget import count_parameters
from longspan.models.config import ModelConfig
from longspan.ops import kernels
from longspan.report.numbers import MISSING, byte_size, scaled, share, significant
from longspan.terminal import print_table
from longspan.training.compilation import resolve_compile

BAR = 28
"""Characters of the longest bar."""
REASON = 44
"""Characters of why there is none; a note under the tables says all of it."""
KEYS = 3
"""Columns that name a row: context, pattern, who."""
TITLES = {"train": "training step", "prefill": "prefill, one prompt", "decode": "decoding, one sequence"}


def show(setting: Setting, models: dict[str, ModelConfig], ceilings: Ceilings, found: Sequence[Measured]) -> None:
    """The device, the models, and a table with bars for each part."""
    print(
        f"{ceilings.device}: matrix product {scaled(ceilings.matmul, 'FLOP/s')} in {setting.dtype}, "
        f"copy {scaled(ceilings.copy, 'B/s')}; {kernels.described(setting.device)}, layers "
        f"{'compiled' if resolve_compile('auto', setting.device) else 'not compiled'} in training"
    )
    rows = [
        (
            pattern,
            config.describe_mixers(),
            str(config.width),
            str(config.hidden),
            scaled(count_parameters(config, setting.vocab_size).total),
        )
        for pattern, config in models.items()
    ]
    print_table(("<pattern", "<mixers", "width", "MLP", "parameters"), rows)
    peers = dict.fromkeys((each.pattern, each.who) for each in found if each.who != _package(each.who))
    if peers:
        print("transformers: " + ", ".join(f"{pattern} {who.split()[1]}" for pattern, who in peers) + "\n")
    for part in PARTS:
        _show_part(part, [each for each in found if each.part == part])
    reasons: dict[tuple[str, str, int, str], list[str]] = {}
    for each in found:
        if each.failure and not each.late:
            reasons.setdefault((each.who, each.pattern, each.context, each.failure), []).append(each.part)
    for (who, pattern, context, failure), parts in reasons.items():
        print(f"note: {who}, {pattern}, {' and '.join(parts)} at {context:,} tokens: {failure}")
    if command := to_go_on(setting, models, ceilings, found):
        print(f"go on with: {command}")


def in_a_line(each: Measured) -> str:
    """One rate as it is told when it has just been measured."""
    if each.rate is None:
        return f"{each.part}: {each.failure or 'no rate'}"
    words = [f"{each.part}: {scaled(each.rate, 'tok/s')}"]
    if each.ceiling is not None:
        words.append(f"{share(each.ceiling, 1)} {_bound(each.part)}")
    if each.memory_bytes is not None:
        words.append(f"peak {byte_size(each.memory_bytes)}")
    return ", ".join(words)


def _bound(part: Part) -> str:
    return "of copy rate" if part == "decode" else "of matmul rate"


def _show_part(part: Part, found: Sequence[Measured]) -> None:
    longest = max((each.rate or 0.0 for each in found), default=0.0)
    order = list(dict.fromkeys((each.context, each.pattern) for each in found))
    found = sorted(found, key=lambda each: order.index((each.context, each.pattern)))
    ours = {(each.context, each.pattern): each.rate for each in found if each.who == OURS}
    rows = []
    for each in found:
        rate = each.rate
        mine = ours.get((each.context, each.pattern))
        rows.append(
            (
                f"{each.context:,}",
                each.pattern,
                _package(each.who) + (f", {each.micro_batches} micro-batches" if each.micro_batches > 1 else ""),
                scaled(rate, "tok/s"),
                MISSING if len(each.rates) < 2 else f"{scaled(min(each.rates))}…{scaled(max(each.rates))}",
                share(each.ceiling, 1),
                MISSING if each.who == OURS or not rate or not mine else f"{significant(mine / rate)}×",
                byte_size(each.memory_bytes),
                byte_size(each.state_bytes),
                "█" * max(1, round(BAR * rate / longest)) if rate and longest else _why_none(each),
            )
        )
    print(TITLES[part])
    columns = (
        "context",
        "<pattern",
        "<who",
        "median",
        "lowest…highest",
        _bound(part),
        "longspan is",
        "peak memory",
        "state",
        "<",
    )
    # What nothing here has is no column: memory of prefill on a CPU, the state in training.
    kept = [at for at in range(len(columns)) if at < KEYS or any(row[at] != MISSING for row in rows)]
    print_table([columns[at] for at in kept], [[row[at] for at in kept] for row in rows], keys=KEYS)


def _package(who: str) -> str:
    """A peer without the class of transformers, which a line above the tables names."""
    return "transformers" if who.startswith("transformers ") else who


def _why_none(each: Measured) -> str:
    # No note repeats that the time was short.
    return each.failure if each.late else shortened(each.failure)


def shortened(reason: str) -> str:
    """Its beginning, for a column of a table."""
    return reason if len(reason) <= REASON else reason[: REASON - 1].rstrip() + "…"
