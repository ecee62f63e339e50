"""The kernels of a decoding step say what the plain ops say in fp64."""

from __future__ import annotations

import pytest
import torch

from longspan.ops import kernels
from longspan.ops.conv_step import conv_step
from longspan.ops.decode_attention import decode_attention, place_token
from longspan.ops.delta_step import delta_step
from longspan.ops.mamba1_step import mamba1_step
from longspan.ops.mamba2_step import mamba2_step
from longspan.ops.rotary import Rotation

FP32, BF16 = torch.float32, torch.bfloat16
TOLERANCE = {FP32: 1e-5, BF16: 1e-2}


def close(found, exact, dtype):
    error = (found.cpu().double() - exact.cpu()).norm() / exact.norm()
    assert error < TOLERANCE[dtype], f"off by {float(error):.1e}"


def plainly(function, *tensors, **settings):
    before = kernels.choose("plain")
    try:
        return function(*tensors, **settings)
    finally:
        kernels.choose(before)


@pytest.fixture
def blocks(device, monkeypatch):
    """Several blocks and shares of keys at small shapes."""
    from longspan.ops.triton import decode_attention as launched

    if device.type == "cpu":
        monkeypatch.setattr(launched, "CUT", launched.Cut(16, 4, 1))
        monkeypatch.setattr(launched, "_multiprocessors", lambda device: 1)


