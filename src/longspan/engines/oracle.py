"""Whether the ways of asking a subject agree, before any number of it is believed.

Long texts go through in parts, several at a time, on from a kept state, token by token: by the model's definition all
give the same, and in practice an architecture, a kernel or a server may not. Each way is compared with the text alone
and whole, on tokens of the study's own corpus.

In lower precision no two orders of computation agree, and how far they are apart grows with depth: no fixed bound tells
rounding from a fault. So the same weights are asked in fp32 as well. There the two must agree to `EXACT`, which shows a
fault of the logic whatever the rounding; and in its own precision a way may be at most `FARTHER` times as far from fp32
as the text alone and whole is, which shows a fault that only this precision has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from longspan.corpus.shards import TokenShards
from longspan.engines.base import Engine, Tokens
from longspan.engines.native import NativeEngine
from longspan.engines.precision import in_fp32, no_room_for_fp32
from longspan.engines.transformers import TransformersEngine
from longspan.foundation.errors import first_line
from longspan.foundation.progress import Progress, Report, silent

TOKENS = 384
"""Length of the text; three documents of other lengths are cut from it."""
STEPPED = 24
"""Tokens that go through one at a time."""
EXACT = 1e-4
"""Largest difference of a token's likelihood in fp32, nats, or as a share of the largest likelihood above 1."""
FARTHER = 2.0
"""Mean distance from fp32 in lower precision, as a multiple of that of the text alone and whole."""
ROUNDED = 0.02
"""Mean difference in nats per token, in lower precision where fp32 cannot be asked."""


