"""Claims about needles: balanced, the same for everybody, not to be guessed, and found by whoever reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from longspan.engines.base import Engine, Generation, Sampling, Tokens, UnusableAnswer
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.probes import made_up
from longspan.probes.asking import is_exact
from longspan.probes.base import ProbeData, make_probe
from longspan.probes.needle import Needle
from longspan.probes.suffix_identification import unigram_nll
from longspan.records.observation import Summary
from longspan.records.store import Record

Ask = Callable[..., list[Record]]
Read = Callable[..., tuple[list[object], Summary]]


def probe_with(**settings: object) -> Needle:
    probe = make_probe("needle", {"contexts": [384, 512], "per_cell": 8, "depths": 4, **settings})
    assert isinstance(probe, Needle)
    return probe


class Reader(Engine):
    """Looks the question's beginning up in what it was shown, and says what stood behind it there."""

    isolation = "full"
    context_limit = None
    name = fingerprint = "reader"

    def __init__(self, data: ProbeData, capabilities: Sequence[str] = ("score", "generate")) -> None:
        self.tokenizer = data.tokenizer
        self.document_prefix = np.array([data.tokenizer.special.boundary])
        self.capabilities = frozenset(capabilities)  # type: ignore[arg-type]

    def nll(self, sequences: Sequence[Tokens], doc_ids: Sequence[Tokens] | None = None) -> list[np.ndarray]:
        raise AssertionError

    def score_many(
        self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> list[list[np.ndarray]]:
        answers = []
        for prefix, choices in zip(prefixes, continuations, strict=True):
            shown = bytes(np.asarray(prefix, dtype=np.int32))
            known = [bytes(np.asarray(choice[1:], dtype=np.int32)) in shown for choice in choices]
            answers.append([np.full(len(c), 1.0 if k else 2.0) for c, k in zip(choices, known, strict=True)])
        return answers

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling) -> list[Generation]:
        texts = []
        for prompt in prompts:
            before, _, cue = self.tokenizer.decode(prompt).rpartition("\n")
            texts.append(before.rpartition(cue)[2].split(".")[0] if cue in before else " no idea")
        return [Generation(np.zeros(1, dtype=np.int64), t, "length", 1, 0.0, 0.0) for t in texts]

    def state_bytes(self, context: int) -> int:
        return 0


def values(summary: Summary) -> dict[tuple[str, float | None, float | None], float]:
    return {(m.metric, m.x, m.y): m.value for m in summary.measurements}


def test_every_depth_has_equally_many_questions_at_every_context(text: ProbeData) -> None:
    for settings in ({}, {"needles": 3}, {"needles": 1}, {"questions": "one"}, {"per_cell": 7, "needles": 2}):
        probe = probe_with(**settings)
        counted = Counter(
            (item.details["context"], item.details["depths"][place])
            for item in probe.items(text)
            for place in item.details["asked"]
        )
        assert len(counted) == 2 * 4, settings
        assert len(set(counted.values())) == 1, (settings, counted)
        assert min(counted.values()) >= probe.per_cell


def test_texts_of_one_document_hang_together_and_made_up_ones_do_not(text: ProbeData) -> None:
    for item in probe_with().items(text):
        assert item.details["cluster"] == text.shards.ids[item.details["haystack"]]
    made_up_texts = probe_with(haystack="made_up").items(text)
    assert len({item.details["cluster"] for item in made_up_texts}) == len(made_up_texts) / 2


def test_twenty_questions_a_cell_by_default() -> None:
    assert Needle.parse({"kind": "needle"}, "p").per_cell == 20


def test_texts_needles_and_values_are_the_same_at_every_context(text: ProbeData) -> None:
    by_number: dict[int, list[object]] = {}
    for item in probe_with().items(text):
        kept = {key: item.details[key] for key in ("facts", "values", "depths", "orders", "haystack", "start")}
        by_number.setdefault(item.details["number"], []).append(kept)
    assert all(len(kept) == 2 and kept[0] == kept[1] for kept in by_number.values())


@pytest.mark.parametrize("settings", [{}, {"haystack": "made_up", "needle": "made_up"}, {"needles": 1}])
def test_a_text_has_the_length_it_should_and_every_needle_stands_at_its_depth(
    text: ProbeData, settings: dict[str, object]
) -> None:
    probe = probe_with(**settings)
    for item in probe.items(text):
        tokens = probe.text(item, text)
        assert len(tokens) == item.details["room"]
        longest = max(question.reach for question in probe.asked(item, text))
        assert len(tokens) + longest + 1 <= item.details["context"]
        words = text.tokenizer.decode(tokens)
        for (cue, rest), value, depth in zip(
            item.details["facts"], item.details["values"], item.details["depths"], strict=False
        ):
            assert words.count(f" {cue} {value}{rest}") == 1
            found = words.index(f" {cue} {value}") / len(words)
            assert abs(found - depth) < 0.45, (found, depth)


