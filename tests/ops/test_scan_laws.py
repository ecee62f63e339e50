"""What holds of every scan: chunks say what the recurrence says, documents are runs of ids, calls go on from states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from .scans import GATED_DELTA, SELECTIVE_SCAN, SSD, Scan, assert_same

of_every_scan = pytest.mark.parametrize(
    "scan", [SSD, SELECTIVE_SCAN, GATED_DELTA], ids=["ssd", "selective_scan", "gated_delta"]
)


@pytest.mark.parametrize(
    ("scan", "sizes"),
    [
        (SSD, {"groups": 1}),
        (SSD, {"groups": 2}),
        (SELECTIVE_SCAN, {}),
        (GATED_DELTA, {"largest_beta": 1.0}),
        (GATED_DELTA, {"largest_beta": 2.0}),
    ],
    ids=["ssd", "ssd, groups", "selective_scan", "gated_delta", "gated_delta, negative"],
)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("chance", [None, 0.05, 0.4, 1.0])
@pytest.mark.parametrize("time", [1, 2, 7, 8, 9, 24, 37])
def test_chunked_equals_the_recurrence_in_values_and_gradients(
    time: int, chance: float | None, with_state: bool, scan: Scan, sizes: dict[str, Any], documents: Any
) -> None:
    given_inputs = scan.inputs(3, time, **sizes)
    doc = initial_doc = None
    if chance is not None:
        doc = documents(3, time, chance, time)
        initial_doc = doc[:, 0].clone()
        initial_doc[0] = 77
    reference = scan.run(given_inputs, doc, initial_doc, backend="reference", with_state=with_state)
    assert_same(scan.run(given_inputs, doc, initial_doc, with_state=with_state), reference)


@of_every_scan
@pytest.mark.parametrize("boundary", [7, 8, 9, 15, 16, 17])
def test_boundaries_on_and_off_chunk_edges(boundary: int, scan: Scan) -> None:
    doc = (torch.arange(24) >= boundary).int().expand(2, -1)
    given_inputs = scan.inputs(2, 24)
    assert_same(scan.run(given_inputs, doc), scan.run(given_inputs, doc, backend="reference"))


@of_every_scan
def test_a_document_is_a_run_of_equal_ids(scan: Scan) -> None:
    doc = torch.tensor([[0, 0, 1, 1, 0, 0, 0, 2, 0, 0]])
    given_inputs = scan.inputs(1, 10)
    assert_same(scan.run(given_inputs, doc, chunk=4), scan.run(given_inputs, doc, chunk=4, backend="reference"))


@of_every_scan
@settings(max_examples=40, deadline=None)
@given(
    time=st.integers(2, 40),
    cut=st.floats(0.0, 1.0),
    chunk=st.integers(1, 12),
    boundaries=st.none() | st.sets(st.integers(1, 39)),
)
def test_two_calls_at_any_split_equal_one(
    scan: Scan, time: int, cut: float, chunk: int, boundaries: set[int] | None
) -> None:
    given_inputs = scan.inputs(2, time, seed=time)
    split = 1 + int(cut * (time - 2))
    doc = None
    if boundaries is not None:
        doc = torch.tensor([[sum(b <= t for b in boundaries) for t in range(time)]] * 2)
    whole = scan.part(given_inputs, doc=doc, chunk=chunk)
    first, state = scan.part(given_inputs, slice(0, split), doc=doc, chunk=chunk)
    last_doc = None if doc is None else doc[:, split - 1]
    second, state = scan.part(given_inputs, slice(split, time), doc=doc, state=state, last_doc=last_doc, chunk=chunk)
    assert_same((torch.cat([first, second], 1), state), whole)


@of_every_scan
def test_decoding_token_by_token_equals_one_pass(scan: Scan, documents: Any) -> None:
    given_inputs = scan.inputs(2, 21)
    doc = documents(2, 21, 0.2, 6)
    whole, final = scan.part(given_inputs, doc=doc, chunk=8)
    state = last_doc = None
    for t in range(21):
        held = None if state is None else state.clone()
        y, after = scan.part(given_inputs, slice(t, t + 1), doc=doc, state=state, last_doc=last_doc)
        assert held is None or torch.equal(state, held), "a call wrote into the state it got"
        state, last_doc = after, doc[:, t]
        assert_same((y,), (whole[:, t : t + 1],))
    assert_same((state,), (final,))


@pytest.mark.parametrize(
    ("scan", "rounded", "sizes", "tolerance"),
    [
        (SSD, ("x", "B", "C"), {}, 2e-5),
        (SELECTIVE_SCAN, ("x", "B", "C"), {}, 2e-6),
        (GATED_DELTA, ("q", "k", "v"), {"key_dim": 16, "value_dim": 32}, 2e-5),
    ],
    ids=["ssd", "selective_scan", "gated_delta"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_low_precision_keep_their_sums_over_time_in_fp32(
    dtype: torch.dtype, scan: Scan, rounded: tuple[str, ...], sizes: dict[str, int], tolerance: float, documents: Any
) -> None:
    exact, doc = scan.inputs(2, 150, **sizes), documents(2, 150, 0.03, 2)
    low = {name: value.to(dtype if name in rounded else torch.float32) for name, value in exact.items()}
    expected = scan.run({name: value.double() for name, value in low.items()}, doc, backend="reference")
    got = scan.run(low, doc, chunk=64)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    assert_same(got, expected, tolerance if dtype == torch.float32 else 2e-2)
