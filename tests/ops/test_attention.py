"""Every backend says what the plain softmax says, and no document feels another."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.foundation.errors import UserError
from longspan.ops import attention as module
from longspan.ops.attention import attention, block_size
from longspan.ops.flex_attention import flex_block_mask


def leaves(batch, time, keys=None, heads=4, groups=4, head_dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    keys = time if keys is None else keys
    shapes = ((batch, time, heads, head_dim), (batch, keys, groups, head_dim), (batch, keys, groups, head_dim))
    return [torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def with_gradients(q, k, v, **rules):
    y = attention(q, k, v, **rules)
    slope = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return y, *torch.autograd.grad(y, (q, k, v), slope)


def assert_same(got, expected, tolerance=1e-12):
    for one, other in zip(got, expected, strict=True):
        assert torch.allclose(one, other, atol=tolerance)


@contextmanager
def way(name):
    """One way of the three that SDPA takes, whatever the shapes."""
    never = 10**9
    costs = {"per document": (0, never, 2), "masked": (never, never, 2), "blocks": (never, 0, 2)}[name]
    with pytest.MonkeyPatch.context() as patch:
        for constant, cost in zip(("CALL_COST_PAIRS", "GATHER_COST_PAIRS", "SMALLEST_BLOCK"), costs, strict=True):
            patch.setattr(module, constant, cost)
        yield


WAYS = ["per document", "masked", "blocks"]


def test_the_reference_is_softmax_by_hand():
    q, k, v = leaves(1, 3, heads=1, groups=1, head_dim=2)
    y = attention(q, k, v, backend="reference")
    scores = [torch.dot(q[0, 2, 0], k[0, s, 0]) / math.sqrt(2) for s in range(3)]
    weights = torch.stack(scores).softmax(0)
    assert torch.allclose(y[0, 2, 0], sum(w * v[0, s, 0] for s, w in enumerate(weights)))
    assert torch.allclose(y[0, 0, 0], v[0, 0, 0])


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("chance", [None, 0.0, 0.2, 1.0])
def test_sdpa_equals_the_reference(chance, groups, alibi, window, name, documents):
    tensors = leaves(3, 17, groups=groups)
    rules = {"window": window}
    if alibi:
        rules["alibi_slopes_H"] = torch.tensor([0.5, 0.25, 0.125, 0.0625], dtype=torch.float64)
    if chance is not None:
        rules["q_doc_BT"] = documents(3, 17, chance, 0)
    with way(name):
        assert_same(with_gradients(*tensors, **rules), with_gradients(*tensors, **rules, backend="reference"))


@settings(max_examples=30, deadline=None)
@given(
    time=st.integers(2, 12),
    cut=st.floats(0, 1),
    boundaries=st.none() | st.sets(st.integers(1, 11)),
    window=st.none() | st.integers(1, 12),
    alibi=st.booleans(),
    name=st.sampled_from(WAYS),
)
def test_a_cache_at_any_split_equals_one_pass(time, cut, boundaries, window, alibi, name):
    q, k, v = (z.detach() for z in leaves(2, time, groups=2, seed=time))
    split = 1 + int(cut * (time - 2))
    rules = {"window": window, "alibi_slopes_H": torch.arange(4.0).double() / 4 if alibi else None}
    doc = None
    if boundaries is not None:
        doc = torch.tensor([[sum(b <= t for b in boundaries) for t in range(time)]] * 2)
    whole = attention(q, k, v, q_doc_BT=doc, backend="reference", **rules)
    with way(name):
        first = attention(
            q[:, :split], k[:, :split], v[:, :split], q_doc_BT=None if doc is None else doc[:, :split], **rules
        )
        rest = attention(
            q[:, split:],
            k,
            v,
            q_doc_BT=None if doc is None else doc[:, split:],
            k_doc_BS=doc,
            q_offset=split,
            **rules,
        )
    assert torch.allclose(torch.cat((first, rest), 1), whole, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_going_on_from_kept_keys_needs_no_mask_on_a_cpu(dtype, monkeypatch):
    q, k, v = (z.detach() for z in leaves(2, 7, keys=40, groups=2, dtype=dtype))
    expected = attention(q, k, v, q_offset=33, backend="reference")
    monkeypatch.setattr(module._Rules, "mask", None)
    found = attention(q, k, v, q_offset=33)
    assert found.dtype == dtype
    assert torch.allclose(
        found, expected, atol={torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    )


def test_the_kernel_of_torch_that_tells_what_scores_sum_to_is_as_it_was():
    """It is private, so torch may change it without a word; checked with torch 2.11 and 2.13."""
    found = str(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default._schema)
    known = (
        "aten::_scaled_dot_product_flash_attention_for_cpu(Tensor query, Tensor key, Tensor value, "
        "float dropout_p=0., bool is_causal=False, *, Tensor? attn_mask=None, float? scale=None) "
        "-> (Tensor output, Tensor logsumexp)"
    )
    assert found == known, f"torch {torch.__version__} changed it: look at `_after_kept_keys` in ops/attention.py"


def test_going_on_from_kept_keys_has_the_gradients_of_the_reference():
    tensors = leaves(2, 7, keys=40, groups=2)
    assert_same(with_gradients(*tensors, q_offset=33), with_gradients(*tensors, q_offset=33, backend="reference"))


def test_keys_of_an_unfilled_cache_are_never_seen():
    q, k, v = (z.detach() for z in leaves(1, 2, keys=9))
    expected = attention(q, k[:, :5], v[:, :5], q_offset=3)
    k[:, 5:] = 1e6
    v[:, 5:] = 1e6
    assert torch.allclose(attention(q, k, v, q_offset=3), expected, atol=1e-12)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("window", [None, 7, 40])
def test_changing_one_document_leaves_every_other_bitwise_untouched(name, window):
    doc = torch.tensor([[0] * 30 + [1] * 45 + [2] * 1 + [3] * 64])
    inside = doc[0] == 1
    results = []
    for seed in (0, 1):
        base, other = (leaves(1, 140, dtype=torch.float32, seed=s) for s in (0, seed))
        mixed = [
            torch.where(inside[:, None, None], o, b).detach().requires_grad_() for b, o in zip(base, other, strict=True)
        ]
        with way(name):
            results.append(with_gradients(*mixed, q_doc_BT=doc, window=window))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[:, ~inside], other[:, ~inside])
        assert not torch.equal(one[:, inside], other[:, inside])


@pytest.mark.parametrize("window", [1, 7, 40])
def test_blocks_keep_causality_bitwise(window):
    before, after = (leaves(1, 140, dtype=torch.float32, seed=s) for s in (0, 1))
    mixed = [torch.cat((b[:, :77], a[:, 77:]), 1) for b, a in zip(before, after, strict=True)]
    with way("blocks"):
        first, second = (attention(*z, window=window) for z in (before, mixed))
    assert torch.equal(first[:, :77], second[:, :77])
    assert not torch.equal(first[:, 77:], second[:, 77:])


@pytest.mark.parametrize(("time", "window", "blocks"), [(256, 8, True), (256, 128, False), (1024, 128, True)])
@pytest.mark.parametrize("offset", [0, 7])
def test_blocks_are_taken_where_the_window_is_short(time, window, blocks, offset, monkeypatch):
    """No score outside the blocks is computed: the kernel sees as many keys as one block reaches."""
    seen = []
    kernel = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **rules):
        seen.append((q.shape[0] * q.shape[2], k.shape[2]))
        return kernel(q, k, v, **rules)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    q, k, v = (z.detach() for z in leaves(1, time, keys=time + offset, dtype=torch.float32))
    y = attention(q, k, v, window=window, q_offset=offset)
    ((queries, keys),) = seen
    assert keys <= block_size(window) + window - 1 if blocks else keys == time + offset
    assert queries < time + time / 16
    assert torch.allclose(y, attention(q, k, v, window=window, q_offset=offset, backend="reference"), atol=1e-5)


def test_dropout_keeps_the_mean():
    q, k, v = (z.detach() for z in leaves(1, 4, heads=1, groups=1, dtype=torch.float32))
    torch.manual_seed(0)
    kept = torch.stack([attention(q, k, v, dropout=0.3) for _ in range(600)]).mean(0)
    assert torch.allclose(kept, attention(q, k, v), atol=0.15)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"backend": "flash"}, "'flash'"),
        ({"backend": "flex"}, "on the CPU"),
        ({"window": 0}, "window 0"),
        ({"q_offset": 1}, "8 keys for 8 queries from position 1"),
        ({"q_doc_BT": torch.zeros(2, 5)}, "q_doc_BT"),
        ({"block_mask": object()}, "block mask"),
    ],
)
def test_what_cannot_be_honoured_is_refused(rules, words):
    with pytest.raises(UserError, match=words):
        attention(*leaves(2, 8), **rules)
    with pytest.raises(UserError, match="kv_heads"):
        attention(*leaves(2, 8, groups=3))


@pytest.mark.parametrize("window", [None, 100, 300])
@pytest.mark.parametrize(("time", "chance"), [(512, 0.01), (500, 0.003), (300, 1.0), (260, 0.0)])
def test_the_blocks_of_a_mask_are_those_of_the_whole_square(time, chance, window, documents):
    """Blocks left out hold nothing that is visible, blocks called whole nothing that is not."""
    doc = documents(3, time, chance)
    mask = flex_block_mask(doc, window=window)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    square = (distance >= 0) & (distance < (window or time)) & (doc[:, :, None] == doc[:, None, :])
    inside = torch.ones(time, time, dtype=torch.bool)
    edge = -time % 128
    blocks = F.pad(square, (0, edge, 0, edge)).unflatten(1, (-1, 128)).unflatten(3, (-1, 128))
    exists = F.pad(inside, (0, edge, 0, edge)).unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    some, whole = blocks.any(4).any(2), (blocks | ~exists).all(4).all(2)
    partly = torch.zeros_like(some)
    full = torch.zeros_like(some)
    for counts, order, into in (
        (mask.kv_num_blocks, mask.kv_indices, partly),
        (mask.full_kv_num_blocks, mask.full_kv_indices, full),
    ):
        for b, q in torch.cartesian_prod(torch.arange(3), torch.arange(some.shape[1])).tolist():
            into[b, q, order[b, 0, q, : counts[b, 0, q]].long()] = True
    assert torch.equal(partly | full, some)
    assert not (partly & full).any()
    assert not (full & ~whole).any()
    t = torch.arange(time)
    assert torch.equal(mask.mask_mod(torch.tensor(1), torch.tensor(0), t[:, None], t), square[1])
