"""How long the kernels take, beside what the chip allows."""

from __future__ import annotations

from collections.abc import Callable
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
    SHAPES,
    STATE,
    WIDTH,
    Run,
    delta_inputs,
    device_ms,
    documents,
    mamba2_layer,
    median_ms,
    normal,
    profile,
    scan_inputs,
    ssd_inputs,
    summed_and_normed,
    time_both,
    token_spreads,
)
from longspan.ops import kernels
from longspan.ops.attention import attention
from longspan.ops.causal_conv import causal_conv
from longspan.ops.flex_attention import flex_block_mask
from longspan.ops.gated_delta import gated_delta
from longspan.ops.selective_scan import selective_scan
from longspan.ops.ssd import ssd


def bench_conv(run: Run) -> None:
    # Forward: x and y; backward: x, dy and dx.
    floor = run.floor_ms(5 * 65_536 * CONVOLVED * 2, 0)
    for rows, time in SHAPES:
        wide = normal(rows, time, PROJECTED)
        leaves = [wide[..., INNER : INNER + CONVOLVED], normal(CONVOLVED, 4, dtype=FP32), normal(CONVOLVED, dtype=FP32)]
        doc = documents(rows, time, 700.0)
        without = time_both(run, f"conv {rows}x{time}", lambda *z: [causal_conv(*z)[0]], leaves, floor)
        with_documents = time_both(
            run, f"conv {rows}x{time} documents", lambda *z, doc=doc: [causal_conv(*z, doc_BT=doc)[0]], leaves, floor
        )
        run.add(f"conv {rows}x{time} isolation", costs=with_documents / without - 1)


def ssd_floor(run: Run) -> float:
    tokens, chunk = 65_536, 64
    wide, narrow, states = tokens * INNER * 2, tokens * STATE * 2, tokens // chunk * INNER * STATE * 2
    # Forward x, B, C, y and the states; backward x, B, C, dy, the states and dx, dB, dC, each once.
    moved = (2 * wide + 2 * narrow + states) + (3 * wide + 4 * narrow + states)
    flops = 3 * tokens * (chunk * (STATE + INNER) + 4 * INNER * STATE)
    return run.floor_ms(moved, flops)


def bench_ssd(run: Run) -> None:
    floor = ssd_floor(run)
    for rows, time in SHAPES:
        leaves = ssd_inputs(rows, time, HEADS, HEAD_DIM, STATE)
        doc = documents(rows, time, 700.0)
        without = time_both(run, f"ssd {rows}x{time}", lambda *z: ssd(*z)[:1], leaves, floor)
        with_documents = time_both(
            run, f"ssd {rows}x{time} documents", lambda *z, doc=doc: ssd(*z, doc_BT=doc)[:1], leaves, floor
        )
        run.add(f"ssd {rows}x{time} isolation", costs=with_documents / without - 1)


def profile_ssd(run: Run) -> None:
    for rows, time in SHAPES:
        leaves = [z.requires_grad_() for z in ssd_inputs(rows, time, HEADS, HEAD_DIM, STATE)]
        slope = normal(rows, time, HEADS, HEAD_DIM)
        profile(
            run,
            f"ssd {rows}x{time}",
            lambda leaves=leaves, slope=slope: torch.autograd.grad(ssd(*leaves)[0], leaves, slope),
        )


def bench_norm(run: Run) -> None:
    from longspan.models.norms import GatedRMSNorm

    norm = GatedRMSNorm(INNER, 1e-5).to(DEVICE)
    norm.init_weights()
    y, z = normal(32, 2048, INNER), normal(32, 2048, INNER)
    floor = run.floor_ms(8 * 65_536 * INNER * 2, 0)
    time_both(run, "gated norm", lambda *t: [norm(*t)], [y, z], floor)


def bench_stream(run: Run) -> None:
    """The residual stream with a branch added, and its norm: one op, and as a compiler fuses plain ops in fp32."""
    from longspan.ops.triton import residual

    near, rest, branch, slope = (normal(8, 4096, WIDTH) for _ in range(4))
    weight, out = normal(WIDTH, dtype=FP32), (torch.empty_like(near), torch.empty_like(near))
    run.add(
        "stream and norm, 32,768 tokens",
        forward_ms=device_ms(lambda: residual.run_forward(near, rest, branch, weight, 1e-5, BF16)),
        backward_ms=device_ms(lambda: residual.run_backward(near, rest, branch, slope, weight, 1e-5, out)),
        forward_floor_ms=run.floor_ms(6 * near.numel() * 2, 0),
        backward_floor_ms=run.floor_ms(6 * near.numel() * 2, 0),
    )
    compiled = torch.compile(summed_and_normed, dynamic=False)
    leaves = [near.float().requires_grad_(), branch.requires_grad_(), weight.requires_grad_()]
    slopes = [torch.randn_like(z) for z in leaves[:2]]
    profile(run, "sum and norm, compiled", lambda: torch.autograd.grad(compiled(*leaves), leaves, slopes))


