"""One new token against a ring of keys is the last row of attention over all of them."""

from __future__ import annotations

import pytest
import torch

from longspan.foundation.errors import UserError
from longspan.foundation.randomness import torch_generator
from longspan.ops.attention import attention
from longspan.ops.decode_attention import decode_attention, place_token
from longspan.ops.rotary import Rotation, rotary


def normal(*shape, name=0):
    return torch.randn(shape, generator=torch_generator(0, "normal", name), dtype=torch.float64)


def ring(keys, slots):
    """Keys (B, S, G, P) written one after the other into a ring."""
    held = keys.new_full((keys.shape[0], slots, *keys.shape[2:]), 1e4)
    for place in range(keys.shape[1]):
        held[:, place % slots] = keys[:, place]
    return held


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize(("seen", "slots", "window"), [(7, 7, None), (7, 20, None), (19, 5, 5), (19, 8, 5), (3, 8, 5)])
@pytest.mark.parametrize("alibi", [False, True])
def test_is_the_last_row_of_attention(groups, seen, slots, window, alibi):
    q, k, v = normal(2, 1, 4, 6), normal(2, seen, groups, 6, name=1), normal(2, seen, groups, 6, name=2)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=q.dtype) if alibi else None
    expected = attention(q, k, v, q_offset=seen - 1, window=window, alibi_slopes_H=slopes, backend="reference")
    found = decode_attention(
        q[:, 0], ring(k, slots), ring(v, slots), torch.tensor([seen - 1]), torch.zeros(2, dtype=torch.int32),
        alibi_slopes_H=slopes, window=window,
    )  # fmt: skip
    torch.testing.assert_close(found, expected[:, 0])


def test_rows_may_begin_at_different_places_and_heads_see_windows_of_their_own():
    q, k, v = normal(2, 1, 3, 6), normal(2, 9, 3, 6, name=1), normal(2, 9, 3, 6, name=2)
    doc = torch.zeros(2, 9, dtype=torch.int32)
    doc[1, :4] = -1
    windows = torch.tensor([1, 2, 9])
    expected = attention(
        q, k, v, q_doc_BT=doc[:, -1:], k_doc_BS=doc, q_offset=8, window=9, head_windows_H=windows, backend="reference"
    )
    first = torch.tensor([0, 4], dtype=torch.int32)
    windows = torch.tensor([1, 2, 0])
    found = decode_attention(q[:, 0], ring(k, 12), ring(v, 12), torch.tensor([8]), first, head_windows_H=windows)
    torch.testing.assert_close(found, expected[:, 0])


@pytest.mark.parametrize("unrotated", [0, 1])
def test_a_token_is_turned_and_placed(unrotated):
    qkv, held = normal(2, 8, 6), normal(2, 5, 2, 6, name=1)
    rotation = Rotation.build(torch.tensor([[7], [3]]), 6, 100.0, torch.float64)
    k, v = held.clone(), held.clone()
    q = place_token(qkv, rotation, unrotated, k, v, torch.tensor([12]))
    turned = rotary(qkv[:, None], rotation)[:, 0]
    torch.testing.assert_close(q[:, unrotated:], turned[:, unrotated:4])
    torch.testing.assert_close(q[:, :unrotated], qkv[:, :unrotated])
    torch.testing.assert_close(k[:, 2, unrotated:], turned[:, 4 + unrotated : 6])
    torch.testing.assert_close(v[:, 2], qkv[:, 6:])
    others = [0, 1, 3, 4]
    assert torch.equal(k[:, others], held[:, others])


def test_a_window_without_slots_is_refused():
    keys = normal(1, 4, 1, 6)
    with pytest.raises(UserError, match="window of 5"):
        decode_attention(keys[:, 0], keys, keys, torch.tensor([3]), torch.zeros(1, dtype=torch.int32), window=5)
