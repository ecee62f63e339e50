"""The order of a scan visits every token once, after the one before it in its document."""

from __future__ import annotations

import itertools

import pytest
import torch

from longspan.ops.scan_order import ScanOrder, before_each


@pytest.mark.parametrize("chance", [None, 0.0, 0.2, 1.0])
def test_each_step_takes_the_next_token_of_every_document_that_goes_on(chance, documents):
    batch, time = 3, 19
    doc = None if chance is None else documents(batch, time, chance)
    order = ScanOrder.build(doc, batch, time, torch.device("cpu"))
    assert sorted(order.tokens.tolist()) == list(range(batch * time))
    steps = order.tokens.split(order.sizes)
    assert torch.equal(steps[0], order.first)
    for earlier, later in itertools.pairwise(steps):
        assert torch.equal(later, earlier[: len(later)] + 1)
    ids = torch.zeros(batch, time) if doc is None else doc
    begins = torch.ones(batch, time, dtype=torch.bool)
    begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
    assert sorted(order.first.tolist()) == begins.flatten().nonzero()[:, 0].tolist()
    visited = torch.arange(batch * time).view(batch, time).flatten()[order.tokens]
    assert torch.equal(visited[order.places(batch, time)], torch.arange(batch * time).view(batch, time))


def test_only_the_first_document_of_a_row_meets_the_state_of_the_row():
    doc = torch.tensor([[0, 0, 1, 1, 1], [2, 3, 3, 3, 3]])
    order = ScanOrder.build(doc, 2, 5, torch.device("cpu"))
    start = order.start(torch.tensor([[7.0], [8.0]]), 5)
    assert dict(zip(order.first.tolist(), start[:, 0].tolist(), strict=True)) == {0: 7.0, 2: 0.0, 5: 8.0, 6: 0.0}
    after = order.tokens[:, None].float()
    before = before_each(start, after, order.sizes)[:, 0][order.places(2, 5)]
    assert before.tolist() == [[7, 0, 0, 2, 3], [8, 0, 6, 7, 8]]
