"""The kernels run in Triton's interpreter on the CPU, at small shapes, and the same tests compiled on a GPU."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longspan.ops import kernels

from . import bounds, interpreter

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without Triton, or where it compiles for a GPU, the interpreter's tests say why they do not run."""
    missing = importlib.util.find_spec("triton") is None
    reason = "Triton is not installed" if missing else "Triton compiles here instead of interpreting"
    for item in items:
        here = Path(__file__).parent in item.path.parents
        if here and not item.get_closest_marker("gpu") and (missing or os.environ.get("TRITON_INTERPRET") != "1"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def mended_interpreter() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        interpreter.mend()


@pytest.fixture(autouse=True)
def within_bounds() -> Iterator[None]:
    """No kernel in the interpreter touches memory that is not an element of its arguments."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    with bounds.checked():
        yield


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device("cuda" if request.param == "cuda" else "cpu")


@pytest.fixture
def served() -> Iterator[None]:
    """Ops take their kernels on any device."""
    before = kernels.choose("triton")
    yield
    kernels.choose(before)


@pytest.fixture
def small_chunks(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, tiles and spans even at small shapes; on a GPU the cuts that are used."""
    from longspan.ops.triton import causal_conv, gated_delta, selective_scan, ssd_launches

    if device.type == "cpu":
        for name in ("FORWARD", "BACKWARD"):
            monkeypatch.setattr(causal_conv, name, causal_conv.Tile(4, 128, 1))
        for name, size in (("CHUNK", 4), ("SEGMENT", 1), ("CHANNELS", 64)):
            monkeypatch.setattr(selective_scan, name, size)
        small = {"chunk": 16, "state_tile": (16, 16), "output_heads": 2}
        cuts = {dtype: cut._replace(**small) for dtype, cut in ssd_launches.CUTS.items()}
        monkeypatch.setattr(ssd_launches, "CUTS", cuts)
        small = {"chunk": 16, "state_values": 16, "values": 16}
        cuts = {dtype: cut._replace(**small) for dtype, cut in gated_delta.CUTS.items()}
        monkeypatch.setattr(gated_delta, "CUTS", cuts)


@pytest.fixture
def normal() -> Callable[..., Tensor]:
    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    return make


@pytest.fixture
def assert_same(device: torch.device, poisoned_memory: None) -> Callable[..., None]:
    """Values and gradients of a kernel against fp64, over the same rounded inputs, twice with the same bits.

    `roundings`: how often results are rounded to the dtype on the way. The interpreter cuts bf16 off
    instead of rounding. `zeros`: results, by number, that are 0 in every entry, since nothing is added up there.
    """

    def check(
        kernel: Callable[..., Sequence[Tensor]],
        plain: Callable[..., Sequence[Tensor]],
        tensors: Sequence[Tensor],
        dtypes: Sequence[torch.dtype],
        roundings: int = 1,
        zeros: Sequence[int] = (),
    ) -> None:
        rounded = [z.to(dtype) for z, dtype in zip(tensors, dtypes, strict=True)]

        def results(function: Callable[..., Sequence[Tensor]], place: Callable[[Tensor], Tensor]) -> list[Tensor]:
            leaves = [place(z).detach().requires_grad_() for z in rounded]
            outputs = function(*leaves)
            seeds = [torch.Generator().manual_seed(9 + i) for i in range(len(outputs))]
            slopes = [
                torch.randn(y.shape, generator=g, dtype=torch.float64).to(torch.bfloat16).to(y.device, y.dtype)
                for y, g in zip(outputs, seeds, strict=True)
            ]
            return [*outputs, *torch.autograd.grad(list(outputs), leaves, slopes)]

        ours = results(kernel, lambda z: z.to(device))
        # The interpreter goes through the programs one by one: only a GPU could differ.
        again = results(kernel, lambda z: z.to(device)) if device.type == "cuda" else ours
        exact = results(plain, lambda z: z.double())
        tolerance = roundings * max(TOLERANCE[dtype] for dtype in dtypes)
        for i, (one, same, other) in enumerate(zip(ours, again, exact, strict=True)):
            assert torch.equal(one, same), f"result {i} differs from run to run"
            if i in zeros:
                assert not other.any(), f"result {i} is not 0"
                assert not one.any(), f"result {i} is {float(one.abs().max()):.1e}, not 0"
                continue
            error = (one.cpu().double() - other).norm() / other.norm()
            assert error < tolerance, f"result {i} is off by {float(error):.1e}"

    return check