def test_values_stand_nowhere_but_in_their_needle_and_are_equally_long(text: ProbeData) -> None:
    probe = probe_with()
    for item in probe.items(text):
        words = text.tokenizer.decode(probe.text(item, text))
        for index, value in enumerate(item.details["values"]):
            assert words.count(value) == (1 if index < probe.needles else 0)
        assert len({len(text.tokenizer.encode(f" {value}")) for value in item.details["values"]}) == 1
        assert len(set(item.details["values"])) == probe.candidates


def test_a_number_takes_the_place_of_a_number_and_a_name_that_of_a_name(text: ProbeData) -> None:
    seen = set()
    for item in probe_with().items(text):
        for (cue, _), value in zip(item.details["facts"], item.details["values"], strict=False):
            assert cue.endswith("was built for") == value.isdigit(), (cue, value)
            assert cue.endswith("belonged to") == value.isalpha(), (cue, value)
            seen.add(value.isdigit())
    assert seen == {True, False}


def test_the_haystack_never_begins_the_sentence_of_a_needle(text: ProbeData) -> None:
    for item in probe_with().items(text):
        start = item.details["start"]
        own = text.tokenizer.decode(text.shards.document(item.details["haystack"])[start : start + 512])
        assert all(f"{cue} " not in own for cue, _ in item.details["facts"])


def test_neither_word_frequency_nor_length_nor_place_gives_the_truth_away(text: ProbeData) -> None:
    """A subject that has not read the needle ranks the truth anywhere, whatever it likes."""
    surprise = unigram_nll(text)
    probe = probe_with(per_cell=60)
    ranks, places = [], []
    for item in probe.items(text):
        for question in probe.asked(item, text):
            liked = np.array([surprise[candidate].sum() for candidate in question.candidates])
            ranks.append(int((liked < liked[question.truth]).sum()))
            places.append(question.truth)
    for seen in (ranks, places):
        shares = np.bincount(seen, minlength=8) / len(seen)
        assert shares.max() < 0.125 + 4 * np.sqrt(0.125 * 0.875 / 120), shares


def test_a_subject_that_ignores_the_text_scores_its_floor_and_gains_nothing(
    text: ProbeData, fake: Callable[..., object], ask: Ask, read: Read
) -> None:
    surprise = unigram_nll(text)
    for say in (None, lambda tokens: surprise[tokens]):
        engine = fake(say, of=text.tokenizer)
        found = values(read(probe := probe_with(), ask(probe, engine, text))[1])
        assert found["gain", 384.0, None] == found["gain", 512.0, None] == 0
        assert found["accuracy", 384.0, None] == pytest.approx(found["no_context", None, None])
        assert found["exact_match", 512.0, None] == found["no_context_exact", None, None] == 0
        if say is None:
            assert found["accuracy", 512.0, None] == pytest.approx(1 / 8)
            assert found["swapped", 512.0, None] == pytest.approx(3 / 8)


def test_a_subject_that_reads_finds_every_needle_in_both_ways(text: ProbeData, ask: Ask, read: Read) -> None:
    for settings in ({}, {"haystack": "made_up", "needle": "made_up"}, {"questions": "one"}):
        probe = probe_with(**settings)
        found = values(read(probe, ask(probe, Reader(text), text))[1])
        for context in (384.0, 512.0):
            assert found["accuracy", context, None] == found["exact_match", context, None] == 1
            assert found["swapped", context, None] == 0
            assert {y for metric, x, y in found if metric == "accuracy" and x == context} == {
                None, 0.0, 0.3333, 0.6667, 1.0,
            }  # fmt: skip
        assert found["no_context", None, None] == pytest.approx(1 / 8)
        assert found["no_context_exact", None, None] == 0


def test_a_subject_is_asked_in_the_ways_it_can_and_refused_what_it_cannot(text: ProbeData, ask: Ask) -> None:
    (record, *_) = ask(probe_with(), Reader(text, ["score"]), text)
    assert {"scores", "floor"} <= record.answer["questions"][0].keys()
    assert "exact" not in record.answer["questions"][0]
    (record, *_) = ask(probe_with(), Reader(text, ["generate"]), text)
    assert "scores" not in record.answer["questions"][0]
    with pytest.raises(UserError, match="cannot `generate`"):
        ask(probe_with(ways=["generation"]), Reader(text, ["score"]), text)
    with pytest.raises(UserError, match="neither"):
        ask(probe_with(), Reader(text, ["nll"]), text)


