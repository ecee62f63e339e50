"""Claims about entity recurrence: one mention is replaced, nothing else moves, and who does not look back gains 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from longspan.engines.base import Tokens
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.probes.base import ProbeData, make_probe
from longspan.probes.entity_recurrence import LEAD, EntityRecurrence
from longspan.probes.mentions import read
from longspan.records.observation import Summary
from longspan.records.store import Record

Ask = Callable[..., list[Record]]
Read = Callable[..., tuple[list[object], Summary]]


def probe_with(**settings: object) -> EntityRecurrence:
    probe = make_probe("entity_recurrence", {"min_documents": 3, "longest": 512, **settings})
    assert isinstance(probe, EntityRecurrence)
    return probe


def test_the_earlier_mention_is_replaced_and_nothing_else_moves(text: ProbeData) -> None:
    probe = probe_with()
    items = probe.items(text)
    assert len(items) > 20
    for item in items:
        kept, replaced = probe.texts(item, text)
        lead, size = item.details["lead"], item.details["size"]
        assert len(kept) == len(replaced) == lead + item.details["distance"] + size
        changed = np.flatnonzero(kept != replaced)
        assert set(changed.tolist()) <= set(range(lead, lead + size))
        assert kept[lead] != replaced[lead]
        assert kept[lead : lead + size].tolist() == kept[-size:].tolist()


def test_no_other_mention_lies_in_the_text_and_the_replacement_is_not_of_the_document(text: ProbeData) -> None:
    probe = probe_with()
    for item in probe.items(text):
        kept, _ = probe.texts(item, text)
        word = text.tokenizer.decode(kept[-item.details["size"] :]).strip().lower()
        instead = text.tokenizer.decode(np.array(item.details["ids"])).strip()
        assert text.tokenizer.decode(kept).lower().count(word) == 2
        whole = text.tokenizer.decode(text.shards.document(item.document)).lower()
        assert instead.lower() not in whole
        assert whole.count(word) >= 2


def test_a_word_is_replaced_by_one_of_its_kind(text: ProbeData) -> None:
    for item in probe_with().items(text):
        instead = text.tokenizer.decode(np.array(item.details["ids"])).strip()
        assert (
            item.details["kind"] == "number"
            if instead[0].isdigit()
            else instead[0].isupper() == (item.details["kind"] == "name")
        )


def test_distances_lie_in_their_bins_and_are_known_to_the_records(
    text: ProbeData, reader_of_words: Callable[..., NativeEngine], ask: Ask, read: Read
) -> None:
    probe = probe_with()
    items = probe.items(text)
    assert {tuple(i.details["bin"]) for i in items} <= {(64, 128), (128, 256), (256, 512)}
    assert all(i.details["bin"][0] <= i.details["distance"] < i.details["bin"][1] for i in items)
    _, summary = read(probe, ask(probe, reader_of_words(), text))
    assert {m.x for m in summary.measurements} <= {90.5, 181.0, 362.0}
    assert {m.metric for m in summary.measurements} == {"gain", "word_gain", "nll"}


def test_a_subject_that_looks_back_less_far_gains_nothing(
    text: ProbeData, fake: Callable[..., object], ask: Ask, read: Read
) -> None:
    rng = np.random.default_rng(0)
    pairs = rng.random((text.tokenizer.vocab_size, text.tokenizer.vocab_size)) * 9

    def bigram(sequences: Sequence[Tokens], doc_ids: object = None) -> list[np.ndarray]:
        return [pairs[sequence[:-1], sequence[1:]] for sequence in sequences]

    engine = fake(of=text.tokenizer)
    engine.nll = bigram  # type: ignore[attr-defined]
    probe = probe_with()
    observations, summary = read(probe, ask(probe, engine, text))
    gains = [o.numerator for o in observations if o.metric in ("gain", "word_gain")]  # type: ignore[attr-defined]
    assert gains
    assert set(gains) == {0.0}
    assert all(m.value > 0 for m in summary.measurements if m.metric == "nll")


def test_a_subject_that_remembers_words_gains_at_every_distance(
    text: ProbeData, fake: Callable[..., object], ask: Ask, read: Read
) -> None:
    def memory(sequences: Sequence[Tokens], doc_ids: object = None) -> list[np.ndarray]:
        return [np.array([0.5 if t in s[: i + 1] else 3.0 for i, t in enumerate(s[1:])]) for s in sequences]

    engine = fake(of=text.tokenizer)
    engine.nll = memory  # type: ignore[attr-defined]
    probe = probe_with()
    observations, summary = read(probe, ask(probe, engine, text))
    assert all(o.numerator in (0.0, 2.5) for o in observations if o.metric == "gain")  # type: ignore[attr-defined]
    gains = {m.x: m.value for m in summary.measurements if m.metric == "gain"}
    assert gains
    assert min(gains.values()) > 0


def test_what_a_subject_cannot_take_is_left_out(
    text: ProbeData, reader_of_words: Callable[..., NativeEngine], ask: Ask
) -> None:
    probe = probe_with()
    records = ask(probe, reader_of_words(limit=200), text)
    asked = {record.item for record in records if "kept" in record.answer}
    short = {i.id for i in probe.items(text) if i.details["lead"] + i.details["distance"] + i.details["size"] <= 201}
    assert asked == short
    assert 0 < len(asked) < len(records)


def test_a_document_has_no_more_than_its_share(text: ProbeData) -> None:
    probe = probe_with(per_bin=10, kinds=["name"])
    for span in {tuple(i.details["bin"]) for i in probe.items(text)}:
        inside = [i.document for i in probe.items(text) if tuple(i.details["bin"]) == span]
        assert len(inside) <= 10
        assert max(inside.count(d) for d in inside) <= -(-10 // len(set(inside))) + 1


def test_text_without_recurrences_is_refused_with_numbers(data_of: Callable[..., ProbeData]) -> None:
    with pytest.raises(UserError, match="no distance has recurrences in 3 or more documents; the best has 0 of 2"):
        probe_with().items(data_of("the old road lay there. " * 40, "a plain field was wide. " * 40))


def test_words_are_read_with_the_tokens_that_spell_them(data_of: Callable[..., ProbeData]) -> None:
    told = "The bridge was old. In it Velmora, 12,345 and 9 and O'Brien saw Velmora's boat; café Zeld."
    data = data_of(told)
    document = data.shards.document(0)
    found = read(document, data.tokenizer)
    assert found is not None
    assert [(m.word, m.kind) for m in found.mentions] == [
        ("bridge", "word"), ("was", "word"), ("old", "word"), ("Velmora", "name"), ("12,345", "number"),
        ("and", "word"), ("and", "word"), ("saw", "word"), ("boat", "word"), ("Zeld", "name"),
    ]  # fmt: skip
    for mention in found.mentions:
        assert data.tokenizer.decode(np.array(mention.ids)).strip() == mention.word
        assert document[mention.start : mention.stop].tolist() == list(mention.ids)
    assert found.holds("velmora", found.mentions[4].start)
    assert not found.holds("velmora", 0, found.mentions[2].stop)
    assert LEAD < 64
