"""Removal of duplicates within and across splits."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.corpus.dedup import DedupConfig, Deduplicator, DedupResult, band_rows, normalise, signature
from longspan.corpus.document import Document
from longspan.corpus.sources import SotuSource, SyntheticSource
from longspan.foundation.errors import DataError


def run(folder: Path, documents: Iterable[tuple[str, str, str]], **settings: object) -> DedupResult:
    with Deduplicator(DedupConfig.model_validate(settings), folder) as deduplicator:
        for name, split, text in documents:
            deduplicator.add(Document(name, text), split)
        return deduplicator.finish()


def words(generator: np.random.Generator, count: int) -> list[str]:
    return [f"w{i}" for i in generator.integers(0, 100_000, count)]


def true_jaccard(a: list[str], b: list[str], size: int = 5) -> float:
    x = {tuple(a[i : i + size]) for i in range(len(a) - size + 1)}
    y = {tuple(b[i : i + size]) for i in range(len(b) - size + 1)}
    return len(x & y) / len(x | y)


@pytest.mark.parametrize("order", [("train", "test"), ("test", "train"), ("train", "validation")])
def test_when_a_pair_spans_splits_the_training_copy_goes(tmp_path: Path, order: tuple[str, str]) -> None:
    result = run(tmp_path, [(split, split, "the same  TEXT\nhere") for split in order])
    assert [split for split, keep in zip(order, result.keep, strict=True) if not keep] == ["train"]
    assert result.across_splits == 1
    assert result.counts == {"exact": {"train": 1}}
    assert result.examples[0].dropped == "train"


def test_test_is_kept_before_validation(tmp_path: Path) -> None:
    result = run(tmp_path, [("a", "validation", "x y z"), ("b", "test", "x y z"), ("c", "test", "x y z")])
    assert result.keep.tolist() == [False, True, False]
    assert {(example.dropped, example.kept) for example in result.examples} == {("a", "b"), ("c", "b")}


def test_near_duplicates_go_and_others_stay(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    original = words(generator, 1000)
    near, far = original.copy(), original.copy()
    near[500:505] = words(generator, 5)
    far[::12] = words(generator, len(far[::12]))
    assert true_jaccard(original, near) > 0.97
    assert true_jaccard(original, far) < 0.5
    documents = [
        ("near", "train", " ".join(near)),
        ("original", "test", " ".join(original)),
        ("far", "train", " ".join(far)),
        ("other", "train", " ".join(words(generator, 1000))),
    ]
    result = run(tmp_path, documents)
    assert result.keep.tolist() == [False, True, True, True]
    (example,) = result.examples
    assert (example.reason, example.dropped, example.kept) == ("near", "near", "original")
    assert example.similarity == pytest.approx(true_jaccard(original, near), abs=0.06)
    assert run(tmp_path / "off", documents, near=False).keep.all()


def test_the_signature_estimates_the_jaccard_similarity() -> None:
    generator = np.random.default_rng(1)
    config = DedupConfig(num_hashes=512)
    for changed in (3, 10, 30, 100):
        a = words(generator, 600)
        b = a.copy()
        b[:: 600 // changed] = words(generator, len(b[:: 600 // changed]))
        estimate = (signature(" ".join(a), config) == signature(" ".join(b), config)).mean()
        assert estimate == pytest.approx(true_jaccard(a, b), abs=0.07)


def test_no_two_documents_that_stay_are_near_duplicates(tmp_path: Path) -> None:
    """A chain a ~ b ~ c loses b only where a and c differ: what stays is compared with what stayed."""
    generator = np.random.default_rng(2)
    config = DedupConfig()
    documents = []
    for family in range(10):
        text = words(generator, 300)
        for member in range(8):
            text = text.copy()
            text[member * 30] = "changed"
            documents.append((f"{family}-{member}", ("train", "validation", "test")[member % 3], " ".join(text)))
    result = run(tmp_path, documents)
    kept = [
        signature(normalise(text), config) for (_, _, text), keep in zip(documents, result.keep, strict=True) if keep
    ]
    similar = [(a == b).mean() for i, a in enumerate(kept) for b in kept[:i]]
    assert len(kept) >= 10
    assert max(similar) < config.threshold


def test_one_id_with_two_texts_is_refused_and_a_repeated_document_counts_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"id 'a' and different texts"):
        run(tmp_path / "1", [("a", "train", "one"), ("b", "train", "x"), ("a", "train", "two")])
    result = run(tmp_path / "2", [("a", "train", "one"), ("a", "train", "one")], exact=False, near=False)
    assert result.counts == {"repeated": {"train": 1}}


def test_the_decision_does_not_depend_on_the_order_within_better_protected_splits(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    text = " ".join(words(generator, 200))
    documents = [(f"{i}", "test" if i == 5 else "train", text if i % 2 else f"{text} tail{i}") for i in range(8)]
    forward = run(tmp_path / "a", documents)
    backward = run(tmp_path / "b", documents[::-1])
    assert [i for i in range(8) if forward.keep[i]] == [i for i in range(8) if backward.keep[::-1][i]] == [5]
    again = run(tmp_path / "c", documents)
    assert again.report() == forward.report()


def test_bands_find_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.95):
        config = DedupConfig(threshold=threshold)
        rows = band_rows(config)
        assert 1 - (1 - threshold**rows) ** (config.num_hashes // rows) >= 0.99


@given(st.text(st.characters(max_codepoint=127)))
def test_normalising_is_blind_to_space_and_case(text: str) -> None:
    assert normalise(f"  {text.upper()}\n") == normalise(text.lower()) == normalise(normalise(text))


def test_speeches_hold_no_duplicates_and_a_planted_copy_is_found(tmp_path: Path) -> None:
    speeches = list(SotuSource(max_documents=60).documents(tmp_path))
    planted = [(d.id, "train", d.text) for d in speeches] + [
        ("copy", "test", speeches[7].text.replace("the ", "the  "))
    ]
    result = run(tmp_path / "d", planted)
    assert [planted[i][0] for i in np.flatnonzero(~result.keep)] == [speeches[7].id]


def test_generated_stories_are_distinct(tmp_path: Path) -> None:
    stories = SyntheticSource(num_documents=50).documents(tmp_path)
    assert run(tmp_path / "d", ((d.id, "train", d.text) for d in stories)).keep.all()


def test_no_documents_and_documents_without_words_are_no_trouble(tmp_path: Path) -> None:
    assert len(run(tmp_path / "a", []).keep) == 0
    assert run(tmp_path / "b", [("a", "train", ""), ("b", "train", "word")]).keep.all()