def test_likelihoods_equal_reading_everything_anew(
    text: ProbeData, reader_of_words: Callable[..., NativeEngine], ask: Ask
) -> None:
    engine = reader_of_words()
    probe = probe_with(contexts=[256], per_cell=1, depths=2, needles=2, candidates=3, ways=["likelihood"])
    for record, item in zip(ask(probe, engine, text), probe.items(text), strict=True):
        before = np.concatenate([engine.document_prefix, probe.text(item, text)])
        for entry, question in zip(record.answer["questions"], probe.asked(item, text), strict=True):
            whole = [np.concatenate([before, question.cue, c]) for c in question.candidates]
            expected = [nll[-len(question.candidates[0]) :].sum() for nll in engine.nll(whole)]
            np.testing.assert_allclose(entry["scores"], expected, rtol=1e-4)


def test_a_real_subject_answers_both_ways_and_what_it_cannot_take_is_left_out(
    text: ProbeData, reader_of_words: Callable[..., NativeEngine], ask: Ask, read: Read
) -> None:
    probe = probe_with(per_cell=1, needles=2)
    found = values(read(probe, ask(probe, reader_of_words(), text))[1])
    assert {x for _, x, _ in found} == {None, 384.0, 512.0}
    limited = reader_of_words(limit=400)
    found = values(read(probe, ask(probe, limited, text))[1])
    assert {x for _, x, _ in found} == {None, 384.0}


def test_nan_is_refused(text: ProbeData, fake: Callable[..., object], ask: Ask, read: Read) -> None:
    engine = fake(lambda tokens: np.full(len(tokens), np.nan), of=text.tokenizer)
    probe = probe_with(per_cell=1)
    with pytest.raises(UnusableAnswer):
        read(probe, ask(probe, engine, text))


def test_items_depend_on_the_seed_and_on_nothing_of_the_subject(text: ProbeData) -> None:
    probe = probe_with(per_cell=2)
    again = replace(text, trained_context=17)
    assert probe.items(text) == probe.items(again)
    assert [i.details["values"] for i in probe.items(text)] != [
        i.details["values"] for i in probe.items(replace(text, seed=1))
    ]


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"contexts": [100]}, "the needles take"),
        ({"contexts": [60_000]}, "haystack: made_up"),
        ({"longest_needle": 8}, "needle: made_up"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_a_way_out(
    text: ProbeData, settings: dict[str, object], rule: str
) -> None:
    with pytest.raises(UserError, match=rule):
        probe_with(**settings).items(text)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"needles": 5}, "one needle a depth"),
        ({"candidates": 3}, "at least as many candidates as needles"),
        ({"contexts": [32]}, "lengths from 64 on"),
        ({"contexts": [0, 256]}, "lengths from 64 on"),
        ({"contexts": []}, "lengths from 64 on"),
        ({"values": []}, "number, name"),
    ],
)
def test_settings_that_no_text_could_serve_are_refused_when_they_are_read(
    settings: dict[str, object], rule: str
) -> None:
    with pytest.raises(UserError, match=rf"probes\.needle: [^$]*{rule}"):
        probe_with(**settings)


def test_a_number_that_goes_on_is_another_number() -> None:
    assert is_exact(" 4711", "4711")
    assert is_exact("4711. The", "4711")
    assert not is_exact("47112", "4711")
    assert not is_exact("It is 4711", "4711")
    assert not is_exact("", "4711")


def test_made_up_values_are_plain_and_different() -> None:
    rng = np.random.default_rng(0)
    assert all(made_up.name(rng).isalpha() and made_up.number(rng, 5).isdigit() for _ in range(50))
    assert len({*made_up.distinct(lambda: made_up.name(rng), 500)}) == 500
    with pytest.raises(ValueError, match="only 9 of 10"):
        made_up.distinct(lambda: made_up.number(rng, 1), 10)


@pytest.mark.parametrize("way", ["likelihood", "generation"])
def test_describing_names_the_needle_the_question_and_the_answer(text: ProbeData, way: str) -> None:
    probe = probe_with(ways=[way], questions="one")
    item = probe.items(text)[0]
    shown = probe.describe(item, text)
    value = item.details["values"][item.details["asked"][0]]
    assert shown.expected.endswith(value)
    assert shown.asked.count(value) == 2


def test_describing_shows_every_question_of_an_item(text: ProbeData) -> None:
    probe = probe_with(ways=["likelihood"], needles=3)
    item = next(item for item in probe.items(text) if len(item.details["asked"]) > 1)
    shown = probe.describe(item, text)
    for place, question in zip(item.details["asked"], probe.asked(item, text), strict=True):
        assert f"[{question.truth + 1}] {item.details['values'][place]}" in shown.expected
        assert f"at {100 * item.details['depths'][place]:.0f} %" in shown.asked
