"""How fast the ops train on this CPU, each against the plain way of writing it in PyTorch.

    python benchmarks/ops_cpu.py [--threads 1] [--repeats 7] [--rows 8] [--context 512] [--only ssd,conv]

Every line times forward and backward in fp32, after two warm-up calls. Both sides of a line take turns, so that what
else the machine does meets both; times are medians, the ratio is the median of the ratios of the turns. Prints a table
and, as its last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.ops.attention import attention
from longspan.ops.causal_conv import causal_conv
from longspan.ops.gru import gru
from longspan.ops.linear_cross_entropy import linear_cross_entropy
from longspan.ops.lstm import lstm
from longspan.ops.ssd import ssd

WARM_UP = 2
WIDTH, VOCAB, HEADS, HEAD_DIM, STATE = 256, 8192, 8, 64, 64


class Line(NamedTuple):
    """One comparison: what it is, both contestants, and the tensors that want gradients."""

    op: str
    setting: str
    baseline_name: str
    baseline: Callable[[], Tensor]
    ours: Callable[[], Tensor]
    leaves: list[Tensor]


def plain_ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, size: int) -> Tensor:
    """The chunked matmul form as one writes it first, left to autograd; one group, no documents."""
    batch, _, heads, head_dim = x.shape
    steps = (dt * A).view(batch, -1, size, heads).transpose(2, 3).cumsum(-1)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    decay = (steps[..., :, None] - steps[..., None, :]).masked_fill(~causal, -torch.inf).exp()
    driven = (x * dt[..., None]).view(batch, -1, size, heads, head_dim).transpose(2, 3)
    inward, outward = (z.view(batch, -1, 1, size, z.shape[-1]) for z in (B, C))
    within = (outward @ inward.mT * decay) @ driven
    gained = (driven * (steps[..., -1:] - steps).exp()[..., None]).mT @ inward
    state, states = torch.zeros_like(gained[:, 0]), []
    for c in range(gained.shape[1]):
        states.append(state)
        state = steps[:, c, :, -1].exp()[..., None, None] * state + gained[:, c]
    across = (outward @ torch.stack(states, 1).mT) * steps.exp()[..., None]
    return (within + across).transpose(2, 3).reshape(x.shape) + D[:, None] * x


def leaf(*shape: int, scale: float = 1.0) -> Tensor:
    """A seeded leaf tensor."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(*shape, generator=generator) * scale).requires_grad_()


