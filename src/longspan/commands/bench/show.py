"""What was measured, for people: the device, the models, and a table with bars for each part at each context."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from longspan.commands.bench.ceilings import Ceilings
from longspan.commands.bench.compared import FEWEST, times_as_fast
from longspan.commands.bench.measured import OURS, PARTS, Measured, Part
from longspan.commands.bench.plan import to_go_on
from longspan.commands.bench.setting import Setting
from longspan.models.budget import count_parameters
from longspan.models.config import ModelConfig
from longspan.ops import kernels
from longspan.report.numbers import MISSING, byte_size, scaled, share, significant
from longspan.terminal import print_table
from longspan.training.compilation import resolve_compile

BAR = 20
"""Characters of the longest bar."""
REASON = 34
"""Characters of why there is none; a note under the tables says all of it."""
UNSTEADY = 0.2
"""Of a median, between the quartiles of its repeats: a quiet machine stays far below."""
KEYS = 2
"""Columns that name a row: pattern, who."""
TITLES = {"train": "training step", "prefill": "prefill, one prompt", "decode": "decoding, one sequence"}


def show(setting: Setting, models: dict[str, ModelConfig], ceilings: Ceilings, found: Sequence[Measured]) -> None:
    """The device, the models, and a table with bars for each part at each context."""
    print(
        f"{ceilings.device}: matrix product {scaled(ceilings.matmul, 'FLOP/s')} in {setting.dtype}, "
        f"copy {scaled(ceilings.copy, 'B/s')}"
    )
    compiled = "compiled" if resolve_compile("auto", setting.device) else "not compiled"
    print(f"longspan: {kernels.described(setting.device)}, layers {compiled} in training")
    peers = dict.fromkeys((each.pattern, each.who) for each in found if each.who != _package(each.who))
    if peers:
        print("transformers: " + ", ".join(f"{pattern} {who.split()[1]}" for pattern, who in peers))
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
    for part in PARTS:
        for context in sorted(setting.contexts):
            _show_part(part, context, [each for each in found if (each.part, each.context) == (part, context)])
    _show_notes(found)
    if command := to_go_on(setting, models, ceilings, found):
        print(f"go on with: {command}")


def in_a_line(each: Measured) -> str:
    """One rate as it is told when it has just been measured."""
    if each.rate is None:
        return f"{each.part}: {each.failure or 'no rate'}"
    words = [f"{each.part}: {scaled(each.rate, 'tok/s')}"]
    if each.ceiling is not None:
        words.append(f"{share(each.ceiling, 1)} {_bound(each.part)} rate")
    if each.memory_bytes is not None:
        words.append(f"peak {byte_size(each.memory_bytes)}")
    return ", ".join(words)


def _bound(part: Part) -> str:
    return "of copy" if part == "decode" else "of matmul"


def _show_part(part: Part, context: int, found: Sequence[Measured]) -> None:
    """The table of what was begun; where the time was short, the notes say so once."""
    found = [each for each in found if not each.late]
    if not found:
        return
    longest = max(each.rate or 0.0 for each in found)
    order = list(dict.fromkeys(each.pattern for each in found))
    found = sorted(found, key=lambda each: order.index(each.pattern))
    ours = {each.pattern: each.rates for each in found if each.who == OURS}
    rows = [
        (
            each.pattern,
            _package(each.who) + (f", {each.micro_batches} micro-batches" if each.micro_batches > 1 else ""),
            scaled(each.rate),
            f"{scaled(min(each.rates))}…{scaled(max(each.rates))}" if each.rates else MISSING,
            str(len(each.rates)) if each.rates else MISSING,
            share(each.ceiling, 1),
            byte_size(each.memory_bytes),
            byte_size(each.state_bytes),
            MISSING if each.who == OURS else _times(ours.get(each.pattern, ()), each.rates),
            "█" * max(1, round(BAR * each.rate / longest)) if each.rate and longest else shortened(each.failure),
        )
        for each in found
    ]
    print(f"{TITLES[part]}, {context:,} tokens")
    columns = (
        "<pattern", "<who", "tok/s", "lowest…highest", "n", _bound(part), "memory", "state", "longspan is", "<",
    )  # fmt: skip
    # What nothing here has is no column: the state in training, a ratio without peers.
    kept = [at for at in range(len(columns)) if at < KEYS or any(row[at] != MISSING for row in rows)]
    print_table([columns[at] for at in kept], [[row[at] for at in kept] for row in rows], keys=KEYS)


def _times(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """`1.82× [1.7, 1.9]`, nothing where the repeats are too few."""
    ratio = times_as_fast(ours, theirs)
    if ratio is None:
        return MISSING
    return f"{significant(ratio.value)}× [{significant(ratio.low)}, {significant(ratio.high)}]"


def _show_notes(found: Sequence[Measured]) -> None:
    """Why something has no rate, each reason once, and whether what has one can be trusted."""
    broken: dict[tuple[str, str, int, str], list[str]] = {}
    late: dict[tuple[str, str, int], dict[str, list[str]]] = {}
    for each in found:
        if each.late:
            why = _why_late(each.failure)
            late.setdefault((why, _package(each.who), each.context), {}).setdefault(each.pattern, []).append(each.part)
        elif each.failure:
            broken.setdefault((each.who, each.pattern, each.context, each.failure), []).append(each.part)
    for (who, pattern, context, failure), parts in broken.items():
        print(f"note: {who}, {pattern}, {' and '.join(parts)} at {context:,} tokens: {failure}")
    for (why, who, context), patterns in late.items():
        named = "; ".join(f"{pattern} {', '.join(parts)}" for pattern, parts in patterns.items())
        print(f"note: {why}: {who} at {context:,} tokens: {named}")
    if unsteady := sum(_unsteady(each.rates) for each in found):
        print(
            f"note: in {unsteady} of {sum(bool(each.rates) for each in found)} rows repeats are more than "
            f"{share(UNSTEADY)} apart (quartiles): this machine does other work, so ratios may mislead"
        )


def _unsteady(rates: Sequence[float]) -> bool:
    if len(rates) < FEWEST:
        return False
    low, middle, high = statistics.quantiles(rates, n=4, method="inclusive")
    return high - low > UNSTEADY * middle


def _why_late(failure: str) -> str:
    """`not measured: predicted to take 40 s, 12 s left` is, of many together, `not measured, the time was short`."""
    return "not measured, the time was short" if failure.startswith("not measured") else failure


def _package(who: str) -> str:
    """A peer without the class of transformers, which a line above the tables names."""
    return "transformers" if who.startswith("transformers ") else who


def shortened(reason: str) -> str:
    """Its beginning, for a column of a table."""
    return reason if len(reason) <= REASON else reason[: REASON - 1].rstrip() + "…"
