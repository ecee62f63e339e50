"""Batches of tasks are those published, resume exactly, and the defects of earlier codes cannot come back."""

from __future__ import annotations

import numpy as np
import pytest

from longspan.corpus.packing import IGNORE, PackingConfig
from longspan.corpus.tasks import Task, TaskBatches, validation_batches
from longspan.foundation.errors import UserError

from .tiny_tasks import SMALL, task_of, text


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


def test_a_context_too_short_for_the_longest_string_is_refused() -> None:
    with pytest.raises(UserError, match="at least 43 positions"):
        batches(task_of("copy"), context=42)
    assert next(batches(task_of("copy"), context=43)).samples


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