def documents(rows: int, context: int, length: int) -> Tensor:
    """Random boundaries, `length` tokens apart on average."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(rows, context, generator=generator) < 1 / length).cumsum(1).int()


def ssd_lines(rows: int, context: int) -> Iterator[Line]:
    x, D = leaf(rows, context, HEADS, HEAD_DIM), leaf(HEADS)
    B, C = leaf(rows, context, 1, STATE), leaf(rows, context, 1, STATE)
    dt = F.softplus(leaf(rows, context, HEADS).detach() - 4.0).requires_grad_()
    A = (-torch.linspace(1, 16, HEADS)).requires_grad_()
    leaves = [x, dt, A, B, C, D]
    doc = documents(rows, context, 128)
    for chunk in (32, 64, 128):
        yield Line(
            "ssd",
            f"chunk {chunk}",
            "plain chunked, 64",
            lambda: plain_ssd(*leaves, 64),
            lambda chunk=chunk: ssd(*leaves, chunk=chunk)[0],
            leaves,
        )
    yield Line(
        "ssd",
        "chunk 64, documents",
        "plain chunked, none",
        lambda: plain_ssd(*leaves, 64),
        lambda: ssd(*leaves, doc_BT=doc)[0],
        leaves,
    )


def conv_lines(rows: int, context: int) -> Iterator[Line]:
    channels, taps = HEADS * HEAD_DIM + 2 * STATE, 4
    x, weight, bias = leaf(rows, context, channels), leaf(channels, taps), leaf(channels)
    doc = documents(rows, context, 128)

    def library() -> Tensor:
        y = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=taps - 1, groups=channels)
        return F.silu(y[..., :context].transpose(1, 2))

    for setting, ids in (("one document", None), ("documents", doc)):
        yield Line(
            "causal_conv",
            setting,
            "F.conv1d + silu",
            library,
            lambda ids=ids: causal_conv(x, weight, bias, doc_BT=ids)[0],
            [x, weight, bias],
        )


def cross_entropy_lines(rows: int, context: int) -> Iterator[Line]:
    hidden, weight = leaf(rows * context, WIDTH), leaf(VOCAB, WIDTH, scale=0.02)
    targets = torch.randint(0, VOCAB, (rows * context,), generator=torch.Generator().manual_seed(0))
    yield Line(
        "linear_cross_entropy",
        f"vocabulary {VOCAB}",
        "F.cross_entropy",
        lambda: F.cross_entropy(hidden @ weight.T, targets, reduction="sum"),
        lambda: linear_cross_entropy(hidden, weight, targets),
        [hidden, weight],
    )


def attention_lines(rows: int, context: int) -> Iterator[Line]:
    leaves = [leaf(rows, context, WIDTH // HEAD_DIM, HEAD_DIM) for _ in range(3)]
    doc = documents(rows, context, 128)
    same = doc[:, None, :, None] == doc[:, None, None, :]
    mask = same & torch.ones(context, context, dtype=torch.bool).tril()

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in leaves), attn_mask=mask).transpose(1, 2)

    yield Line("attention", "documents", "SDPA, bool mask", masked, lambda: attention(*leaves, q_doc_BT=doc), leaves)
    distance = torch.arange(context)[:, None] - torch.arange(context)
    for window in (32, 128, 512):
        if window < context:
            band = (distance >= 0) & (distance < window)

            def banded(band: Tensor = band) -> Tensor:
                heads_first = (z.transpose(1, 2) for z in leaves)
                return F.scaled_dot_product_attention(*heads_first, attn_mask=band).transpose(1, 2)

            yield Line(
                "attention",
                f"window {window}",
                "SDPA, bool mask",
                banded,
                lambda window=window: attention(*leaves, window=window),
                leaves,
            )


def gru_lines(rows: int, context: int) -> Iterator[Line]:
    x, weights = leaf(rows, context, WIDTH), [leaf(3 * WIDTH, WIDTH, scale=0.05) for _ in range(2)]
    doc = documents(rows, context, 128)
    yield Line(
        "gru",
        "documents",
        "loop over time",
        lambda: gru(x, *weights, doc_BT=doc, backend="reference")[0],
        lambda: gru(x, *weights, doc_BT=doc)[0],
        [x, *weights],
    )
    biases = [torch.zeros(3 * WIDTH, requires_grad=True) for _ in range(2)]
    yield Line(
        "gru",
        "one document",
        "torch.gru",
        lambda: torch.gru(x, x.new_zeros(1, rows, WIDTH), [*weights, *biases], True, 1, 0.0, False, False, True)[0],
        lambda: gru(x, *weights, *biases)[0],
        [x, *weights, *biases],
    )


def lstm_lines(rows: int, context: int) -> Iterator[Line]:
    x, weights = leaf(rows, context, WIDTH), [leaf(4 * WIDTH, WIDTH, scale=0.05) for _ in range(2)]
    doc = documents(rows, context, 128)
    yield Line(
        "lstm",
        "documents",
        "loop over time",
        lambda: lstm(x, *weights, doc_BT=doc, backend="reference")[0],
        lambda: lstm(x, *weights, doc_BT=doc)[0],
        [x, *weights],
    )
    biases = [torch.zeros(4 * WIDTH, requires_grad=True) for _ in range(2)]
    zeros = x.new_zeros(1, rows, WIDTH)
    yield Line(
        "lstm",
        "one document",
        "torch.lstm",
        lambda: torch.lstm(x, (zeros, zeros), [*weights, *biases], True, 1, 0.0, False, False, True)[0],
        lambda: lstm(x, *weights, *biases)[0],
        [x, *weights, *biases],
    )


LINES = {
    "ssd": ssd_lines,
    "conv": conv_lines,
    "cross_entropy": cross_entropy_lines,
    "attention": attention_lines,
    "gru": gru_lines,
    "lstm": lstm_lines,
}


def milliseconds(run: Callable[[], Tensor], leaves: list[Tensor], slope: Tensor) -> float:
    start = time.perf_counter()
    torch.autograd.grad(run(), leaves, slope)
    return (time.perf_counter() - start) * 1e3


def measure(line: Line, repeats: int) -> dict[str, Any]:
    slope = torch.randn(line.ours().shape, generator=torch.Generator().manual_seed(1))
    turns = [
        tuple(milliseconds(run, line.leaves, slope) for run in (line.baseline, line.ours))
        for _ in range(WARM_UP + repeats)
    ][WARM_UP:]
    return {
        "op": line.op,
        "setting": line.setting,
        "baseline": line.baseline_name,
        "baseline_ms": round(statistics.median(turn[0] for turn in turns), 2),
        "ms": round(statistics.median(turn[1] for turn in turns), 2),
        "ratio": round(statistics.median(turn[0] / turn[1] for turn in turns), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--only", default=",".join(LINES), help="comma-separated, of: " + ", ".join(LINES))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(
        f"torch {torch.__version__}, {arguments.threads} threads, fp32, {arguments.rows} rows of {arguments.context} "
        f"tokens, forward + backward, {WARM_UP} warm-up calls, median of {arguments.repeats}"
    )
    print(f"{'op':22}{'setting':22}{'baseline':22}{'baseline ms':>12}{'ms':>10}{'ratio':>8}")
    results = []
    for name in arguments.only.split(","):
        for line in LINES[name](arguments.rows, arguments.context):
            row = measure(line, arguments.repeats)
            results.append(row)
            print(
                f"{row['op']:22}{row['setting']:22}{row['baseline']:22}"
                f"{row['baseline_ms']:12.1f}{row['ms']:10.1f}{row['ratio']:8.2f}",
                flush=True,
            )
    settings = {"torch": torch.__version__, "warm_up": WARM_UP, **vars(arguments)}
    print(json.dumps({"benchmark": "ops_cpu", "settings": settings, "results": results}))


if __name__ == "__main__":
    main()
