"""The scans over time, what they are fed in tests, and what two forms of one are compared by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from longspan.ops.gated_delta import gated_delta
from longspan.ops.selective_scan import selective_scan
from longspan.ops.ssd import ssd

Normal = Callable[..., Tensor]


@dataclass(frozen=True)
class Scan:
    """One of them.

    Attributes:
        op: the scan, of inputs in the order of `names`.
        names: of its inputs; the state before it comes last.
        constants: those among them that have no tokens.
        state_argument: what the op calls that state.
        values: the inputs of a batch of so many rows and tokens in fp64, drawn by a generator.
    """

    op: Callable[..., tuple[Tensor, Tensor]]
    names: tuple[str, ...]
    constants: str
    state_argument: str
    values: Callable[..., Sequence[Tensor]]

    def inputs(
        self, batch: int, time: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: Any
    ) -> dict[str, Tensor]:
        """Random ones by name."""
        generator = torch.Generator().manual_seed(seed)
        drawn = self.values(generator, batch, time, **sizes)
        return {name: value.to(dtype) for name, value in zip(self.names, drawn, strict=True)}

    def run(
        self,
        given: Mapping[str, Tensor],
        doc: Tensor | None = None,
        initial_doc: Tensor | None = None,
        chunk: int = 8,
        backend: str = "chunked",
        with_state: bool = True,
    ) -> list[Tensor]:
        """Both outputs, then the gradients of a random but fixed linear loss on them."""
        *inputs, state = (value.detach().clone().requires_grad_() for value in given.values())
        before = {self.state_argument: state} if with_state else {}
        outputs = self.op(*inputs, doc_BT=doc, initial_doc_B=initial_doc, chunk=chunk, backend=backend, **before)
        generator = torch.Generator().manual_seed(99)
        weights = [torch.randn(z.shape, generator=generator, dtype=torch.float64).to(z.dtype) for z in outputs]
        wanted = [*inputs, state] if with_state else inputs
        loss = sum((z * weight).sum() for z, weight in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        return [*outputs, *(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, gradients, strict=True))]

    def part(
        self,
        given: Mapping[str, Tensor],
        span: slice = slice(None),
        *,
        doc: Tensor | None = None,
        state: Tensor | None = None,
        last_doc: Tensor | None = None,
        **settings: Any,
    ) -> tuple[Tensor, Tensor]:
        """Outputs for some of the tokens, from the state before them and the document that it is of."""
        inputs = [given[n] if n in self.constants else given[n][:, span] for n in self.names[:-1]]
        settings |= {"doc_BT": None if doc is None else doc[:, span], "initial_doc_B": last_doc}
        return self.op(*inputs, **{self.state_argument: state}, **settings)


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-11) -> None:
    """Within `tolerance` of the largest entry, or of 1 where that is larger."""
    for i, (one, other) in enumerate(zip(got, expected, strict=False)):
        scale = other.abs().max().clamp_min(1.0)
        assert (one.double() - other.double()).abs().max() <= tolerance * scale, f"result {i}"


def _normal(generator: torch.Generator) -> Normal:
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def _ssd(
    generator: torch.Generator,
    batch: int,
    time: int,
    heads: int = 4,
    head_dim: int = 3,
    groups: int = 1,
    state: int = 5,
) -> Sequence[Tensor]:
    normal = _normal(generator)
    return (
        normal(batch, time, heads, head_dim),
        softplus(normal(batch, time, heads) - 1.0),
        -torch.rand(heads, generator=generator, dtype=torch.float64) * 8.0 - 0.1,
        normal(batch, time, groups, state),
        normal(batch, time, groups, state),
        normal(heads),
        normal(batch, heads, head_dim, state),
    )


def _selective_scan(
    generator: torch.Generator, batch: int, time: int, channels: int = 5, state: int = 3
) -> Sequence[Tensor]:
    normal = _normal(generator)
    return (
        normal(batch, time, channels),
        softplus(normal(batch, time, channels) - 1.0),
        -torch.rand(channels, state, generator=generator, dtype=torch.float64) * 8.0 - 0.1,
        normal(batch, time, state),
        normal(batch, time, state),
        normal(channels),
        normal(batch, state, channels),
    )


def _gated_delta(
    generator: torch.Generator,
    batch: int,
    time: int,
    heads: int = 3,
    key_dim: int = 4,
    value_dim: int = 5,
    largest_beta: float = 1.0,
) -> Sequence[Tensor]:
    normal = _normal(generator)
    return (
        normal(batch, time, heads, key_dim),
        normal(batch, time, heads, key_dim),
        normal(batch, time, heads, value_dim),
        -softplus(normal(batch, time, heads) - 1.0),
        torch.rand(batch, time, heads, generator=generator, dtype=torch.float64) * largest_beta,
        normal(batch, heads, key_dim, value_dim),
    )


MAMBA = ("x", "dt", "A", "B", "C", "D", "state")
SSD = Scan(ssd, MAMBA, "AD", "initial_state_BHPN", _ssd)
SELECTIVE_SCAN = Scan(selective_scan, MAMBA, "AD", "initial_state_BNE", _selective_scan)
GATED_DELTA = Scan(gated_delta, ("q", "k", "v", "g", "beta", "state"), "", "initial_state_BHKV", _gated_delta)
