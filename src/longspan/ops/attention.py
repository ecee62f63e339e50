"""Causal attention that stays inside documents, with grouped heads, caches, windows and ALiBi.

Shapes: B batch, T query time, S key time, H query heads, G key-value heads, P head dim, L length of a document.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.ops.compiling import never_compiled
from longspan.ops.flex_attention import flex

Backend = Literal["sdpa", "reference", "flex"]

# What one more call of the kernel costs (forward and backward, CPU), in pairs of query and key.
CALL_COST_PAIRS = 12_288
# What it costs to gather one key and one value for a block of queries (the same), in pairs.
GATHER_COST_PAIRS = 32
SMALLEST_BLOCK = 32
# The widest head that torch's fused kernel takes with grouped keys.
WIDEST_GROUPED = 256


def attention(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    *,
    q_doc_BT: Tensor | None = None,
    k_doc_BS: Tensor | None = None,
    q_offset: int = 0,
    alibi_slopes_H: Tensor | None = None,
    window: int | None = None,
    head_windows_H: Tensor | None = None,
    dropout: float = 0.0,
    backend: Backend = "sdpa",
    block_mask: Any = None,
) -> Tensor:
    """Softmax attention with scale 1/sqrt(P); query t sits at key position `q_offset + t` and sees itself and the past.

    Args:
        q_BTHP: queries.
        k_BSGP: keys; head h reads group h // (H/G). S >= q_offset + T; keys after a query are never seen.
        v_BSGP: values.
        q_doc_BT: document ids of the queries, not used again later in the row; None: one document.
        k_doc_BS: document ids of the keys; None with `q_doc_BT` given: the same ids (needs S == T).
        q_offset: key position of the first query (the length of the cache).
        alibi_slopes_H: adds `-slope * distance` to the scores (Press et al. 2022).
        window: a query sees the last `window` positions, itself included; None: all. "sdpa" then takes blocks of
            queries with the keys they can reach, where that is less work than the whole masked square.
        head_windows_H: int64, a window of each head's own, none wider than `window`, which is needed beside it.
        dropout: probability of dropping an attention weight, drawn from torch's own generator of the device.
        backend: "sdpa" (torch's fused kernels), "reference" (plain, right for anything), "flex" (FlexAttention, CUDA).
        block_mask: for "flex", the mask of this batch from `flex_block_mask`, made once for all layers.

    Returns:
        (B, T, H, P) in the dtype of the queries.

    Raises:
        UserError: shapes, window or backend that cannot be honoured.
    """
    rules = _Rules(q_offset, alibi_slopes_H, window, head_windows_H, dropout)
    if q_doc_BT is not None and k_doc_BS is None:
        k_doc_BS = q_doc_BT
    _check(q_BTHP, k_BSGP, v_BSGP, q_doc_BT, k_doc_BS, rules, backend, block_mask)
    if backend == "flex":
        return flex(q_BTHP, k_BSGP, v_BSGP, block_mask, rules.slopes, rules.q_offset)
    if backend == "reference":
        return _reference(q_BTHP, k_BSGP, v_BSGP, q_doc_BT, k_doc_BS, rules)
    if q_doc_BT is not None and k_doc_BS is not None and q_BTHP.device.type == "cpu":
        return _by_documents(q_BTHP, k_BSGP, v_BSGP, q_doc_BT, k_doc_BS, rules)
    return _fused(q_BTHP, k_BSGP, v_BSGP, q_doc_BT, k_doc_BS, rules)


@never_compiled
def _by_documents(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, q_doc_BT: Tensor, k_doc_BS: Tensor, rules: _Rules
) -> Tensor:
    """What the documents allow to be left out; a compiler could not know it before it sees them."""
    if _one_document(q_doc_BT, k_doc_BS):
        return _fused(q_BTHP, k_BSGP, v_BSGP, None, None, rules)
    aligned = rules.q_offset == 0 and q_BTHP.shape[1] == k_BSGP.shape[1]
    if aligned and (k_doc_BS is q_doc_BT or torch.equal(q_doc_BT, k_doc_BS)):
        lengths = _document_lengths(q_doc_BT, q_BTHP.shape[2], rules.window)
        if lengths is not None:
            return _per_document(q_BTHP, k_BSGP, v_BSGP, lengths, rules)
    return _fused(q_BTHP, k_BSGP, v_BSGP, q_doc_BT, k_doc_BS, rules)


class _Rules(NamedTuple):
    """What decides the scores beside queries, keys and documents."""

    q_offset: int
    slopes: Tensor | None
    window: int | None
    head_windows: Tensor | None
    dropout: float

    def visible(self, time: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Bool mask (1 or H, T, S) of causality and windows, and the distances (T, S)."""
        queries = torch.arange(time, device=device) + self.q_offset
        distance = queries[:, None] - torch.arange(keys, device=device)
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        if self.head_windows is None:
            return visible[None], distance
        return visible & (distance < self.head_windows.to(device)[:, None, None]), distance

    def mask(self, time: int, keys: int, same: Tensor | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Bool mask, or additive bias with ALiBi; broadcasts to (B, H, T, S). `same` (B, T, S): same document."""
        visible, distance = self.visible(time, keys, device)
        visible = visible[None] if same is None else visible & same[:, None]
        if self.slopes is None:
            return visible
        bias = -self.slopes.to(device, dtype)[:, None, None] * distance.to(dtype)
        return bias[None].masked_fill(~visible, -math.inf)


def _check(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    q_doc_BT: Tensor | None,
    k_doc_BS: Tensor | None,
    rules: _Rules,
    backend: str,
    block_mask: Any,
) -> None:
    time, heads = q_BTHP.shape[1:3]
    keys, groups = k_BSGP.shape[1:3]
    if backend not in ("sdpa", "reference", "flex"):
        raise UserError(f"attention backend {backend!r}", "'sdpa', 'reference' or 'flex'", "name one of the three")
    if backend == "flex" and not q_BTHP.is_cuda:
        raise UserError("attention backend 'flex' on the CPU", "'sdpa' or 'reference' there", "use 'sdpa'")
    if backend == "flex" and rules.dropout:
        raise UserError(
            f"attention backend 'flex' with dropout {rules.dropout}", "dropout 0", "use 'sdpa' or dropout 0"
        )
    if (backend == "flex") != (block_mask is not None):
        given = f"attention backend {backend!r} with{'out' if block_mask is None else ''} a block mask"
        raise UserError(given, "a block mask with 'flex' and only there", "make it once per batch with flex_block_mask")
    if heads % groups or k_BSGP.shape != v_BSGP.shape:
        given = f"{heads} query heads, keys {tuple(k_BSGP.shape)}, values {tuple(v_BSGP.shape)}"
        raise UserError(given, "key-value heads that divide the query heads", "change kv_heads")
    if rules.window is not None and rules.window < 1:
        raise UserError(f"window {rules.window}", "1 or more, or None for all", "raise it")
    if rules.head_windows is not None and (rules.window is None or backend == "flex"):
        given = f"windows of each head with window {rules.window} and backend {backend!r}"
        raise UserError(given, "a window as wide as the widest, and another backend", "give `window`, use 'sdpa'")
    if keys < rules.q_offset + time:
        given = f"{keys} keys for {time} queries from position {rules.q_offset}"
        raise UserError(given, "a key for every query", "put the new keys into the cache first")
    for docs, length, name in ((q_doc_BT, time, "q_doc_BT"), (k_doc_BS, keys, "k_doc_BS")):
        if docs is not None and docs.shape != (q_BTHP.shape[0], length):
            raise UserError(f"{name} {tuple(docs.shape)}", f"({q_BTHP.shape[0]}, {length})", "give an id per position")


def _same(q_doc_BT: Tensor | None, k_doc_BS: Tensor | None) -> Tensor | None:
    return None if q_doc_BT is None or k_doc_BS is None else q_doc_BT[:, :, None] == k_doc_BS[:, None, :]


def _heads_first(values: Tensor, heads: int) -> Tensor:
    """(B, S, G, P) -> (B, H, S, P)."""
    repeats = heads // values.shape[2]
    values = values.transpose(1, 2)
    return values if repeats == 1 else values.repeat_interleave(repeats, dim=1)


def _reference(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, q_doc_BT: Tensor | None, k_doc_BS: Tensor | None, rules: _Rules
) -> Tensor:
    heads, head_dim = q_BTHP.shape[2:]
    q, k, v = (_heads_first(values, heads) for values in (q_BTHP, k_BSGP, v_BSGP))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(head_dim)
    mask = rules.mask(q.shape[2], k.shape[2], _same(q_doc_BT, k_doc_BS), q.dtype, q.device)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return (F.dropout(scores.softmax(-1), rules.dropout) @ v).transpose(1, 2)


def _fused(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, q_doc_BT: Tensor | None, k_doc_BS: Tensor | None, rules: _Rules
) -> Tensor:
    time, keys = q_BTHP.shape[1], k_BSGP.shape[1]
    if rules.window is not None and rules.window >= keys and rules.head_windows is None:
        rules = rules._replace(window=None)
    if rules.window is not None and time > block_size(rules.window) and _band_pairs(rules.window) < keys:
        return _banded(q_BTHP, k_BSGP, v_BSGP, q_doc_BT, k_doc_BS, rules)
    plain = q_doc_BT is None and rules.slopes is None and rules.window is None
    causal = plain and rules.q_offset == 0 and time == keys
    newest_only = plain and time == 1 and rules.q_offset + 1 == keys
    newest = plain and not causal and time > 1 and rules.q_offset + time == keys
    if newest and q_BTHP.device.type == "cpu" and not (rules.dropout or _needs_gradients(q_BTHP, k_BSGP, v_BSGP)):
        return _after_kept_keys(q_BTHP, k_BSGP, v_BSGP, rules.q_offset)
    mask: Tensor | None = None
    if newest and q_BTHP.is_cuda:
        # Torch's fused kernels take the newest queries of a cache without a mask of their size. Imported here, for it
        # brings the compiler along, which costs seconds.
        from torch.nn.attention.bias import causal_lower_right

        mask = causal_lower_right(time, keys)
    elif not (causal or newest_only):
        mask = rules.mask(time, keys, _same(q_doc_BT, k_doc_BS), q_BTHP.dtype, q_BTHP.device)
    return _sdpa(q_BTHP, k_BSGP, v_BSGP, mask, rules.dropout, causal)


def _needs_gradients(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _after_kept_keys(q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, kept: int) -> Tensor:
    """The newest queries on a CPU: all kept keys and, causally, their own, weighed by what the scores of each sum to.

    Torch's kernel for CPUs computes what a mask hides, and reads the mask: four times the work of a causal square. No
    public function tells what scores sum to; the kernel is as it was in torch 2.11 and 2.13, which a test looks at.
    """
    heads = q_BTHP.shape[2]
    q = q_BTHP.transpose(1, 2)
    k, v = (_heads_first(values, heads) for values in (k_BSGP, v_BSGP))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    past, past_sum_BHT = flash(q, k[:, :, :kept], v[:, :, :kept])
    own, own_sum_BHT = flash(q, k[:, :, kept:], v[:, :, kept:], 0.0, True)
    share_BHT1 = torch.sigmoid(own_sum_BHT - past_sum_BHT)[..., None]
    return torch.lerp(past.to(share_BHT1.dtype), own.to(share_BHT1.dtype), share_BHT1).to(q.dtype).transpose(1, 2)


def _sdpa(
    q_BTHP: Tensor,
    k_BSGP: Tensor,
    v_BSGP: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool = False,
) -> Tensor:
    grouped = _takes_groups(q_BTHP, k_BSGP, mask)
    heads = k_BSGP.shape[2] if grouped else q_BTHP.shape[2]
    q = q_BTHP.transpose(1, 2)
    k, v = (_heads_first(values, heads) for values in (k_BSGP, v_BSGP))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2)


def _takes_groups(q_BTHP: Tensor, k_BSGP: Tensor, mask: Tensor | None) -> bool:
    """Whether the fused kernel reads the keys of grouped heads as they are, without a copy for every query head."""
    if q_BTHP.shape[2] == k_BSGP.shape[2] or not q_BTHP.is_cuda or q_BTHP.requires_grad:
        return False
    fits = q_BTHP.dtype in (torch.bfloat16, torch.float16) and q_BTHP.shape[3] <= WIDEST_GROUPED
    # A bias of torch's own kind stands for a rule and holds no numbers.
    return fits and (mask is None or type(mask).__name__ == "CausalBias")


def block_size(window: int) -> int:
    """Queries in one block of windowed attention, which then meets `block_size + window - 1` keys."""
    return max(SMALLEST_BLOCK, window // 2)


def _band_pairs(window: int | None) -> float:
    """What one query of a block costs, in pairs, the share of gathering the keys of the block included."""
    if window is None:
        return math.inf
    size = block_size(window)
    return (size + window - 1) * (1 + GATHER_COST_PAIRS / size)


def _banded(
    q_BTHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, q_doc_BT: Tensor | None, k_doc_BS: Tensor | None, rules: _Rules
) -> Tensor:
    """Every block of queries against the keys in its reach: work and memory grow with T * window."""
    assert rules.window is not None
    batch, time = q_BTHP.shape[:2]
    keys, device = k_BSGP.shape[1], q_BTHP.device
    # The blocks are as equal as can be, so that fewer queries than there are blocks are padding.
    blocks = -(-time // block_size(rules.window))
    size = -(-time // blocks)
    reach = size + rules.window - 1
    first_N1 = rules.q_offset - rules.window + 1 + size * torch.arange(blocks, device=device)[:, None]
    place_NR = first_N1 + torch.arange(reach, device=device)
    index = place_NR.clamp(0, keys - 1).flatten()
    q_BTHP = F.pad(q_BTHP, (0, 0, 0, 0, 0, blocks * size - time))
    q, k, v = (
        values.reshape(batch * blocks, -1, *values.shape[2:])
        for values in (q_BTHP, k_BSGP.index_select(1, index), v_BSGP.index_select(1, index))
    )
    seen = None
    if rules.q_offset < rules.window - 1:
        seen = (place_NR >= 0)[:, None].expand(batch, blocks, size, reach).flatten(0, 1)
    if q_doc_BT is not None and k_doc_BS is not None:
        # Padding stands in the last query's document, where it sees that query's key: no row of the mask is empty.
        places = torch.arange(blocks * size, device=device).clamp(max=time - 1)
        same = _same(q_doc_BT[:, places].view(batch * blocks, -1), k_doc_BS[:, index].view(batch * blocks, -1))
        seen = same if seen is None or same is None else same & seen
    mask = rules._replace(q_offset=rules.window - 1).mask(size, reach, seen, q.dtype, device)
    return _sdpa(q, k, v, mask, rules.dropout).reshape(batch, blocks * size, *q.shape[2:])[:, :time]


def _one_document(q_doc_BT: Tensor, k_doc_BS: Tensor) -> bool:
    return bool((k_doc_BS == q_doc_BT[:, :1]).all()) and bool((q_doc_BT == q_doc_BT[:, :1]).all())


def _document_lengths(doc_BT: Tensor, heads: int, window: int | None) -> list[int] | None:
    """Lengths of all documents, row after row, where one call per document is cheaper than whole rows with a mask."""
    batch, time = doc_BT.shape
    starts_BT = F.pad(doc_BT[:, 1:] != doc_BT[:, :-1], (1, 0), value=True)
    first_N = starts_BT.flatten().nonzero()[:, 0]
    length_N = torch.diff(first_N, append=first_N.new_tensor([batch * time]))
    most = _band_pairs(window)
    pairs_N = length_N * length_N.clamp(max=most)
    # Inside its window a document needs no mask, so the kernel leaves out the keys after the queries.
    pairs_N = torch.where(length_N <= (window or time), pairs_N / 2, pairs_N)
    if length_N.numel() * CALL_COST_PAIRS + heads * float(pairs_N.sum()) > heads * batch * time * min(time, most):
        return None
    lengths: list[int] = length_N.tolist()
    return lengths


def _per_document(q_BTHP: Tensor, k_BTGP: Tensor, v_BTGP: Tensor, lengths: list[int], rules: _Rules) -> Tensor:
    """Each document on its own: the work is the sum of the squares of the lengths, not the square of the sum."""
    parts = zip(*(torch.split(values.flatten(0, 1), lengths) for values in (q_BTHP, k_BTGP, v_BTGP)), strict=True)
    y = torch.cat([_fused(q[None], k[None], v[None], None, None, rules)[0] for q, k, v in parts])
    return y.view(q_BTHP.shape)