def bench_embedding(run: Run) -> None:
    """The gradient alone, by torch's kernels and by ours."""
    from longspan.ops.triton.embedding import embedding_backward

    dy, vocab = normal(8, 4096, WIDTH, dtype=FP32), 32_000
    # What comes is read once, what goes is filled with zeros and then written where there is something.
    floor = run.floor_ms((dy.numel() + 2 * vocab * WIDTH) * 4, 0)
    for kind, tokens in token_spreads(8, 4096, vocab).items():
        torchs = device_ms(lambda t=tokens: torch.ops.aten.embedding_dense_backward(dy, t, vocab, -1, False))
        ours = device_ms(lambda t=tokens: embedding_backward(dy, t, vocab))
        run.add(f"gradient of an embedding, {kind}", ms=ours, torch_ms=torchs, floor_ms=floor)


def bench_layer(run: Run) -> None:
    from longspan.models.segments import Segments

    mixer = mamba2_layer()
    products = 6 * 65_536 * WIDTH * (PROJECTED + INNER)
    # Beside the products: convolution, scan and norm at their floors.
    rest = run.floor_ms(5 * 65_536 * CONVOLVED * 2 + 8 * 65_536 * INNER * 2, 0) + ssd_floor(run)
    floor = run.floor_ms(0, products) + rest
    for rows, time in SHAPES:
        x = normal(rows, time, WIDTH)
        for doc in (None, documents(rows, time, 700.0)):
            segments = Segments.build(doc, shape=(rows, time), device=DEVICE)
            name = f"mamba2 layer {rows}x{time}" + ("" if doc is None else " documents")

            def layer(x: Tensor, *_: Tensor, segments: Segments = segments) -> list[Tensor]:
                with torch.autocast("cuda", dtype=BF16):
                    return [mixer(x, segments, None)[0]]

            torch.cuda.reset_peak_memory_stats()
            parameters = list(mixer.parameters())
            leaves = [x.requires_grad_(), *parameters]
            slope = normal(rows, time, WIDTH)
            both = median_ms(lambda f=layer, v=leaves, s=slope: torch.autograd.grad(f(*v), v, s))
            peak = torch.cuda.max_memory_allocated() / 2**30
            run.add(name, both_ms=both, floor_ms=floor, of_floor=floor / both, peak_GiB=peak)
    profile(run, name, lambda: torch.autograd.grad(layer(*leaves), leaves, slope))


def bench_scan(run: Run) -> None:
    """Mamba-1; no product spans tokens, so what counts beside bytes is the exponentials."""
    tokens = 65_536
    floor = run.floor_ms(tokens * INNER * (2 + 4 + 2) + tokens * INNER * (2 + 4 + 2 + 2 + 4), 0)
    for rows, time in SHAPES:
        leaves = scan_inputs(rows, time, INNER, 16)
        doc = documents(rows, time, 700.0)
        time_both(
            run, f"scan {rows}x{time} documents", lambda *z, doc=doc: selective_scan(*z, doc_BT=doc)[:1], leaves, floor
        )
        leaves, slope = [z.requires_grad_() for z in leaves], normal(rows, time, INNER)
        scan = lambda v=leaves, d=doc: selective_scan(*v, doc_BT=d)[0]  # noqa: E731
        profile(run, f"scan {rows}x{time}", lambda f=scan, v=leaves, s=slope: torch.autograd.grad(f(), v, s))


def bench_delta(run: Run) -> None:
    """Gated DeltaNet at 3/4 of the width in keys and twice that in values."""
    keys, values, chunk = DELTA_HEADS * 64, DELTA_HEADS * 128, 64
    # Forward q, k, v, o and the states; backward q, k, v, do, the states and dq, dk, dv, each once.
    moved = 65_536 * 2 * ((2 * keys + 2 * values + values * 64 / chunk) * 2 + 2 * keys + values)
    flops = 3 * 65_536 * (chunk * (3 * keys + 2 * values) + 6 * values * 64)
    floor = run.floor_ms(moved, flops)
    for rows, time in SHAPES:
        leaves = delta_inputs(rows, time, DELTA_HEADS, 64, 128)
        doc = documents(rows, time, 700.0)
        time_both(run, f"delta {rows}x{time}", lambda *z: gated_delta(*z)[:1], leaves, floor)
        scan = lambda *z, doc=doc: gated_delta(*z, doc_BT=doc)[:1]  # noqa: E731
        time_both(run, f"delta {rows}x{time} documents", scan, leaves, floor)
        leaves = [z.requires_grad_() for z in leaves]
        slope = normal(rows, time, DELTA_HEADS, 128)
        profile(run, f"delta {rows}x{time}", lambda v=leaves, s=slope, f=scan: torch.autograd.grad(f(*v), v, s))