Verdict = Literal["equal", "differs", "not used"]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        name: the two ways, e.g. `chunked = whole`.
        verdict: `equal`, `differs`, or `not used` where the engine never asks that way.
        largest, mean: difference of a token's likelihood, nats.
        allowed: what the largest (fp32), `away` (lower precision) or the mean (lower precision, fp32 unknown) may be.
        rounding, away: in lower precision, how far the text alone and whole is from fp32, and how far the other way
            is; means, nats.
        in_fp32: largest difference of the two ways in fp32.
        note: why a way is not used, or what lower precision means here.
    """

    name: str
    verdict: Verdict
    largest: float | None = None
    mean: float | None = None
    allowed: float | None = None
    rounding: float | None = None
    away: float | None = None
    in_fp32: float | None = None
    note: str = ""


def sample_tokens(shards: TokenShards) -> NDArray[np.int64]:
    """The first `TOKENS` tokens of a split, over as many documents as that takes."""
    parts, total = [], 0
    for document in shards:
        parts.append(np.asarray(document, np.int64))
        total += len(document)
        if total >= TOKENS:
            break
    return np.concatenate(parts)[:TOKENS]


def check_equivalence(engine: Engine, tokens: Tokens, report: Report = silent) -> list[Check]:
    """Compare the ways of asking an engine.

    Args:
        engine: the subject.
        tokens: some text in its tokens, at least 8 of them; what it cannot take is cut.
        report: told of the progress.
    """
    limit = engine.context_limit or len(tokens)
    text = np.concatenate([engine.document_prefix, tokens]).astype(np.int64)[:limit]
    ways: dict[str, Way] = {
        "batched = single": _batched,
        "cached = cold": _cached,
        "chunked = whole": _chunked,
        "streaming = parallel": _streaming,
        "left-padded = unpadded": _padded,
    }
    steps = 2 * len(ways)
    found: dict[str, Pair | str] = {}
    for name, way in ways.items():
        report(Progress("oracle", len(found), steps, "checks"))
        found[name] = way(engine, text)
    module = _module(engine)
    exact: dict[str, Pair | str] = {}
    if module is not None and not _exact(engine):
        exact = _in_fp32(engine, module, ways, text, lambda done: report(Progress("oracle", done, steps, "checks")))
    return [_judged(engine, name, pair, exact.get(name, "not asked in fp32")) for name, pair in found.items()]


def _in_fp32(
    engine: Engine, module: nn.Module, ways: Mapping[str, Way], text: NDArray[np.int64], tell: Callable[[int], None]
) -> dict[str, Pair | str]:
    if reason := no_room_for_fp32(module):
        return dict.fromkeys(ways, f"not asked in fp32 ({reason})")
    if isinstance(engine, NativeEngine):
        engine.drop_graphs()
    found: dict[str, Pair | str] = {}
    with in_fp32(module):
        for name, way in ways.items():
            tell(len(ways) + len(found))
            found[name] = _attempted(way, engine, text)
    return found


def _attempted(way: Way, engine: Engine, text: NDArray[np.int64]) -> Pair | str:
    """In a precision that the subject is never asked in, a kernel may lack what it needs."""
    try:
        return way(engine, text)
    except Exception as error:  # whatever a kernel raises: then there is no fp32 to compare with
        return f"not asked in fp32 ({first_line(error)})"


Pair = tuple[NDArray[np.float64], NDArray[np.float64]]
Way = Callable[[Engine, NDArray[np.int64]], "Pair | str"]


def _batched(engine: Engine, text: NDArray[np.int64]) -> Pair | str:
    """Texts of unlike lengths together, and each alone."""
    if "nll" not in engine.capabilities:
        return "the engine gives no likelihoods"
    some = [text[: max(2, len(text) // share)] for share in (1, 2, 3)]
    alone = [engine.nll([each])[0] for each in some]
    return np.concatenate(engine.nll(some)), np.concatenate(alone)


def _cached(engine: Engine, text: NDArray[np.int64]) -> Pair | str:
    """Continuations of one prefix, of unlike lengths, and each with the prefix before it."""
    if "score" not in engine.capabilities:
        return "the engine scores no continuations"
    cut = max(1, len(text) * 2 // 3)
    rest = text[cut:]
    choices = [rest, rest[: max(1, len(rest) // 2)], rest[::-1]]
    cold = [engine.nll([np.concatenate([text[:cut], choice])])[0][cut - 1 :] for choice in choices]
    return np.concatenate(engine.score(text[:cut], choices)), np.concatenate(cold)


def _chunked(engine: Engine, text: NDArray[np.int64]) -> Pair | str:
    if isinstance(engine, TransformersEngine) and not engine.model.takes_parts:
        return "this architecture does not give the same in parts, so none are made"
    return _in_parts(engine, text, max(1, len(text) // 5))


def _streaming(engine: Engine, text: NDArray[np.int64]) -> Pair | str:
    if isinstance(engine, TransformersEngine) and not engine.model.keeps_state:
        return "this architecture keeps no state, so nothing is streamed"
    return _in_parts(engine, text[:STEPPED], 1)


def _in_parts(engine: Engine, text: NDArray[np.int64], part: int) -> Pair | str:
    if isinstance(engine, TransformersEngine):
        return engine.nll_by(text, part), engine.nll_by(text, len(text))
    if isinstance(engine, NativeEngine):
        with _batch_tokens(engine, part):
            parts = engine.nll([text])[0]
        with _batch_tokens(engine, len(text)):
            return parts, engine.nll([text])[0]
    return "how a text goes through is the server's own matter"


def _padded(engine: Engine, text: NDArray[np.int64]) -> Pair | str:
    if not isinstance(engine, TransformersEngine):
        return "nothing is ever put before a text"
    if not engine.model.takes_padding:
        return "this architecture does not give the same after padding, so nothing is put before a text"
    return engine.nll_padded(text, 7), engine.nll_by(text, len(text))


@contextmanager
def _batch_tokens(engine: NativeEngine, size: int) -> Iterator[None]:
    before, engine.batch_tokens = engine.batch_tokens, size
    try:
        yield
    finally:
        engine.batch_tokens = before


def _judged(engine: Engine, name: str, found: Pair | str, exact: Pair | str) -> Check:
    if isinstance(found, str):
        return Check(name, "not used", note=found)
    largest, mean = _apart(*found)
    if _exact(engine):
        allowed = _allowed(found[1])
        return Check(name, "equal" if largest <= allowed else "differs", largest, mean, allowed)
    if isinstance(exact, str):
        note = f"{exact}: rounding and a small fault look alike"
        return Check(name, "equal" if mean <= ROUNDED else "differs", largest, mean, ROUNDED, note=note)
    right = exact[1]
    away, rounding = _apart(found[0], right)[1], _apart(found[1], right)[1]
    in_fp32 = _apart(*exact)[0]
    equal = in_fp32 <= _allowed(right) and away <= FARTHER * rounding
    note = (
        f"{'equal within rounding' if equal else 'differs'}: {mean:.2g} nats apart in the mean, {away:.2g} from fp32 "
        f"where the text alone and whole is {rounding:.2g}; in fp32 apart by {in_fp32:.1g} at most"
    )
    verdict: Verdict = "equal" if equal else "differs"
    return Check(name, verdict, largest, mean, FARTHER * rounding, rounding, away, in_fp32, note)


def _apart(here: NDArray[np.float64], there: NDArray[np.float64]) -> tuple[float, float]:
    """Largest and mean difference."""
    difference = np.abs(here - there)
    return float(difference.max()), float(difference.mean())


def _allowed(right: NDArray[np.float64]) -> float:
    return EXACT * max(1.0, float(np.abs(right).max()))


def _module(engine: Engine) -> nn.Module | None:
    """Of an engine that computes in this process."""
    if isinstance(engine, NativeEngine):
        return engine.module
    if isinstance(engine, TransformersEngine):
        module: nn.Module = engine.model.model
        return module
    return None


def _exact(engine: Engine) -> bool:
    if isinstance(engine, NativeEngine):
        return engine.dtype == "fp32"
    return isinstance(engine, TransformersEngine) and engine.model.dtype.itemsize >= 4
