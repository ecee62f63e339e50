"""The kernels against the plain ops in fp64, on fresh random documents and poisoned memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels_on_gpu.measuring import (
    BF16,
    CONVOLVED,
    DELTA_HEADS,
    DEVICE,
    FP32,
    HEAD_DIM,
    HEADS,
    INNER,
    PROJECTED,
    STATE,
    WIDTH,
    Run,
    delta_inputs,
    documents,
    mamba2_layer,
    normal,
    scan_inputs,
    ssd_inputs,
    streamed,
    summed_and_normed,
    token_spreads,
)
from longspan.ops import kernels
from longspan.ops.attention import attention
from longspan.ops.causal_conv import causal_conv
from longspan.ops.embedding import embedding
from longspan.ops.flex_attention import flex_block_mask
from longspan.ops.gated_delta import gated_delta
from longspan.ops.selective_scan import selective_scan
from longspan.ops.ssd import ssd

TOLERANCE = {FP32: 1e-4, BF16: 1e-2}


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that an op takes holds NaN, so that what it never writes shows."""
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch._C._set_deterministic_algorithms(False)


def both_ways(function: Callable[..., Sequence[Tensor]], leaves: Sequence[Tensor]) -> list[Tensor]:
    outputs = function(*leaves)
    generator = torch.Generator(DEVICE).manual_seed(1)
    slopes = [torch.randn(y.shape, device=DEVICE, generator=generator).to(BF16).to(y.dtype) for y in outputs]
    return [*(y.detach() for y in outputs), *torch.autograd.grad(list(outputs), list(leaves), slopes)]


