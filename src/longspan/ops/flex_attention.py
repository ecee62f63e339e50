"""FlexAttention: which blocks of keys a batch of packed documents meets, and the call of torch's kernel over them.

Shapes: B batch, T query time, S key time, H query heads, G key-value heads, P head dim, N blocks of a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops import kernels

BLOCK_LISTS = tuple(
    f"{full}{side}_{what}" for side in ("kv", "q") for full in ("", "full_") for what in ("num_blocks", "indices")
)
"""Names of the tensors of torch's `BlockMask`, in the order of `_block_lists`."""
# FlexAttention's own block, and the head dimensions it takes without padding.
FLEX_BLOCK = 128
FLEX_HEAD_DIMS = (16, 32, 64, 128)
# How its kernels cut their work on an H100, by head dimension: the fastest of those tried, docs/LOG.md. Others, and
# what is not named here, as torch chooses.
FLEX_OPTIONS: dict[int, dict[str, int]] = {
    64: {
        "fwd_BLOCK_M": 128,
        "fwd_BLOCK_N": 64,
        "fwd_num_warps": 4,
        "fwd_num_stages": 3,
        "bwd_BLOCK_M1": 64,
        "bwd_BLOCK_N1": 64,
        "bwd_BLOCK_M2": 64,
        "bwd_BLOCK_N2": 64,
        "bwd_num_warps": 4,
        "bwd_num_stages": 3,
    }
}


def flex_serves(q_BTHP: Tensor, dropout: float) -> bool:
    """Whether rows of several documents go through "flex": bf16 on CUDA where kernels are chosen, at usual sizes."""
    fits = q_BTHP.shape[1] >= FLEX_BLOCK and q_BTHP.shape[3] in FLEX_HEAD_DIMS and not dropout
    return fits and q_BTHP.is_cuda and q_BTHP.dtype == torch.bfloat16 and kernels.serve(q_BTHP)


