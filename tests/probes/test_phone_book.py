"""Claims about phone books: names never repeat, places are balanced, and only the line with the name tells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from longspan.engines.base import Generation, Sampling, Tokens
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.probes.base import ProbeData, make_probe
from longspan.probes.phone_book import PhoneBook
from longspan.probes.suffix_identification import unigram_nll
from longspan.records.observation import Summary
from longspan.records.store import Record

Ask = Callable[..., list[Record]]
Read = Callable[..., tuple[list[object], Summary]]


def probe_with(**settings: object) -> PhoneBook:
    probe = make_probe("phone_book", {"entries": [6, 12], "per_size": 10, **settings})
    assert isinstance(probe, PhoneBook)
    return probe


def values(summary: Summary) -> dict[tuple[str, float | None, float | None], float]:
    return {(m.metric, m.x, m.y): m.value for m in summary.measurements}


def test_names_and_numbers_of_a_book_differ_and_ten_digits_make_a_number(text: ProbeData) -> None:
    for item in probe_with().items(text):
        names, numbers = zip(*item.details["lines"], strict=True)
        assert len(set(names)) == len(set(numbers)) == item.details["size"]
        assert all(len(number) == 10 and number.isdigit() for number in numbers)
        assert len({len(text.tokenizer.encode(f" {number}")) for number in numbers}) == 1


def test_the_prompt_is_the_book_two_examples_and_a_third_name(text: ProbeData) -> None:
    probe = probe_with()
    for item in probe.items(text):
        question, details = probe.asked(item, text), item.details
        prompt = text.tokenizer.decode(np.concatenate([probe.book(item, text), question.cue]))
        *lines, last = [line for line in prompt.split("\n") if line]
        assert lines == [
            f"{n}: {v}" for n, v in [*details["lines"], *(details["lines"][i] for i in details["examples"])]
        ]
        assert last == f"{details['lines'][details['asked']][0]}:"
        assert details["asked"] not in details["examples"]
        candidates = [text.tokenizer.decode(c).strip() for c in question.candidates]
        assert candidates[question.truth] == question.answer == details["lines"][details["asked"]][1]
        assert len(set(candidates)) == 4
        assert {*candidates} <= {number for _, number in details["lines"]}
        assert not {*candidates} & {details["lines"][i][1] for i in details["examples"]}


def test_places_in_the_book_and_of_the_truth_are_balanced(text: ProbeData) -> None:
    items = probe_with(per_size=100, entries=[6]).items(text)
    assert Counter(item.details["depth"] for item in items) == dict.fromkeys((0.0, 0.25, 0.5, 0.75, 1.0), 20)
    assert max(Counter(item.details["truth"] for item in items).values()) < 43


def test_frequencies_do_not_give_the_number_away(text: ProbeData) -> None:
    surprise, probe = unigram_nll(text), probe_with(per_size=100, entries=[6])
    ranks = []
    for item in probe.items(text):
        question = probe.asked(item, text)
        liked = np.array([surprise[candidate].sum() for candidate in question.candidates])
        ranks.append(int((liked < liked[question.truth]).sum()))
    assert np.bincount(ranks).max() < 43


def test_a_subject_that_ignores_the_book_guesses_and_one_that_reads_knows(
    text: ProbeData, fake: Callable[..., object], ask: Ask, read: Read
) -> None:
    def from_book(prompts: Sequence[Tokens], sampling: Sampling) -> list[Generation]:
        texts = []
        for prompt in prompts:
            lines = [line for line in text.tokenizer.decode(prompt).split("\n") if line]
            known = dict(line.split(": ") for line in lines[:-1])
            texts.append(" " + known[lines[-1].rstrip(":")])
        return [Generation(np.zeros(1, dtype=np.int64), t, "stop", 1, 0.0, 0.0) for t in texts]

    engine = fake(of=text.tokenizer)
    probe = probe_with()
    found = values(read(probe, ask(probe, engine, text))[1])
    assert found["accuracy", 6.0, None] == found["accuracy", 12.0, 0.5] == found["no_context", None, None] == 0.25
    assert found["exact_match", 6.0, None] == 0
    engine.generate = from_book  # type: ignore[attr-defined]
    found = values(read(probe, ask(probe, engine, text))[1])
    assert found["exact_match", 6.0, None] == found["exact_match", 12.0, 1.0] == 1


def test_a_request_that_failed_is_a_wrong_answer_that_says_why(
    text: ProbeData, fake: Callable[..., object], ask: Ask, read: Read
) -> None:
    engine = fake(of=text.tokenizer)
    engine.generate = lambda prompts, sampling: [  # type: ignore[attr-defined]
        Generation(np.zeros(0, dtype=np.int64), "", "failed", 1, 0.0, 0.0, failure="timeout") for _ in prompts
    ]
    probe = probe_with(ways=["generation"])
    records = ask(probe, engine, text)
    assert {record.answer["failure"] for record in records} == {"timeout"}
    assert values(read(probe, records)[1])["exact_match", 6.0, None] == 0


def test_a_real_subject_is_asked_what_it_can_take(
    text: ProbeData, reader_of_words: Callable[..., NativeEngine], ask: Ask, read: Read
) -> None:
    probe = probe_with(per_size=2)
    longest = max(item.details["length"] for item in probe.items(text) if item.details["size"] == 6)
    found = values(read(probe, ask(probe, reader_of_words(limit=longest), text))[1])
    assert {x for metric, x, _ in found if metric == "accuracy"} == {6.0}
    assert {metric for metric, _, _ in found} == {"accuracy", "exact_match", "no_context"}


def test_a_book_too_small_for_its_candidates_is_refused(text: ProbeData) -> None:
    with pytest.raises(UserError, match="at least 6: 2 examples and 4 candidates"):
        probe_with(entries=[5, 12]).items(text)


def test_describing_shows_the_question_and_the_number(text: ProbeData) -> None:
    probe = probe_with()
    item = probe.items(text)[0]
    shown = probe.describe(item, text)
    assert shown.asked.startswith("(6 entries)")
    assert shown.expected == item.details["lines"][item.details["asked"]][1]
