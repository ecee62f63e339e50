"""The tasks are what was published, and what cannot be asked is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.corpus.packing import IGNORE
from longspan.corpus.tasks import make_task, registered
from longspan.corpus.tasks.strings import once
from longspan.foundation.errors import UserError

from .tiny_tasks import SMALL, draw, task_of, text

LETTERS = ("copy", "prefix_ngram", "suffix_ngram", "duplicate_ngram")


def test_every_task_is_tried_here() -> None:
    assert set(SMALL) == {
        name for name, kind in registered().items() if not kind.__module__.startswith("longspan_plugin")
    }


@pytest.mark.parametrize("name", SMALL)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_laws_of_every_task(name: str, seed: int) -> None:
    task = task_of(name)
    example, again = draw(task, seed), draw(task, seed)
    vocabulary = task.vocabulary()
    size = example.slices[task.axis]
    assert np.array_equal(example.inputs, again.inputs)
    assert np.array_equal(example.labels, again.labels)
    assert example.inputs.dtype == example.labels.dtype == np.int32
    assert len(example.inputs) == len(example.labels) <= task.span(size)
    assert 0 <= example.inputs.min() <= example.inputs.max() < len(vocabulary.symbols)
    assert vocabulary.pad not in example.inputs
    assert len(set(vocabulary.symbols)) == len(vocabulary.symbols)
    assert len(example.answer) > 0
    assert np.all((example.answer >= 0) & (example.answer < len(vocabulary.symbols)))
    assert task.marked == (example.inputs[0] == vocabulary.boundary)
    assert list(example.inputs).count(vocabulary.boundary) == int(task.marked)
    # What is to be said is never shown before it is asked for, at its own place.
    shown_next = example.inputs[1:][example.labels[:-1] != IGNORE]
    asked = example.labels[:-1][example.labels[:-1] != IGNORE]
    assert np.array_equal(shown_next == asked, example.fed_back[1:][example.labels[:-1] != IGNORE])


@pytest.mark.parametrize("name", LETTERS)
def test_the_published_alphabet_has_30_ids(name: str) -> None:
    symbols = task_of(name).vocabulary().symbols
    assert "".join(symbols) == "abcdefghijklmnopqrstuvwxyz$|.*"


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_copy_is_the_string_twice(seed: int) -> None:
    task = task_of("copy")
    example = draw(task, seed)
    whole = text(task, example.inputs)
    string = whole[1 : whole.index("|")]
    assert whole == f"${string}|{string}."
    assert 5 <= len(string) <= 20
    assert text(task, example.answer) == f"{string}."
    # Loss begins at the bar and ends before the end sign.
    assert np.array_equal(np.flatnonzero(example.labels != IGNORE), np.arange(len(string) + 1, 2 * len(string) + 2))


@pytest.mark.parametrize("name", ["prefix_ngram", "suffix_ngram"])
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.sampled_from([None, 1, 3]))
def test_the_query_occurs_once_and_the_answer_follows_it(name: str, seed: int, cut: int | None) -> None:
    task = task_of(name, length_answer=cut)
    example = draw(task, seed)
    parts = text(task, example.inputs)[1:].split("|")
    n = example.slices["ngram"]
    if name == "prefix_ngram":
        gram, string, rest = parts
    else:
        string, rest = parts[0], parts[1][n:]
        gram = parts[1][:n]
        assert 2 <= n <= 4
    assert len(gram) == n
    places = [i for i in range(len(string) - n + 1) if string[i : i + n] == gram]
    assert len(places) == 1
    follows = string[places[0] + n :][: cut or len(string)]
    assert follows
    assert rest == f"{follows}."
    assert text(task, example.answer) == rest


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 4))
def test_unique_ngrams_are_those_that_a_plain_search_finds(string: list[int], n: int) -> None:
    grams = [tuple(string[i : i + n]) for i in range(len(string) - n + 1)]
    expected = [i for i, gram in enumerate(grams) if grams.count(gram) == 1 and i + n < len(string)]
    assert once(np.array(string, np.int32), n).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_duplicate_ngram_holds_one_twice(seed: int) -> None:
    task = task_of("duplicate_ngram", vocab_size=26)
    whole = text(task, draw(task, seed).inputs)
    string = whole[1 : whole.index("|")]
    assert whole == f"${string}|{string}."
    apart = [
        (i, j)
        for i in range(len(string) - 1)
        for j in range(i + 2, len(string) - 1)
        if string[i : i + 2] == string[j : j + 2]
    ]
    assert apart


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_induction_asks_for_what_followed_the_special_token(seed: int) -> None:
    example = draw(task_of("induction"), seed)
    special = np.flatnonzero(example.inputs == 16)
    assert len(special) == 2
    assert special[1] == len(example.inputs) - 1
    assert example.answer.tolist() == [example.inputs[special[0] + 1]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_selective_copy_asks_for_the_tokens_in_order(seed: int) -> None:
    example = draw(task_of("selective_copy"), seed)
    assert np.array_equal(example.answer, example.inputs[example.inputs < 16])
    assert len(example.answer) == 4
    assert np.all(example.inputs[-4:] == 17)


# --- curriculum -------------------------------------------------------------------------------------------------------


def test_a_growing_curriculum_ends_at_the_whole_range() -> None:
    task = task_of("copy", curriculum={"kind": "grow", "short": 6, "steps": 100})
    generator = np.random.default_rng(0)
    early, middle, late = ({task.draw_size(generator, step) for _ in range(600)} for step in (0, 50, 100))
    assert early == {5, 6}
    assert middle == set(range(5, 14))
    assert late == set(range(5, 21))


def test_a_mixed_curriculum_draws_its_share_short() -> None:
    task = task_of("copy", curriculum={"kind": "mix", "short": 5, "share": 0.5})
    sizes = np.array([task.draw_size(np.random.default_rng(i), 7) for i in range(2000)])
    assert abs((sizes == 5).mean() - (0.5 + 0.5 / 16)) < 0.05
    assert sizes.max() == 20


def test_validation_has_no_curriculum() -> None:
    grown = task_of("copy", curriculum={"kind": "grow", "short": 6, "steps": 100})
    sizes = {grown.draw_size(np.random.default_rng(i), None) for i in range(300)}
    assert max(sizes) == 20


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("copy", {"min_length": 21}, r"min_length = 21 with max_length = 20: no length lies between"),
        ("copy", {"vocab_size": 1}, "vocab_size = 1 letters"),
        ("copy", {"vocab_size": 63}, "2 to 62 letters"),
        ("copy", {"curriculum": {"kind": "grow", "short": 30, "steps": 5}}, "curriculum.short = 30"),
        ("copy", {"curriculum": {"kind": "grow", "short": 6}}, "without `steps`"),
        ("copy", {"curriculum": {"kind": "mix", "short": 6, "share": 0.5, "steps": 2}}, "`steps` with a curriculum"),
        ("suffix_ngram", {"ngram": [4, 2]}, "min_ngram = 4 with max_ngram = 2"),
        ("prefix_ngram", {"ngram": 5}, "ngram = 5 in strings from 5"),
        ("duplicate_ngram", {"ngram": 3}, "two 3-grams"),
        ("selective_copy", {"tokens": 13}, "13 tokens among 12 places"),
        ("induction", {"min_length": 40}, "no length lies between"),
        ("copy", {"max_lenght": 9}, "did you mean `max_length`"),
    ],
)
def test_what_cannot_be_is_refused_with_the_rule(name: str, given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        task_of(name, **given)


def test_a_range_of_one_length_is_a_range() -> None:
    """Asked from 20 to 20, the published command evaluates nothing."""
    assert task_of("copy", min_length=20).sizes() == (20,)


def test_a_size_that_has_no_example_is_refused() -> None:
    with pytest.raises(UserError, match="holds a 2-gram that occurs once"):
        draw(task_of("prefix_ngram", ngram=2, vocab_size=2), 0, size=200)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean `copy`"):
        make_task({"task": "copi"}, "corpus")


@pytest.mark.parametrize("name", SMALL)
def test_the_tokenizer_writes_and_reads_every_string(name: str) -> None:
    task = task_of(name)
    tokenizer, ids = task.tokenizer(), draw(task, 1).inputs
    own = ids[1:] if task.marked else ids
    written = tokenizer.decode(own)
    assert np.array_equal(tokenizer.encode(written), own)
    assert tokenizer.vocab_size == len(task.vocabulary().symbols)