# With one group there are 2 shares of the keys, with more there is one.
@pytest.mark.parametrize(("groups", "dtype"), [(1, FP32), (1, BF16), (2, BF16), (4, FP32)])
@pytest.mark.parametrize(("newest", "slots", "rules"), [
    (0, 36, {}), (32, 36, {}), (35, 36, {}),
    (100, 40, {"window": 40}), (100, 48, {"window": 40}), (20, 48, {"window": 40}),
    (30, 36, {"alibi_slopes_H": True}), (30, 36, {"head_windows_H": True}),
])  # fmt: skip
def test_attention_of_one_token(newest, slots, rules, groups, dtype, device, normal, served, blocks):
    rules = dict(rules)
    if "alibi_slopes_H" in rules:
        rules["alibi_slopes_H"] = torch.linspace(0, 0.5, 4).to(device)
    if "head_windows_H" in rules:
        rules["head_windows_H"] = torch.tensor([1, 3, 20, 0]).to(device)
    rows, size = 3, 24
    q, k, v = (
        normal(rows, 4, size),
        normal(rows, slots, groups, size, seed=1),
        normal(rows, slots, groups, size, seed=2),
    )
    if newest + 1 < slots:
        k[:, newest + 1 :], v[:, newest + 1 :] = torch.nan, torch.nan
    q, k, v = (z.to(device, dtype) for z in (q, k, v))
    place, first = torch.tensor([newest], device=device), torch.tensor([0, newest // 2, newest], dtype=torch.int32)
    first = first.to(device)
    exact = plainly(
        decode_attention, q.double(), k.nan_to_num().double(), v.nan_to_num().double(), place, first, **rules
    )
    close(decode_attention(q, k, v, place, first, **rules), exact, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("rotated", [None, 0, 2])
def test_placing_one_token(rotated, dtype, device, normal, served):
    qkv = normal(3, 4 + 2 * 4, 24).to(device, dtype)
    k, v = (normal(3, 9, 4, 24, seed=i).to(device, dtype) for i in (1, 2))
    rotation, rotation64 = None, None
    if rotated is not None:
        positions = torch.tensor([[3], [70], [900]], device=device)
        rotation = Rotation.build(positions, 24, 10_000.0)
        rotation64 = Rotation(*(each.double() for each in rotation))
    place = torch.tensor([25], device=device)
    exact_k, exact_v = k.double(), v.double()
    exact = plainly(place_token, qkv.double(), rotation64, rotated or 0, exact_k, exact_v, place)
    found = place_token(qkv, rotation, rotated or 0, k, v, place)
    for one, other in ((found, exact), (k, exact_k), (v, exact_v)):
        close(one, other, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("heads", "size", "state", "taps"), [(3, 24, 40, 4), (2, 8, 16, 2)])
def test_mamba2_overwrites_its_states(heads, size, state, taps, dtype, device, normal, served):
    rows, inner = 3, heads * size
    channels = inner + 2 * state
    wide = normal(rows, channels + heads).to(device, dtype)
    xBC, dt = wide.split([channels, heads], dim=1)
    parameters = [
        normal(channels, taps, seed=1), normal(channels, seed=2), normal(heads, seed=3), normal(heads, seed=4).abs(),
        normal(heads, seed=5),
    ]  # fmt: skip
    dtypes = [dtype, dtype, FP32, FP32, FP32]
    parameters = [z.to(device, d) for z, d in zip(parameters, dtypes, strict=True)]
    tail, scan = normal(rows, taps - 1, channels, seed=6).to(device, dtype), normal(rows, heads, size, state, seed=7)
    scan = scan.to(device, FP32)
    exact_tail, exact_scan = tail.double(), scan.double()
    exact = plainly(mamba2_step, xBC.double(), dt.double(), *(z.double() for z in parameters), exact_tail, exact_scan)
    found = mamba2_step(xBC, dt, *parameters, tail, scan)
    for one, other in ((found, exact), (tail, exact_tail), (scan, exact_scan)):
        close(one, other, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("heads", "keys", "values", "taps", "twice"), [(3, 24, 40, 4, False), (2, 16, 16, 2, True)])
def test_gated_deltanet_overwrites_its_states(heads, keys, values, taps, twice, dtype, device, normal, served):
    rows, channels = 3, heads * (2 * keys + values)
    wide = normal(rows, channels + heads * values + 2 * heads).to(device, dtype)
    qkv, z, b, a = wide.split([channels, heads * values, heads, heads], dim=1)
    parameters = [
        normal(channels, taps, seed=1), normal(heads, seed=2), normal(heads, seed=3), normal(values, seed=4)
    ]  # fmt: skip
    parameters = [each.to(device, d) for each, d in zip(parameters, [dtype, FP32, FP32, dtype], strict=True)]
    tail = normal(rows, taps - 1, channels, seed=5).to(device, dtype)
    memory = normal(rows, heads, keys, values, seed=6).to(device, FP32)
    exact_tail, exact_memory, settings = tail.double(), memory.double(), {"eps": 1e-5, "negative_eigenvalues": twice}
    given = [qkv, z.view(rows, heads, values), b, a, *parameters]
    exact = plainly(delta_step, *(each.double() for each in given), exact_tail, exact_memory, **settings)
    found = delta_step(*given, tail, memory, **settings)
    for one, other in ((found, exact), (tail, exact_tail), (memory, exact_memory)):
        close(one, other, dtype)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("many", [False, True])
def test_mamba1_overwrites_its_states(many, dtype, device, normal, served, monkeypatch):
    from longspan.ops.triton import mamba1_step as launched

    monkeypatch.setattr(launched, "CHANNELS", 32)
    if many:
        monkeypatch.setattr(launched, "MANY_ROWS", 1)
        monkeypatch.setattr(launched, "ROWS", 2)
    rows, channels, size, taps = 3, 40, 6, 4
    x, z = normal(rows, 2 * channels).to(device, dtype).chunk(2, dim=1)
    low = normal(rows, 2 * size + 5, seed=1).to(device, dtype)
    dt, BC = normal(rows, channels, seed=2).to(device, dtype), low[:, 5:]
    conv = [normal(channels, taps, seed=3).to(device, dtype), normal(channels, seed=4).to(device, dtype)]
    scan = [normal(channels, seed=5), normal(channels, size, seed=6), normal(channels, seed=7)]
    scan = [each.to(device, FP32) for each in scan]
    tail = normal(rows, taps - 1, channels, seed=8).to(device, dtype)
    state = normal(rows, size, channels, seed=9).to(device, FP32)

    def step(x, z, dt, BC, *others):
        convolved = conv_step(x, *others[:2], others[5])
        return mamba1_step(convolved, dt, BC, z, *others[2:5], others[6])

    exact_tail, exact_state = tail.double(), state.double()
    given = (x, z, dt, BC, *conv, *scan)
    exact = plainly(step, *(each.double() for each in given), exact_tail, exact_state)
    found = step(*given, tail, state)
    for one, other in ((found, exact), (tail, exact_tail), (state, exact_state)):
        close(one, other, dtype)


def test_step_sizes_keep_the_precision_of_fp32_however_small(device, served):
    """One token of drive 1 into an empty state leaves the step size there."""
    rates = torch.cat([torch.linspace(-14.0, 30.0, 160), torch.linspace(-1e-3, 1e-3, 32)])[None].to(device)
    ones, zeros, state = torch.ones_like(rates), torch.zeros_like(rates), rates.new_zeros(1, 1, 192)
    mamba1_step(ones, rates, ones[:, :2], ones, zeros[0], zeros.T.contiguous(), zeros[0], state)
    exact = torch.nn.functional.softplus(rates.double(), threshold=100.0)
    assert ((state[:, 0].double() - exact) / exact).abs().max() < 2e-6
