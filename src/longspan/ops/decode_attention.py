"""Attention of one new token per row, over keys in memory of fixed size: what a CUDA graph of a decoding step replays.

How many keys there are is a tensor on the device, so that nothing about a step is known to the host alone. The memory
is a ring: key number `place` stands in slot `place % C`, so that a window's keys need no more slots than the window.

Shapes: B rows, C slots, H query heads, G key-value heads, P head dim, R = P/2 pairs.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.ops import kernels
from longspan.ops.rotary import Rotation, rotary

WIDEST_HEAD = 256


def place_token(
    qkv_BKP: Tensor,
    rotation: Rotation | None,
    unrotated: int,
    k_BCGP: Tensor,
    v_BCGP: Tensor,
    newest_1: Tensor,
) -> Tensor:
    """Turns the new token's query and key, and writes its key and value into the slot of its place.

    Args:
        qkv_BKP: queries, keys and values, K = H + 2 G heads in this order.
        rotation: of the token's position, cosines and sines (B or 1, 1, 1, R); None: nothing is turned.
        unrotated: the first so many heads of queries and of keys stay as they are.
        k_BCGP, v_BCGP: overwritten.
        newest_1: int64 (1,), the token's place among the keys.

    Returns:
        The queries (B, H, P).
    """
    groups = k_BCGP.shape[2]
    heads = qkv_BKP.shape[1] - 2 * groups
    if kernels.serve_eagerly(qkv_BKP):
        from longspan.ops.triton.decode_attention import run_place

        return run_place(qkv_BKP, rotation, unrotated, k_BCGP, v_BCGP, newest_1)
    q, k, v = torch.split(qkv_BKP, [heads, groups, groups], dim=1)
    if rotation is not None:
        q, k = (
            torch.cat([part[:, :unrotated], rotary(part[:, None, unrotated:], rotation)[:, 0]], dim=1)
            for part in (q, k)
        )
    slot_1 = newest_1 % k_BCGP.shape[1]
    k_BCGP.index_copy_(1, slot_1, k[:, None].to(k_BCGP.dtype))
    v_BCGP.index_copy_(1, slot_1, v[:, None].to(v_BCGP.dtype))
    return q


def decode_attention(
    q_BHP: Tensor,
    k_BCGP: Tensor,
    v_BCGP: Tensor,
    newest_1: Tensor,
    first_B: Tensor,
    *,
    alibi_slopes_H: Tensor | None = None,
    window: int | None = None,
    head_windows_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention with scale 1/sqrt(P) of the newest token over all places that it sees, its own included.

    Args:
        q_BHP: its queries, in the dtype of the keys.
        k_BCGP: keys in their slots; head h reads group h // (H/G).
        v_BCGP: values.
        newest_1: int64 (1,), its place.
        first_B: int32, the first place that a row sees.
        alibi_slopes_H: adds `-slope * distance` to the scores.
        window: it sees so many places, its own included; None: as many as there are slots.
        head_windows_H: int64, a window for each head; 0: none.

    Returns:
        (B, H, P).

    Raises:
        UserError: a window that has too few slots.
    """
    slots = k_BCGP.shape[1]
    if window is not None and window > slots:
        raise UserError(f"a window of {window} over {slots} slots", "a slot for every place in it", "make more slots")
    if kernels.serve_eagerly(q_BHP) and q_BHP.shape[2] <= WIDEST_HEAD:
        from longspan.ops.triton.decode_attention import run_attention

        return run_attention(q_BHP, k_BCGP, v_BCGP, newest_1, first_B, alibi_slopes_H, window, head_windows_H)
    place_C = newest_1 - (newest_1 - torch.arange(slots, device=q_BHP.device)) % slots
    distance_C = newest_1 - place_C
    seen = (place_C >= first_B[:, None])[:, None]
    if window is not None:
        seen = seen & (distance_C < window)
    if head_windows_H is not None:
        seen = seen & ((distance_C < head_windows_H[:, None]) | (head_windows_H[:, None] == 0))
    mask = seen[:, :, None]
    if alibi_slopes_H is not None:
        bias_HC = -alibi_slopes_H.to(q_BHP.dtype)[:, None] * distance_C.to(q_BHP.dtype)
        mask = bias_HC[None, :, None].masked_fill(~mask, -math.inf)
    repeats = q_BHP.shape[1] // k_BCGP.shape[2]
    k, v = (z.transpose(1, 2).repeat_interleave(repeats, dim=1) for z in (k_BCGP, v_BCGP))
    return F.scaled_dot_product_attention(q_BHP[:, :, None], k, v, attn_mask=mask)[:, :, 0]
