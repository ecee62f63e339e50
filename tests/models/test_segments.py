"""Segments say who may see whom, and find rows of one document before any layer runs."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.models.segments import Past, Segments

DOC = torch.tensor([[4, 4, 4, 7, 7, 9], [1, 2, 2, 2, 2, 2]], dtype=torch.int32)


def test_positions_start_again_with_every_isolated_document():
    expected = [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]
    for isolation in ("full", "attention"):
        assert Segments.build(DOC, isolation).positions.tolist() == expected
    for isolation in ("state", "none"):
        assert Segments.build(DOC, isolation).positions.tolist() == [list(range(6))]


@pytest.mark.parametrize(
    ("isolation", "attention", "state"),
    [("full", True, True), ("attention", True, False), ("state", False, True), ("none", False, False)],
)
def test_isolation_decides_who_gets_document_ids(isolation, attention, state):
    segments = Segments.build(DOC, isolation)
    assert (segments.attention_doc is not None) == attention
    assert (segments.state_doc is not None) == state


@pytest.mark.parametrize("isolation", ["full", "attention", "state", "none"])
def test_rows_of_one_document_take_the_fast_path(isolation):
    doc = torch.tensor([[3] * 5, [8] * 5])
    first = Segments.build(doc, isolation)
    second = Segments.build(doc[:, :2], isolation, past=first.past)
    for segments in (first, second):
        assert segments.attention_doc is segments.state_doc is None
    assert second.positions[0].tolist() == [5, 6]
    assert second.num_keys == 5


def test_without_ids_the_open_document_goes_on():
    first = Segments.build(DOC, "full")
    second = Segments.build(None, "full", shape=(2, 2), past=first.past)
    assert second.positions.tolist() == [[1, 2], [5, 6]]
    assert second.past.last_doc.tolist() == [9, 2]


def test_keys_of_closed_documents_are_dropped_from_the_cache():
    segments = Segments.build(DOC, "full")
    assert segments.past.num_keys == 5  # the second row's document 1 is closed; its document 2 began at index 1
    assert Segments.build(DOC, "none").past.num_keys == 6


def test_a_short_document_before_the_call_keeps_the_slow_path():
    """The convolution still holds inputs of the document before, so its ids are needed for one more call."""
    first = Segments.build(torch.tensor([[1, 1, 1, 2]]), "full")
    second = Segments.build(torch.tensor([[2, 2]]), "full", past=first.past)
    assert second.state_doc is not None
    assert second.attention_doc is None


def test_ids_on_an_accelerator_are_never_read_in_training():
    """The meta device has no values to read, as a stand-in for a device that would have to be waited for."""
    segments = Segments.build(DOC.to("meta"), "full")
    assert segments.positions.shape == DOC.shape
    assert segments.attention_doc is not None


def test_isolation_may_not_change_along_a_state():
    first = Segments.build(DOC, "full")
    with pytest.raises(UserError, match="after calls with 'full'"):
        Segments.build(DOC, "none", past=first.past)


def test_unknown_isolation_is_refused():
    with pytest.raises(UserError, match="isolation = 'documents'"):
        Segments.build(DOC, "documents")


def test_select_repeats_rows():
    past = Segments.build(DOC, "full").past.select(torch.tensor([1, 1, 0]))
    assert past.last_doc.tolist() == [2, 2, 9]
    assert Past().select(torch.tensor([0])) == Past()