def flex_block_mask(doc_BT: Tensor, *, window: int | None = None, device: torch.device | str | None = None) -> Any:
    """Makes the `BlockMask` of a batch for backend "flex": causal, inside documents, inside the window; T keys.

    The blocks that a block of queries meets follow one another, and so do those among them that it sees whole; the same
    holds the other way around. So lists of blocks are counted off from first and last ones, without a square of
    positions and without sorting, and nothing waits for the device.

    Args:
        doc_BT: document ids; a document is a run of equal ids. Best on the CPU: then one copy moves the whole mask.
        window: positions that a query sees, or None.
        device: where attention runs; default that of `doc_BT`.
    """
    from torch.nn.attention.flex_attention import BlockMask

    time = doc_BT.shape[1]
    device = torch.device(device or doc_BT.device)
    parts = _block_lists(doc_BT, window)
    if doc_BT.device != device:
        flat = torch.cat([part.reshape(-1) for part in parts])
        flat = (flat.pin_memory() if device.type == "cuda" else flat).to(device, non_blocking=True)
        places = torch.split(flat, [part.numel() for part in parts])
        parts = [place.view(part.shape) for place, part in zip(places, parts, strict=True)]
    run_BT, *lists = parts
    lists = [each.unsqueeze(1) for each in lists]

    def visible(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        seen = (q_index >= k_index) & (run_BT[b, q_index] == run_BT[b, k_index])
        return seen if window is None else seen & (q_index - k_index < window)

    # Torch's mask holds the rule as it is given, but not what the rule reads.
    visible.reads = [run_BT]  # type: ignore[attr-defined]
    members: dict[str, Any] = dict(zip(BLOCK_LISTS, lists, strict=True))
    return BlockMask(seq_lengths=(time, time), **members, BLOCK_SIZE=(FLEX_BLOCK, FLEX_BLOCK), mask_mod=visible)


def block_mask_tensors(mask: Any) -> list[Tensor]:
    """Of a mask from `flex_block_mask`: its lists of blocks, and what its rule for single positions reads."""
    return [*(getattr(mask, name) for name in BLOCK_LISTS), *mask.mask_mod.reads]


def _block_lists(doc_BT: Tensor, window: int | None) -> list[Tensor]:
    """Runs of equal ids (B, T), then what `BlockMask` holds, all int32 on the device of the ids: for every block of
    queries the number (B, N) and the list (B, N, N) of blocks of keys that are seen in part, the same for those seen
    whole, and the same two for every block of keys."""
    rows, time = doc_BT.shape
    device = doc_BT.device
    starts_BT = F.pad(doc_BT[:, 1:] != doc_BT[:, :-1], (1, 0))
    index_T = torch.arange(time, dtype=torch.int32, device=device)
    begin_BT = torch.where(starts_BT, index_T, 0).cummax(1).values
    block_N = torch.arange(-(-time // FLEX_BLOCK), dtype=torch.int32, device=device)
    head_N = block_N * FLEX_BLOCK
    tail_N = (head_N + FLEX_BLOCK - 1).clamp(max=time - 1)
    # The first block of keys that the block of queries meets, and the first that every query of it sees whole.
    first_BN = begin_BT[:, head_N] // FLEX_BLOCK
    whole_BN = -(-begin_BT[:, tail_N] // FLEX_BLOCK)
    if window is not None:
        first_BN = torch.maximum(first_BN, block_N - (window + FLEX_BLOCK - 2) // FLEX_BLOCK)
        whole_BN = torch.maximum(whole_BN, block_N - (window - FLEX_BLOCK) // FLEX_BLOCK)
    whole_BN = torch.minimum(whole_BN, block_N)
    # The other way around: the last block of queries that meets a block of keys, and the last that sees it whole.
    keys_BN = block_N.expand(rows, -1).contiguous()
    last_BN = torch.searchsorted(first_BN.contiguous(), keys_BN, right=True, out_int32=True) - 1
    last_whole_BN = torch.searchsorted(whole_BN.contiguous(), keys_BN, right=True, out_int32=True) - 1
    last_whole_BN = torch.maximum(last_whole_BN, block_N)
    count_N = block_N[None, None]
    before_BN, after_BN = whole_BN - first_BN, last_BN - last_whole_BN
    own_BN1 = keys_BN[..., None]
    return [
        starts_BT.cumsum(1, dtype=torch.int32),
        before_BN + 1,
        torch.where(count_N < before_BN[..., None], first_BN[..., None] + count_N, own_BN1),
        block_N - whole_BN,
        (whole_BN[..., None] + count_N).clamp(max=int(block_N.shape[0]) - 1),
        after_BN + 1,
        torch.where(count_N == 0, own_BN1, (last_whole_BN[..., None] + count_N).clamp(max=int(block_N.shape[0]) - 1)),
        last_whole_BN - block_N,
        (own_BN1 + 1 + count_N).clamp(max=int(block_N.shape[0]) - 1),
    ]


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex_attention() -> Any:
    """Inside a compiled layer that layer's compiler takes it in; elsewhere it is compiled alone."""
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention

        return flex_attention
    return _compiled_flex()


def _flex_options(q_BTHP: Tensor) -> Any:
    # Measured in bf16 on an H100; fp32 tiles of this size need twice the shared memory.
    return FLEX_OPTIONS.get(q_BTHP.shape[3]) if q_BTHP.dtype == torch.bfloat16 else None


def flex(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, block_mask: Any, slopes_H: Tensor | None, offset: int
) -> Tensor:
    """(B, T, H, P): what of k and v the mask lets each query see; ALiBi with slopes, queries begin at `offset`."""

    def alibi(score: Tensor, b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        assert slopes_H is not None
        return score - slopes_H[h] * (q_index + offset - k_index)

    q, k, v = (values.transpose(1, 2) for values in (q_BTHP, k_BSGP, v_BSGP))
    y: Tensor = _flex_attention()(
        q,
        k,
        v,
        score_mod=None if slopes_H is None else alibi,
        block_mask=block_mask,
        enable_gqa=q_BTHP.shape[2] != k_BSGP.shape[2],
        kernel_options=_flex_options(q_BTHP),
    )
    return y.transpose(1, 2)
