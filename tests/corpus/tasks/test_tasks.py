"""The tasks are what was published, and the defects of earlier codes for them cannot come back."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.corpus.packing import IGNORE, PackingConfig
from longspan.corpus.tasks import Example, Task, TaskBatches, make_task, registered, validation_batches
from longspan.corpus.tasks.strings import once
from longspan.foundation.errors import UserError

SMALL: dict[str, dict[str, object]] = {
    "copy": {},
    "prefix_ngram": {"ngram": 3},
    "suffix_ngram": {"ngram": [2, 4]},
    "duplicate_ngram": {"ngram": 2},
    "mqar": {"vocab_size": 128, "length": 64, "pairs": [4, 8]},
    "induction": {"min_length": 16, "max_length": 32},
    "selective_copy": {"tokens": 4, "min_length": 12, "max_length": 20},
}
LETTERS = ("copy", "prefix_ngram", "suffix_ngram", "duplicate_ngram")


def task_of(name: str, **more: object) -> Task:
    return make_task({"task": name, **SMALL[name], **more}, "corpus")


def draw(task: Task, seed: int, size: int | None = None) -> Example:
    generator = np.random.default_rng(seed)
    return task.example(generator, task.draw_size(generator, 0) if size is None else size)


def text(task: Task, ids: np.ndarray) -> str:
    symbols = task.vocabulary().symbols
    return task.vocabulary().separator.join(symbols[i] for i in ids)


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
@given(seed=st.integers(0, 10**6), filler=st.sampled_from([0, 16]))
def test_mqar_is_that_of_zoology(seed: int, filler: int) -> None:
    task = task_of("mqar", filler=filler)
    example = draw(task, seed)
    n = example.slices["pairs"]
    keys, values = example.inputs[0 : 2 * n : 2], example.inputs[1 : 2 * n : 2]
    assert len(set(keys)) == len(set(values)) == n
    assert keys.min() >= 1
    assert keys.max() < 64
    assert values.min() >= 64
    assert values.max() < 128
    places = np.flatnonzero(example.labels != IGNORE)
    assert len(places) == n
    assert np.all(places % 2 == 0)
    assert places.min() >= 2 * n
    # Every key once, with the value that stood beside it.
    of = dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert sorted(example.inputs[places]) == sorted(keys)
    assert all(of[int(example.inputs[p])] == example.labels[p] for p in places)
    rest = np.delete(example.inputs[2 * n :], places - 2 * n)
    assert np.all(rest == 0) if filler == 0 else np.all(rest >= 128)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([1, 4, 12]))
def test_with_a_border_every_row_of_mqar_turns_at_the_same_place(seed: int, size: int) -> None:
    task = task_of("mqar", pairs=[1, 4, 12], border=30)
    example = draw(task, seed, size)
    keys, values = example.inputs[30 - 2 * size : 30 : 2], example.inputs[31 - 2 * size : 30 : 2]
    assert np.all(example.inputs[: 30 - 2 * size] == 0)
    assert np.all(example.labels[:30] == IGNORE)
    asked = np.flatnonzero(example.labels != IGNORE)
    of = dict(zip(keys.tolist(), values.tolist(), strict=True))
    assert sorted(example.inputs[asked]) == sorted(keys)
    assert all(of[int(example.inputs[p])] == example.labels[p] for p in asked)
    assert task.handover() == 30
    assert task_of("mqar").handover() is None


def test_rows_of_every_number_of_pairs_ask_as_many_questions_where_that_is_asked_for() -> None:
    task, generator = task_of("mqar", pairs=[1, 4, 16], balance="questions"), np.random.default_rng(0)
    drawn = np.array([task.draw_size(generator, 0) for _ in range(4000)])
    for size in (1, 4, 16):
        assert abs(drawn[drawn == size].sum() / drawn.sum() - 1 / 3) < 0.04
    grown = task_of("mqar", pairs=[1, 4, 16], balance="questions", curriculum={"kind": "grow", "short": 4, "steps": 9})
    assert {grown.draw_size(generator, 0) for _ in range(40)} == {1, 4}


def test_values_of_mqar_that_are_drawn_by_themselves_are_all_equally_likely() -> None:
    task = task_of("mqar", vocab_size=10, pairs=[4], length=16, distinct=False)
    drawn = np.array([draw(task, seed).answer for seed in range(2000)])
    assert set(np.unique(drawn)) == {5, 6, 7, 8, 9}
    # Four values of five are distinct in 19 % of all rows, and the bits are all there.
    alone = np.mean([len(set(row)) == 4 for row in drawn.tolist()])
    assert abs(alone - 120 / 625) < 0.04
    assert task.bits(4) == 4 * math.log2(5)
    assert task.most_right(4, task.bits(4)) == 1.0
    assert task.most_right(4, task.bits(4) - 1) < 1.0
    # Distinct ones are less to remember.
    exact = math.log2(math.perm(64, 8))
    assert task_of("mqar").most_right(8, exact - 0.1) < 1.0 == task_of("mqar").most_right(8, exact + 1e-9)
    assert exact < task_of("mqar").bits(8)


def test_gaps_of_mqar_follow_the_power_law() -> None:
    task = task_of("mqar", pairs=[1])
    firsts = [int(np.flatnonzero(draw(task, seed).labels != IGNORE)[0]) for seed in range(2000)]
    gaps = (np.array(firsts) - 2) // 2
    shares = 0.01 * np.arange(1, 32) ** (0.01 - 1)
    shares /= shares.sum()
    for gap in (0, 1, 5):
        assert abs((gaps == gap).mean() - shares[gap]) < 4 * math.sqrt(shares[gap] / 2000)


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


# --- batches ----------------------------------------------------------------------------------------------------------


def batches(task: Task, seed: int = 0, context: int = 64, **packing: object) -> TaskBatches:
    return TaskBatches(task, PackingConfig(**packing), context=context, rows=4, seed=seed)


def test_rows_are_packed_as_published_and_the_cut_string_has_no_loss() -> None:
    task = task_of("copy")
    batch = next(batches(task))
    assert batch.tokens.shape == (4, 64)
    for tokens, targets, doc in zip(batch.tokens, batch.targets, batch.doc_id, strict=True):
        pieces = ["$" + piece for piece in text(task, tokens).split("$")[1:]]
        assert [len(piece) for piece in pieces] == np.bincount(doc).tolist()
        for number, piece in enumerate(pieces):
            scored = targets[doc == number]
            whole = piece.endswith(".")
            assert whole or number == len(pieces) - 1
            if whole:
                answer = piece[piece.index("|") + 1 :]
                assert text(task, scored[scored != IGNORE]) == answer
            else:
                assert np.all(scored == IGNORE)
    assert batch.samples == sum(text(task, tokens).count(".") for tokens in batch.tokens)


def test_the_answer_stands_in_the_input_where_it_is_read_back_in() -> None:
    """An earlier code hid it behind padding, which turned copying into a task of counting positions."""
    trained = next(batches(task_of("copy")))
    validated = next(validation_batches(task_of("copy"), PackingConfig(), context=64, rows=4, strings=8))
    for batch in (trained, validated):
        scored = batch.targets[:, :-1] != IGNORE
        assert scored.any()
        assert np.array_equal(batch.tokens[:, 1:][scored], batch.targets[:, :-1][scored])


def test_no_batch_comes_twice() -> None:
    """An earlier code drew a thousand batches and went round and round."""
    stream = TaskBatches(task_of("copy"), PackingConfig(), context=43, rows=1, seed=0)
    seen = {next(stream).tokens.tobytes() for _ in range(1100)}
    assert len(seen) == 1100


@pytest.mark.parametrize("name", [name for name in SMALL if name != "duplicate_ngram"])
@pytest.mark.parametrize("method", ["concat", "one_per_row"])
def test_going_on_from_any_place_is_as_if_never_stopped(name: str, method: str) -> None:
    straight, stopped = batches(task_of(name), method=method), batches(task_of(name), method=method)
    first = [next(straight) for _ in range(6)]
    for _ in range(3):
        next(stopped)
    resumed = batches(task_of(name), method=method)
    resumed.load_state_dict(stopped.state_dict())
    for batch in first[3:]:
        again = next(resumed)
        for part in ("tokens", "targets", "doc_id"):
            assert np.array_equal(getattr(batch, part), getattr(again, part))
    assert resumed.ledger() == straight.ledger()
    assert resumed.ledger()["strings"] == sum(batch.samples for batch in first)


def test_a_place_in_other_data_is_refused() -> None:
    state = batches(task_of("copy")).state_dict()
    with pytest.raises(UserError, match="max_length"):
        batches(task_of("copy", max_length=21)).load_state_dict(state)


def test_seeds_give_other_strings_and_nothing_else_does() -> None:
    """An earlier code drew from one global stream: what a model saw depended on what ran before."""
    one = next(batches(task_of("copy"), seed=1)).tokens
    np.random.seed(5)  # noqa: NPY002
    assert np.array_equal(one, next(batches(task_of("copy"), seed=1)).tokens)
    assert not np.array_equal(one, next(batches(task_of("copy"), seed=2)).tokens)


def test_filler_comes_from_the_given_generator() -> None:
    """The published code of MQAR draws it from a global one."""
    task = task_of("mqar", filler=16)
    assert np.array_equal(draw(task, 3).inputs, draw(task, 3).inputs)
    assert not np.array_equal(draw(task, 3).inputs, draw(task, 4).inputs)


def test_one_per_row_pads_and_says_so() -> None:
    batch = next(batches(task_of("copy"), method="one_per_row"))
    pad = task_of("copy").vocabulary().pad
    assert np.array_equal(batch.doc_id < 0, batch.tokens == pad)
    assert batch.samples == 4
    assert np.all(batch.targets[batch.doc_id < 0] == IGNORE)


@pytest.mark.parametrize("method", ["concat", "one_per_row"])
def test_validation_is_fixed_whole_and_numbered(method: str) -> None:
    task, packing = task_of("copy"), PackingConfig(method=method)
    found = list(validation_batches(task, packing, context=64, rows=4, strings=50))
    again = list(validation_batches(task, packing, context=64, rows=4, strings=50))
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(found, again, strict=True))
    numbers = np.concatenate([batch.doc_id[batch.targets != IGNORE] for batch in found])
    assert sorted(set(numbers.tolist())) == list(range(50))
    assert sum(batch.samples for batch in found) == 50


def test_validation_strings_are_the_same_however_they_are_laid_out() -> None:
    task = task_of("copy")
    sets = []
    for method, context in (("concat", 64), ("one_per_row", 50)):
        found = validation_batches(task, PackingConfig(method=method), context=context, rows=4, strings=30)
        rows = [(b.tokens[b.doc_id == n], n) for b in found for n in np.unique(b.doc_id[b.doc_id >= 0])]
        sets.append([text(task, tokens) for tokens, _ in sorted(rows, key=lambda row: row[1])])
    assert sets[0] == sets[1]


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
        ("mqar", {"pairs": [17]}, r"17 pairs in 64 positions\n.*4 x pairs <= length: at most 16"),
        ("mqar", {"vocab_size": 64}, "vocab_size = 64 for rows of 64"),
        ("mqar", {"length": 63}, "an even number of positions"),
        ("mqar", {"pairs": []}, "one or more numbers of pairs"),
        ("mqar", {"border": 31}, r"border = 31 in rows of 64\n.*an even number below the length"),
        ("mqar", {"border": 64}, "border = 64 in rows of 64"),
        ("mqar", {"border": 14}, r"8 pairs with the border at 14 of 64 positions\n.*at most 7 pairs"),
        ("mqar", {"border": 50}, "8 pairs with the border at 50 of 64 positions"),
        ("mqar", {"vocab_size": 17, "distinct": False}, "vocab_size = 17 for rows of 64"),
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


def test_a_context_too_short_for_the_longest_string_is_refused() -> None:
    with pytest.raises(UserError, match="at least 43 positions"):
        batches(task_of("copy"), context=42)
    assert next(batches(task_of("copy"), context=43)).samples


def test_a_size_that_has_no_example_is_refused() -> None:
    with pytest.raises(UserError, match="17 pairs in 64 positions"):
        draw(task_of("mqar"), 0, size=17)
    with pytest.raises(UserError, match="holds a 2-gram that occurs once"):
        draw(task_of("prefix_ngram", ngram=2, vocab_size=2), 0, size=200)


@pytest.mark.parametrize(
    ("packing", "words"),
    [
        ({"method": "best_fit"}, "packing.method = best_fit"),
        ({"overlap": 4}, "packing.overlap"),
        ({"isolation": "none", "loss_crosses_boundary": True}, "packing.loss_crosses_boundary"),
    ],
)
def test_a_packing_without_meaning_is_refused(packing: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        batches(task_of("copy"), **packing)


def test_a_task_for_asking_is_not_trained_on() -> None:
    with pytest.raises(UserError, match="for asking only"):
        batches(task_of("duplicate_ngram"))


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
