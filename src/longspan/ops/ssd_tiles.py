"""How the chunked scans cut their work: tiles that stay in cache, document boundaries as 0/1 factors, decays from both.

Shapes: B batch, C chunks of a row, q time in a chunk, H heads, h heads of one group, G groups; c counts the chunks of
all rows of a tile. Decays are exponentials of masked, never positive sums: the mask comes before the exponential.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# exp() far below its range takes a slow path on CPUs; what lies below the floor is zero for any purpose here.
EXPONENT_FLOOR = {torch.float32: -80.0, torch.float64: -700.0}
TILE_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Boundaries:
    """What every chunk needs to know about documents, as 0/1 factors; None stands for all ones.

    Attributes:
        mask: (q, q) or, with documents, (B, C, q, q); 1 where j <= i and both tokens are of the same document.
        to_end: (B, C, q); 1 where the token is of the document open at the end of its chunk.
        from_before: (B, C, q); 1 where the token is of the document open at the end of the chunk before.
        carry: (B, C); 1 where one document spans the chunk and the end of the chunk before.
    """

    mask: Tensor
    to_end: Tensor | None = None
    from_before: Tensor | None = None
    carry: Tensor | None = None

    @staticmethod
    def build(
        doc_BT: Tensor | None, initial_doc_B: Tensor | None, size: int, dtype: torch.dtype, device: torch.device
    ) -> Boundaries:
        """Makes the factors from document ids whose T is a multiple of `size`."""
        causal = torch.ones(size, size, dtype=dtype, device=device).tril_()
        if doc_BT is None:
            return Boundaries(causal)
        before_B1 = doc_BT[:, :1] if initial_doc_B is None else initial_doc_B[:, None].to(doc_BT.dtype)
        starts_BT = doc_BT != torch.cat((before_B1, doc_BT[:, :-1]), dim=1)
        if device.type == "cpu" and not bool(starts_BT.any()):
            return Boundaries(causal)
        run_BCq = starts_BT.cumsum(1, dtype=torch.int32).reshape(doc_BT.shape[0], -1, size)
        end_BC = run_BCq[..., -1]
        before_BC = F.pad(end_BC[:, :-1], (1, 0))
        return Boundaries(
            mask=(run_BCq[..., :, None] == run_BCq[..., None, :]).to(dtype).mul_(causal),
            to_end=(run_BCq == end_BC[..., None]).to(dtype),
            from_before=(run_BCq == before_BC[..., None]).to(dtype),
            carry=(end_BC == before_BC).to(dtype),
        )

    def of(self, rows: slice, chunks: slice) -> Boundaries:
        """The factors of one tile; its rows and chunks become one dimension."""
        if self.to_end is None or self.from_before is None or self.carry is None:
            return self
        parts = (self.mask, self.to_end, self.from_before, self.carry)
        return Boundaries(*(part[rows, chunks].flatten(0, 1) for part in parts))


@dataclass(frozen=True, slots=True)
class Decays:
    """Decay factors of one tile; `steps` is the sum of log decays since the document's first token in the chunk."""

    steps_chq: Tensor
    to_end_cqh: Tensor
    from_before_cqh: Tensor
    carry_ch: Tensor

    @staticmethod
    def build(log_decay_cqh: Tensor, boundaries: Boundaries) -> Decays:
        """Sums with the 0/1 mask as a matmul, so that no value of another document enters, not even as rounding."""
        floor = EXPONENT_FLOOR[log_decay_cqh.dtype]
        steps_cqh = torch.matmul(boundaries.mask, log_decay_cqh)
        end_c1h = steps_cqh[:, -1:]
        to_end = (end_c1h - steps_cqh).clamp_(floor, 0.0).exp_()
        from_before = steps_cqh.clamp(floor, 0.0).exp_()
        carry = end_c1h[:, 0].clamp(floor, 0.0).exp_()
        if boundaries.to_end is not None and boundaries.from_before is not None and boundaries.carry is not None:
            to_end *= boundaries.to_end[..., None]
            from_before *= boundaries.from_before[..., None]
            carry *= boundaries.carry[..., None]
        return Decays(steps_cqh.transpose(1, 2).contiguous(), to_end, from_before, carry)

    def between(self) -> Tensor:
        """(c, h, q, q): decay from token j to token i; finite but without meaning where the mask is 0."""
        pairs = self.steps_chq[..., :, None] - self.steps_chq[..., None, :]
        return pairs.clamp_(EXPONENT_FLOOR[pairs.dtype], 0.0).exp_()


@dataclass(frozen=True, slots=True)
class Tile:
    """Some chunks of some rows, for the heads of one group."""

    rows: slice
    chunks: slice
    group: int
    heads: slice

    def of_heads(self, values_BCqH: Tensor) -> Tensor:
        """(c, q, h, ...): this tile of a tensor with one value or vector per head."""
        return values_BCqH[self.rows, self.chunks, :, self.heads].flatten(0, 1)

    def of_group(self, values_BCqGN: Tensor) -> Tensor:
        """(c, q, N): this tile of B or C."""
        return values_BCqGN[self.rows, self.chunks, :, self.group].flatten(0, 1)

    def put_heads(self, values_BCqH: Tensor, tile: Tensor) -> None:
        """Writes (c, q, h, ...) back."""
        target = values_BCqH[self.rows, self.chunks, :, self.heads]
        target.copy_(tile.view(target.shape))

    def put_group(self, values_BCqGN: Tensor, tile: Tensor) -> None:
        """Writes (c, q, N) back."""
        target = values_BCqGN[self.rows, self.chunks, :, self.group]
        target.copy_(tile.view(target.shape))


def tiles(x_BCqHP: Tensor, groups: int) -> Iterator[Tile]:
    """Cuts the work in the order in which states flow: chunks innermost. A GPU takes everything as one tile."""
    batch, chunks, size, heads = x_BCqHP.shape[:4]
    tokens = max(TILE_TOKENS, 1024 * torch.get_num_threads()) if x_BCqHP.device.type == "cpu" else x_BCqHP.numel()
    rows_per_tile = max(1, min(batch, tokens // (chunks * size)))
    chunks_per_tile = max(1, min(chunks, tokens // size))
    width = heads // groups
    for row in range(0, batch, rows_per_tile):
        for group in range(groups):
            for start in range(0, chunks, chunks_per_tile):
                yield Tile(
                    rows=slice(row, min(row + rows_per_tile, batch)),
                    chunks=slice(start, min(start + chunks_per_tile, chunks)),
                    group=group,
                    heads=slice(group * width, (group + 1) * width),
                )