def bench_attention(run: Run) -> None:
    """Isolated documents of about 700 tokens; operations are counted inside documents alone."""
    for rows, time in SHAPES:
        doc = documents(rows, time, 700.0)
        mask = flex_block_mask(doc)
        starts = F.pad((doc[:, 1:] != doc[:, :-1]), (1, 0), value=True).flatten().nonzero()[:, 0]
        lengths = torch.diff(starts, append=starts.new_tensor([rows * time])).double()
        flops = 3.5 * 2 * float((lengths**2).sum()) * WIDTH
        leaves = [normal(rows, time, 12, 64) for _ in range(3)]
        time_both(
            run,
            f"attention {rows}x{time} documents",
            lambda *z, doc=doc, mask=mask: [attention(*z, q_doc_BT=doc, backend="flex", block_mask=mask)],
            leaves,
            run.floor_ms(12 * 65_536 * WIDTH * 2, flops),
            mask_ms=median_ms(lambda doc=doc: flex_block_mask(doc)),
        )


def bench_plain(run: Run) -> None:
    """What the same ops cost in plain torch, at fewer tokens and scaled up: the whole needs more memory."""
    before = kernels.choose("plain")
    rows, time = 4, 2048
    scale = 65_536 / (rows * time)
    try:
        leaves = [z.requires_grad_() for z in ssd_inputs(rows, time, HEADS, HEAD_DIM, STATE)]
        slope = normal(rows, time, HEADS, HEAD_DIM)
        both = median_ms(lambda: torch.autograd.grad(ssd(*leaves)[0], leaves, slope))
        run.add("ssd plain torch, scaled", both_ms=both * scale)
        x, weight = normal(rows, time, CONVOLVED).requires_grad_(), normal(CONVOLVED, 4, dtype=FP32).requires_grad_()
        both = median_ms(lambda: torch.autograd.grad(causal_conv(x, weight, None)[0].sum(), (x, weight)))
        run.add("conv plain torch, scaled", both_ms=both * scale)
    finally:
        kernels.choose(before)


def bench_step(run: Run, *patterns: str) -> None:
    from longspan.models.budget import training_flops_per_token
    from longspan.models.language_model import LanguageModel, ModelConfig

    vocab = 32_000
    shapes = {
        "M": ModelConfig(pattern="M" * 24, width=WIDTH, heads=12, state=STATE, mlp="none"),
        "AM": ModelConfig(pattern="AM" * 6, width=WIDTH, heads=12, state=STATE, mlp_width=1536),
        "A": ModelConfig(pattern="A" * 12, width=WIDTH, heads=12, mlp_width=2048),
    }
    for name, config in ((name, shapes[name]) for name in patterns):
        model = LanguageModel(config, vocab, seed=0, device=DEVICE)
        optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-4, fused=True)
        size = sum(p.numel() for p in model.parameters())
        for rows, time in ((8, 4096), (1, 32768)) if name == "M" else ((8, 4096),):
            tokens = torch.randint(0, vocab, (rows, time), device=DEVICE)
            doc = documents(rows, time, 700.0)
            segments = model.segments(tokens, doc)

            def step(tokens: Tensor = tokens, segments: Any = segments, model: Any = model, optimizer: Any = optimizer):
                with torch.autocast("cuda", dtype=BF16):
                    nll, count = model.loss(tokens, tokens, segments)
                (nll / count).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

            try:
                torch.cuda.reset_peak_memory_stats()
                step()
                ms = median_ms(step, rep=500)
            except torch.OutOfMemoryError:
                run.add(f"step {name} {rows}x{time}", error="out of memory")
                continue
            rate = rows * time / ms * 1e3
            used = rate * training_flops_per_token(config, vocab, time) / run.flops_per_second
            peak = torch.cuda.max_memory_allocated() / 2**30
            run.add(
                f"step {name} {rows}x{time}",
                ms=ms,
                tok_s=rate,
                of_matmul=used,
                peak_GiB=peak,
                parameters=size,
                eager=True,
            )
        del model, optimizer


# Most important first. FlexAttention is compiled by inductor, slowly, and comes late for that.
TIMES: dict[str, Callable[[Run], None]] = {
    "conv": bench_conv,
    "ssd": bench_ssd,
    "profile ssd": profile_ssd,
    "norm": bench_norm,
    "stream": bench_stream,
    "embedding": bench_embedding,
    "layer": bench_layer,
    "scan": bench_scan,
    "delta": bench_delta,
    "step M": lambda run: bench_step(run, "M"),
    "step A": lambda run: bench_step(run, "A", "AM"),
    "attention": bench_attention,
    "plain": bench_plain,
}