def compare(
    run: Run,
    name: str,
    kernel: Callable[..., Sequence[Tensor]],
    plain: Callable[..., Sequence[Tensor]],
    leaves: Sequence[Tensor],
    roundings: int = 1,
) -> None:
    """Values and gradients of the kernel against the plain op in fp64."""
    leaves = [z.detach().requires_grad_() for z in leaves]
    with poisoned():
        ours = both_ways(kernel, leaves)
        again = both_ways(kernel, leaves)
    before = kernels.choose("plain")
    exact = both_ways(plain, [z.detach().double().requires_grad_() for z in leaves])
    kernels.choose(before)
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(ours, exact, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    limit = roundings * max(TOLERANCE[z.dtype] for z in leaves)
    right = max(errors) < limit and all(e == e for e in errors)
    run.add(f"check {name}", right=right, same_bits=same, worst=max(errors), errors=[f"{e:.1e}" for e in errors])
    if not right:
        run.failed.append(f"check {name}: {max(errors):.1e}")


def check_conv(run: Run) -> None:
    for dtype, rows, time, channels in ((BF16, 3, 1000, CONVOLVED), (FP32, 2, 77, 100)):
        doc = documents(rows, time, 20.0)
        leaves = [normal(rows, time, channels, dtype=dtype), normal(channels, 4, dtype=FP32)]
        leaves.append(normal(channels, dtype=FP32))
        compare(
            run,
            f"conv {dtype} T={time}",
            lambda *z, doc=doc: [causal_conv(*z, doc_BT=doc)[0]],
            lambda *z, doc=doc: [causal_conv(*z, doc_BT=doc)[0]],
            leaves,
        )


def check_embedding(run: Run) -> None:
    """Every token seldom, and a few of them in most places."""
    for kind, tokens in token_spreads(8, 512, 1000).items():
        embed = lambda weight, tokens=tokens: [embedding(tokens, weight)]  # noqa: E731
        compare(run, f"embedding {kind}", embed, embed, [normal(1000, WIDTH, dtype=FP32)])


def check_ssd(
    dtype: torch.dtype, rows: int, time: int, heads: int, head_dim: int, state: int, mean: float, goes_on: bool = False
) -> Callable[[Run], None]:
    """Documents of `mean` tokens; goes on from states, one of which is of another document."""

    def check(run: Run) -> None:
        doc = documents(rows, time, mean) + 1
        doc[:, 0] = torch.arange(rows, device=DEVICE) % 2 + doc[:, 1] - 1
        before = doc[:, 0].clone()
        before[0] -= 1
        leaves = ssd_inputs(rows, time, heads, head_dim, state, dtype)
        if goes_on:
            leaves.append(normal(rows, heads, head_dim, state, dtype=FP32))

        def scan(*z: Tensor) -> Sequence[Tensor]:
            past = {"initial_state_BHPN": z[6], "initial_doc_B": before} if goes_on else {}
            return ssd(*z[:6], doc_BT=doc, **past)

        compare(run, f"ssd {dtype} T={time} P={head_dim} N={state}", scan, scan, leaves)

    return check


def check_scan(run: Run) -> None:
    for dtype, rows, time, channels, state in ((BF16, 2, 300, INNER, 16), (FP32, 3, 77, 100, 7)):
        doc = documents(rows, time, 20.0)

        def scan(*z: Tensor, doc: Tensor = doc) -> Sequence[Tensor]:
            return selective_scan(*z, doc_BT=doc)

        compare(run, f"scan {dtype} T={time}", scan, scan, scan_inputs(rows, time, channels, state, dtype))


def check_delta(
    dtype: torch.dtype,
    rows: int,
    time: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    mean: float,
    goes_on: bool = False,
    chunk: int | None = None,
) -> Callable[[Run], None]:
    """As `check_ssd`; `chunk`: another than is used."""

    def check(run: Run) -> None:
        from longspan.ops.triton import gated_delta as launched

        if chunk is not None:
            launched.CUTS[dtype] = launched.CUTS[dtype]._replace(chunk=chunk)
        doc = documents(rows, time, mean) + 1
        before = doc[:, 0].clone()
        before[0] -= 1
        leaves = delta_inputs(rows, time, heads, key_dim, value_dim, dtype)
        if goes_on:
            leaves.append(normal(rows, heads, key_dim, value_dim, dtype=FP32))

        def scan(*z: Tensor) -> Sequence[Tensor]:
            past = {"initial_state_BHKV": z[5], "initial_doc_B": before} if goes_on else {}
            return gated_delta(*z[:5], doc_BT=doc, **past)

        name = f"delta {dtype} T={time} K={key_dim} V={value_dim} chunk={launched.CUTS[dtype].chunk}"
        compare(run, name, scan, scan, leaves, roundings=2)

    return check


def check_attention(run: Run) -> None:
    rows, time = 2, 700
    doc = documents(rows, time, 150.0)
    for window in (None, 200):
        mask = flex_block_mask(doc, window=window)
        rules: dict[str, Any] = {"q_doc_BT": doc, "window": window}
        compare(
            run,
            f"attention window {window}",
            lambda *z, rules=rules, mask=mask: [attention(*z, **rules, backend="flex", block_mask=mask)],
            lambda *z, rules=rules: [attention(*z, **rules, backend="reference")],
            [normal(rows, time, 12, 64) for _ in range(3)],
        )


def check_norm(run: Run) -> None:
    from longspan.models.norms import GatedRMSNorm, RMSNorm

    def apply(kind: type[RMSNorm], *z: Tensor) -> list[Tensor]:
        module = kind(z[-1].shape[0], 1e-5)
        del module.weight
        module.weight = z[-1]
        return [module(*z[:-1])]

    def plain(*z: Tensor) -> list[Tensor]:
        x = z[0] if len(z) == 2 else z[0] * F.silu(z[1])
        return [F.rms_norm(x, x.shape[-1:], z[-1], 1e-5)]

    for dtype, width in ((BF16, INNER), (FP32, 100)):
        leaves = [normal(2, 500, width, dtype=dtype), normal(2, 500, width, dtype=dtype), normal(width, dtype=FP32)]
        compare(run, f"gated norm {dtype}", lambda *z: apply(GatedRMSNorm, *z), plain, leaves)
        compare(run, f"norm {dtype}", lambda *z: apply(RMSNorm, *z), plain, [leaves[0], leaves[2]])
    leaves = [normal(2, 500, WIDTH, dtype=FP32), normal(2, 500, WIDTH), normal(WIDTH, dtype=FP32)]
    compare(run, "norms of a stream", streamed, lambda *z: [summed_and_normed(*z)[1]], leaves)


def check_layer(run: Run) -> None:
    from longspan.models.segments import Segments
    from longspan.ops import mamba2

    rows, time = 2, 500
    doc = documents(rows, time, 50.0)
    mixer = mamba2_layer()
    sizes = [INNER, CONVOLVED, HEADS]

    def plain(projected: Tensor, weight: Tensor, bias: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, w: Tensor):
        z, xBC, dt = projected.unflatten(0, (rows, time)).split_with_sizes(sizes, -1)
        x, B, C = causal_conv(xBC, weight, bias, doc_BT=doc)[0].split_with_sizes([INNER, STATE, STATE], -1)
        dt = F.softplus(dt + dt_bias)
        y, _ = ssd(x.unflatten(2, (HEADS, HEAD_DIM)), dt, -A_log.exp(), B[:, :, None], C[:, :, None], D, doc_BT=doc)
        return [F.rms_norm(y.flatten(2) * F.silu(z), (INNER,), w, 1e-5).flatten(0, 1)]

    parameters = (mixer.conv_weight, mixer.conv_bias, mixer.dt_bias, mixer.A_log, mixer.D, mixer.norm.weight)
    compare(
        run,
        "layer between projections",
        lambda *z: [mamba2.between_projections(*z, doc_BT=doc, rows=rows, state=STATE, eps=1e-5)],
        plain,
        [normal(rows * time, PROJECTED), *parameters],
        # A norm takes from dD most of what its terms are, but not their rounding.
        roundings=4,
    )
    x = normal(rows, time, WIDTH)
    segments = Segments.build(doc)
    with torch.no_grad(), torch.autocast("cuda", dtype=BF16):
        fused, _ = mixer(x, segments, None)
        before = kernels.choose("plain")
        stepwise, _ = mixer(x, segments, None)
        kernels.choose(before)
    error = float((fused.float() - stepwise.float()).norm() / stepwise.float().norm())
    run.add("check layer against plain torch", right=error < 2e-2, worst=error)
    if not error < 2e-2:
        run.failed.append(f"check layer against plain torch: {error:.1e}")


# Each in a process of its own: what a kernel does to a device outlives it there.
CHECKS: dict[str, Callable[[Run], None]] = {
    "check conv": check_conv,
    "check norm": check_norm,
    "check embedding": check_embedding,
    "check ssd": check_ssd(BF16, 2, 1024, HEADS, HEAD_DIM, STATE, 100.0),
    "check ssd segments": check_ssd(BF16, 1, 4096, HEADS, HEAD_DIM, STATE, 700.0, True),
    "check ssd segments without documents": check_ssd(BF16, 1, 4096, HEADS, HEAD_DIM, STATE, 1e9),
    "check ssd one-token documents": check_ssd(BF16, 2, 331, 4, HEAD_DIM, STATE, 1.0),
    "check ssd fp32": check_ssd(FP32, 2, 200, 4, HEAD_DIM, STATE, 30.0, True),
    "check ssd 24 40": check_ssd(BF16, 3, 200, 3, 24, 40, 30.0, True),
    "check ssd 8 4": check_ssd(BF16, 3, 200, 3, 8, 4, 30.0, True),
    "check ssd 128 128": check_ssd(BF16, 2, 200, 3, 128, 128, 30.0, True),
    "check layer": check_layer,
    "check scan": check_scan,
    "check delta": check_delta(BF16, 2, 1024, DELTA_HEADS, 64, 128, 100.0),
    "check delta fp32": check_delta(FP32, 2, 200, 4, 64, 128, 30.0, True),
    "check delta 128 64": check_delta(BF16, 2, 200, 3, 128, 64, 30.0, True),
    **{
        f"check delta {name} {k} {v}": check_delta(dtype, 3, 200, 3, k, v, 3.0, True)
        for name, dtype in (("bf16", BF16), ("fp32", FP32))
        for k, v in ((8, 40), (16, 32), (24, 40), (32, 8), (40, 16))
    },
    **{f"check delta chunk {q}": check_delta(BF16, 3, 200, 3, 24, 40, 20.0, True, q) for q in (16, 32)},
    "check attention": check_attention,
}
