"""All measurements, one after the other within the time."""

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
from longspan.commands.bench.measured import OURS, Measured, Part, share_of_ceiling
from longspan.commands.bench.own import Generated, generated, native_engine, trained
from longspan.commands.bench.peers import peer_generated, peer_trained
from longspan.commands.bench.plan import STOPPED, Task, plan, tasks_of, to_go_on
from longspan.commands.bench.setting import Setting, models_of
from longspan.commands.bench.show import in_a_line, show
from longspan.foundation.errors import LongspanError, Stopped
from longspan.models.budget import count_parameters
from longspan.models.config import ModelConfig
from longspan.ops import kernels
from longspan.report.numbers import duration
from longspan.training.compilation import resolve_compile

MOST_SECONDS = {"cuda": 6.0, "cpu": 20.0}
"""Of measuring a part beyond its fewest repeats."""
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
        "measured": [each.to_json(_ours(each, found)) for each in found],
        "go_on_with": to_go_on(setting, models, ceilings, found),
    }
    if not json_only:
        show(setting, models, ceilings, found)
    print(json.dumps(outcome, ensure_ascii=False, allow_nan=False), flush=True)
    if any(each.failure == STOPPED for each in found):
        raise Stopped("stopped; what had been measured until then is shown")


def _ours(peer: Measured, found: Sequence[Measured]) -> Sequence[float]:
    """Longspan's rates beside those of a peer."""
    where = (OURS, peer.pattern, peer.context, peer.part)
    return next((each.rates for each in found if (each.who, each.pattern, each.context, each.part) == where), ())


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

    What comes first is always measured. Of the rest, what is predicted to take longer than is left is not begun. What
    is begun may take twice as long as predicted, or longer by a part of what nothing that is still to come at its
    context needs: half of that where it is Longspan's own, which all is compared with, and of peers the same for each;
    then it is cut. Either says so.

    Args:
        setting, models, ceilings, peers: what.
        say: takes lines for people.
        since: when the time began, by `time.monotonic`; None: now.
    """
    cells = plan(setting, models, peers=peers)
    deadline = (time.monotonic() if since is None else since) + setting.seconds
    tasks = tasks_of(cells, models, setting, ceilings)
    found: list[Measured] = []
    with Limits() as limits:
        for place, task in enumerate(tasks):
            left = deadline - time.monotonic()
            always = task.cell is cells[0]
            if limits.stopped:
                found += _missing(task, models, setting, STOPPED, late=True)
                continue
            if not always and task.seconds > left:
                reason = f"not measured: predicted to take {duration(task.seconds)}, {duration(max(0.0, left))} left"
                found += _missing(task, models, setting, reason, late=True)
                continue
            here = [each.seconds for each in tasks[place:] if each.cell.context == task.cell.context]
            spare = max(0.0, left - sum(here))
            say(
                f"{place + 1} of {len(tasks)}: {task.cell.pattern} at {task.cell.context:,} tokens, {task.cell.who}, "
                f"{' and '.join(task.parts)} ({duration(left)} left)"
            )
            more = spare / (2 if task.cell.peer is None else len(here))
            limit = None if always else min(left, task.seconds + max(task.seconds, more))
            seconds = min(MOST_SECONDS[setting.device.type], spare / len(here))
            for each in _measured(task, models, setting, ceilings, seconds, limits, limit):
                say(f"  {in_a_line(each)}")
                found.append(each)
    return found


def _missing(
    task: Task, models: dict[str, ModelConfig], setting: Setting, reason: str, *, late: bool
) -> Iterator[Measured]:
    cell = task.cell
    parameters = count_parameters(models[cell.pattern], setting.vocab_size).total
    for part in task.parts:
        yield Measured(cell.pattern, cell.context, part, cell.who, parameters, failure=reason, late=late)


def _measured(
    task: Task,
    models: dict[str, ModelConfig],
    setting: Setting,
    ceilings: Ceilings,
    seconds: float,
    limits: Limits,
    limit: float | None,
) -> Iterator[Measured]:
    began = time.monotonic()
    try:
        with limits.measuring(limit):
            rows = list(_rows(task, models[task.cell.pattern], setting, ceilings, seconds))
        yield from rows
    except Cut:
        after = f"cut off after {duration(time.monotonic() - began)}: predicted to take {duration(task.seconds)}"
        yield from _missing(task, models, setting, STOPPED if limits.stopped else after, late=True)
    except LongspanError:
        raise
    except Exception as error:
        # A peer that does not run here, or a context too long for the memory, must not end the whole.
        words = str(error).strip().splitlines()
        reason = f"{type(error).__name__}: {words[0] if words else 'no word'}"
        yield from _missing(task, models, setting, reason[:160], late=False)
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()


def _rows(task: Task, config: ModelConfig, setting: Setting, ceilings: Ceilings, seconds: float) -> Iterator[Measured]:
    cell, peer, context = task.cell, task.cell.peer, task.cell.context
    parameters = count_parameters(config, setting.vocab_size).total

    def row(part: Part, rates: Sequence[float], **more: Any) -> Measured:
        comparable = peer is None or peer.same_weights
        share = share_of_ceiling(part, rates, config, context, setting, ceilings) if comparable else None
        return Measured(cell.pattern, context, part, cell.who, parameters, tuple(rates), share, **more)

    if "train" in task.parts:
        if peer is None:
            rates, memory = trained(config, context, setting, seconds)
            yield row("train", rates, memory_bytes=memory)
        else:
            run = peer_trained(peer, context, setting, seconds)
            parameters = run.parameters
            yield row("train", run.rates, memory_bytes=run.memory_bytes, micro_batches=run.parts)
    if "decode" in task.parts:
        if peer is None:
            made: Generated = generated(native_engine(config, setting), context, setting, seconds)
        else:
            made, parameters = peer_generated(peer, context, setting, seconds)
        # An engine that does not know what its model keeps says 0.
        more = {"memory_bytes": made.memory_bytes, "state_bytes": made.state_bytes or None}
        yield row("prefill", made.prefill, **more)
        yield row("decode", made.decode, **more)
