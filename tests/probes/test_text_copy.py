"""Claims about copying text: two whole copies, the same passages for all, and nothing saved by who does not look."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from longspan.engines.base import Generation, Sampling, Tokens
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.probes.base import ProbeData, make_probe
from longspan.probes.text_copy import TextCopy
from longspan.records.observation import Summary
from longspan.records.store import Record

Ask = Callable[..., list[Record]]
Read = Callable[..., tuple[list[object], Summary]]


def probe_with(**settings: object) -> TextCopy:
    probe = make_probe("text_copy", {"lengths": [8, 24], "per_length": 12, **settings})
    assert isinstance(probe, TextCopy)
    return probe


def values(summary: Summary) -> dict[tuple[str, float | None], float]:
    return {(m.metric, m.x): m.value for m in summary.measurements}


@pytest.mark.parametrize("order", ["standard", "shuffled"])
def test_a_passage_stands_twice_and_is_begun_a_third_time(text: ProbeData, order: str) -> None:
    probe = probe_with(order=order)
    gap = text.tokenizer.encode("\n\n").tolist()
    for item in probe.items(text):
        passage = probe.passage(item, text).tolist()
        assert probe.prompt(item, text).tolist() == [*passage, *gap, *passage, *gap, *passage[:2]]
        start, length = item.details["start"], item.details["length"]
        own = text.shards.document(item.document)[start : start + length].tolist()
        assert (passage == own) == (order == "standard")
        assert sorted(passage) == sorted(own)


def test_a_short_passage_begins_the_long_one(text: ProbeData) -> None:
    probe = probe_with()
    by_number: dict[int, list[list[int]]] = {}
    for item in probe.items(text):
        by_number.setdefault(item.details["number"], []).append(probe.passage(item, text).tolist())
    assert len(by_number) == 12
    assert all(long[:8] == short for short, long in by_number.values())


def test_who_does_not_look_back_saves_nothing_and_who_copies_is_right(
    text: ProbeData, fake: Callable[..., object], ask: Ask, read: Read
) -> None:
    gap = text.tokenizer.encode("\n\n").tolist()

    def copies(prompts: Sequence[Tokens], sampling: Sampling) -> list[Generation]:
        written = []
        for prompt in prompts:
            tokens = prompt.tolist()[1:]
            end = next(i for i in range(len(tokens)) if tokens[i : i + len(gap)] == gap)
            written.append(np.array(tokens[2:end]))
        return [Generation(w, "", "length", 1, 0.0, 0.0) for w in written]

    engine = fake(of=text.tokenizer)
    probe = probe_with()
    found = values(read(probe, ask(probe, engine, text))[1])
    assert found["saved", 8.0] == found["saved", 24.0] == 0
    assert found["exact_match", 24.0] == 0
    engine.generate = copies  # type: ignore[attr-defined]
    found = values(read(probe, ask(probe, engine, text))[1])
    assert found["exact_match", 8.0] == found["token_accuracy", 24.0] == 1


def test_a_text_that_ends_early_is_no_copy(text: ProbeData, fake: Callable[..., object], ask: Ask, read: Read) -> None:
    engine = fake(of=text.tokenizer)
    probe = probe_with(ways=["generation"])
    items = {i.id: i for i in probe.items(text)}

    def half(prompts: Sequence[Tokens], sampling: Sampling) -> list[Generation]:
        rests = [probe.passage(item, text)[2:] for item in items.values()]
        return [Generation(r[: len(r) // 2], "", "stop", 1, 0.0, 0.0) for r in rests]

    engine.generate = half  # type: ignore[attr-defined]
    found = values(read(probe, ask(probe, engine, text))[1])
    assert found["exact_match", 24.0] == 0
    assert found["token_accuracy", 24.0] == 0.5


def test_a_real_subject_is_asked_what_it_can_take(
    text: ProbeData, reader_of_words: Callable[..., NativeEngine], ask: Ask, read: Read
) -> None:
    probe = probe_with(per_length=3)
    found = values(read(probe, ask(probe, reader_of_words(limit=40), text))[1])
    assert {x for _, x in found} == {8.0}
    assert {metric for metric, _ in found} == {"saved", "nll", "exact_match", "token_accuracy"}


def test_lengths_that_cannot_be_asked_are_refused(text: ProbeData) -> None:
    with pytest.raises(UserError, match="longer than the 2 tokens that are given"):
        probe_with(lengths=[2]).items(text)
    with pytest.raises(UserError, match="ask for shorter"):
        probe_with(lengths=[100_000]).items(text)


def test_describing_shows_the_beginning_and_the_rest(text: ProbeData) -> None:
    probe = probe_with()
    item = probe.items(text)[0]
    assert probe.describe(item, text).asked.endswith("⟶")
    assert probe.describe(item, text).expected
