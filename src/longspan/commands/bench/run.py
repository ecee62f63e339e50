"""All measurements, one after the other within the time, and how they are shown."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch

from longspan.commands.bench.ceilings import Ceilings, measure_ceilings
from longspan.commands.bench.limits import Cut, Limits
from longspan.commands.bench.measured import OURS, PARTS, Measured, Part, share_of_ceiling
from longspan.commands.bench.own import Generated, generated, native_engine, trained
from longspan.commands.bench.peers import peer_generated, peer_trained
from longspan.commands.bench.plan import CUT_OFF, LATE, LEFT_OUT, STOPPED, Cell, expected_seconds, plan, to_go_on
from longspan.commands.bench.setting import Setting, models_of
from longspan.foundation.errors import LongspanError, Stopped
from longspan.models.budget import count_parameters
from longspan.models.config import ModelConfig
from longspan.ops import kernels
from longspan.report.numbers import byte_size, duration, scaled, significant
from longspan.terminal import print_table
from longspan.training.compilation import resolve_compile

BAR = 28
"""Characters of the longest bar."""
TITLES = {"train": "training step", "prefill": "prefill, one prompt", "decode": "decoding, one sequence"}
Say = Callable[[str], None]


def bench(setting: Setting, *, peers: bool, json_only: bool) -> None:
    """Measure, show tables and bars, and end in one JSON line.

    Args:
        setting: what.
        peers: whether the other packages are measured too.
        json_only: print nothing else on stdout.

    Raises:
        Stopped: somebody stopped it; what had been measured was shown.
    """
    started = time.monotonic()
    models = models_of(setting)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    say(f"measuring what {setting.device} can do at best")
    ceilings = measure_ceilings(setting.device, setting.torch_dtype)
    found = measure(setting, models, ceilings, peers=peers, say=say, since=started)
    outcome = {
        "bench": {
            **{key: value for key, value in asdict(setting).items() if key != "device"},
            "device": str(setting.device),
            "models": {pattern: model.model_dump(exclude_defaults=True) for pattern, model in models.items()},
            "torch": torch.__version__,
            "kernels": kernels.described(setting.device),
            "layers_compiled": resolve_compile("auto", setting.device),
            "took_seconds": round(time.monotonic() - started, 1),
        },
        "ceilings": asdict(ceilings),
        "measured": [each.to_json() for each in found],
        "go_on_with": to_go_on(setting, models, ceilings, found),
    }
    if not json_only:
        show(setting, models, ceilings, found)
    print(json.dumps(outcome, ensure_ascii=False, allow_nan=False), flush=True)
    if any(each.failure == STOPPED for each in found):
        raise Stopped("stopped; what had been measured until then is shown")


def measure(
    setting: Setting,
    models: dict[str, ModelConfig],
    ceilings: Ceilings,
    *,
    peers: bool,
    say: Say,
    since: float | None = None,
) -> list[Measured]:
    """The whole `plan`, each rate told as soon as it is known.

    What comes first is always measured. What is expected to take longer than is left is not begun, and what is not
    done when the time is over, or when somebody stops it, is cut; both say so.

    Args:
        setting, models, ceilings, peers: what.
        say: takes lines for people.
        since: when the time began, by `time.monotonic`; None: now.
    """
    cells = plan(setting, models, peers=peers)
    deadline = (time.monotonic() if since is None else since) + setting.seconds
    found: list[Measured] = []
    with Limits() as limits:
        for number, cell in enumerate(cells):
            config = models[cell.pattern]
            left = deadline - time.monotonic()
            expected = expected_seconds(cell, config, setting, ceilings)
            if limits.stopped or left <= 0 or (number and expected > left):
                found += _missing(cell, config, setting, PARTS, STOPPED if limits.stopped else LEFT_OUT)
                continue
            say(
                f"{number + 1} of {len(cells)}: {cell.pattern} at {cell.context:,} tokens, {cell.who} "
                f"({duration(left)} left)"
            )
            # Half for training, half for generating; what a part's first call costs comes on top.
            seconds = left / (len(cells) - number) / 3
            for each in _measure_one(cell, config, setting, ceilings, seconds, limits, deadline if number else None):
                say(f"  {in_a_line(each)}")
                found.append(each)
    return found


def _missing(
    cell: Cell, config: ModelConfig, setting: Setting, parts: Sequence[Part], reason: str
) -> Iterator[Measured]:
    parameters = count_parameters(config, setting.vocab_size).total
    for part in parts:
        yield Measured(cell.pattern, cell.context, part, cell.who, parameters, failure=reason)


def _measure_one(
    cell: Cell,
    config: ModelConfig,
    setting: Setting,
    ceilings: Ceilings,
    seconds: float,
    limits: Limits,
    deadline: float | None,
) -> Iterator[Measured]:
    peer, context = cell.peer, cell.context
    own = count_parameters(config, setting.vocab_size).total

    def row(part: Part, parameters: int, rates: Sequence[float], **more: Any) -> Measured:
        comparable = peer is None or peer.same_weights
        share = share_of_ceiling(part, rates, config, context, setting, ceilings) if comparable else None
        return Measured(cell.pattern, context, part, cell.who, parameters, tuple(rates), share, **more)

    def training() -> list[Measured]:
        if peer is None:
            rates, memory = trained(config, context, setting, seconds)
            return [row("train", own, rates, memory_bytes=memory)]
        rates, memory, parameters = peer_trained(peer, context, setting, seconds)
        return [row("train", parameters, rates, memory_bytes=memory)]

    def generating() -> list[Measured]:
        parameters, made = own, None
        if peer is None:
            made = generated(native_engine(config, setting), context, setting, seconds)
        else:
            made, parameters = peer_generated(peer, context, setting, seconds)
        return _of_generation(made, lambda part, rates, **more: row(part, parameters, rates, **more))

    for parts, work in ((PARTS[:1], training), (PARTS[1:], generating)):
        left = None if deadline is None else deadline - time.monotonic()
        failure = ""
        if limits.stopped or (left is not None and left <= 0):
            yield from _missing(cell, config, setting, parts, STOPPED if limits.stopped else CUT_OFF)
            continue
        try:
            with limits.measuring(left):
                rows = work()
            yield from rows
        except Cut:
            failure = STOPPED if limits.stopped else CUT_OFF
        except LongspanError:
            raise
        except Exception as error:
            # A peer that does not run here, or a context too long for the memory, must not end the whole.
            reason = (
                f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no word'}"
            )
            failure = reason[:160]
        if failure:
            yield from _missing(cell, config, setting, parts, failure)
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def _of_generation(made: Generated, row: Callable[..., Measured]) -> list[Measured]:
    # An engine that does not know what its model keeps says 0.
    memory = {"memory_bytes": made.memory_bytes, "state_bytes": made.state_bytes or None}
    return [row("prefill", made.prefill, **memory), row("decode", made.decode, **memory)]


# --- for people -------------------------------------------------------------------------------------------------------


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
    for part in PARTS:
        _show_part(part, [each for each in found if each.part == part and each.rates])
    for each in found:
        if each.failure and each.failure not in LATE:
            print(f"note: {each.who}, {each.pattern}, {each.part} at {each.context:,} tokens: {each.failure}")
    for reason in LATE:
        late = dict.fromkeys(f"{e.pattern} at {e.context:,} ({e.who})" for e in found if e.failure == reason)
        if late:
            print(f"note: {reason}: {', '.join(late)}")
    if command := to_go_on(setting, models, ceilings, found):
        print(f"go on with: {command}")


def in_a_line(each: Measured) -> str:
    """One rate as it is told when it has just been measured."""
    if each.rate is None:
        return f"{each.part}: {each.failure or 'no rate'}"
    words = [f"{each.part}: {scaled(each.rate, 'tok/s')}"]
    if each.ceiling is not None:
        words.append(f"{each.ceiling:.1%} {_bound(each.part)}")
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
                each.who,
                "–" if rate is None else scaled(rate, "tok/s"),
                "–" if len(each.rates) < 2 else f"{scaled(min(each.rates))}…{scaled(max(each.rates))}",
                "–" if each.ceiling is None else f"{each.ceiling:.1%}",
                "–" if each.who == OURS or not rate or not mine else f"{significant(mine / rate)}×",
                byte_size(each.memory_bytes),
                byte_size(each.state_bytes),
                "█" * max(1, round(BAR * rate / longest)) if rate and longest else "",
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
    print_table(columns, rows)
