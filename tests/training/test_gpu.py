"""What only a CUDA device shows: bf16, a step without waiting, and updates that the device itself holds back."""

from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from longspan.corpus.packing import Batch
from longspan.foundation.errors import DivergenceError, Stopped
from longspan.foundation.progress import Progress
from longspan.foundation.randomness import numpy_generator
from longspan.training import updates
from longspan.training.checkpoint import read_state
from longspan.training.metrics import read_metrics
from longspan.training.micro_steps import CudaRecorder

pytestmark = pytest.mark.gpu
PATTERNS = ["A", "M", "G", "AM"]


def rows_that(small: ModuleType, act: Any) -> Any:
    """A stream that calls `act(number)` before it hands out each batch."""

    class Rows(small.Rows):  # type: ignore[name-defined,misc]
        def __next__(self) -> Any:
            act(self.taken)
            return super().__next__()

    return lambda: Rows(4)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_in_bf16_with_fp32_parameters_falls_as_in_fp32(
    small: ModuleType, tmp_path: Path, pattern: str
) -> None:
    finals = {}
    for dtype in ("auto", "fp32"):
        net = small.model(pattern=pattern)
        result = small.run(tmp_path / dtype, small.settings(steps=60, dtype=dtype), net, device="cuda")
        assert all(p.dtype == torch.float32 for p in net.parameters())
        assert result.peak_memory_of == "torch allocator"
        assert result.peak_memory_bytes > 0
        finals[result.dtype] = result.final.loss
    assert finals.keys() == {"bf16", "fp32"}
    assert finals["bf16"] == pytest.approx(finals["fp32"], rel=0.05)
    assert finals["bf16"] < 2.8


# Not G: the recurrent baseline lays its documents side by side on the host, once a call.
@pytest.mark.parametrize("pattern", ["A", "M", "AM"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_no_step_between_log_lines_waits_for_the_device(
    small: ModuleType, tmp_path: Path, pattern: str, dtype: str
) -> None:
    def watch(taken: int) -> None:
        # Two micro-batches a step, made up to three ahead: from within step 4 to the start of step 10 nothing is due.
        if taken in (10, 18):
            torch.cuda.set_sync_debug_mode("error" if taken == 10 else "default")

    training = small.settings(log_every=50, evaluate_every=50, checkpoint_every=50, dtype=dtype)
    try:
        small.run(tmp_path, training, small.model(pattern=pattern), rows_that(small, watch), device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_pass_without_a_graph_goes_back_in_the_thread_that_called_it(small: ModuleType, tmp_path: Path) -> None:
    net, threads = small.model(), set()
    net.norm.weight.register_hook(lambda gradient: threads.add(threading.get_ident()))
    small.run(tmp_path, small.settings(compile=False, graph=False), net, device="cuda")
    assert threads == {threading.get_ident()}


def test_the_device_holds_a_bad_update_back_and_the_right_step_is_named(small: ModuleType, tmp_path: Path) -> None:
    net = small.model()
    before: dict[str, torch.Tensor] = {}
    calls = 0

    def spoil(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # Counted as the model computes, not as batches are made: those are made ahead.
        nonlocal calls
        calls += module.training
        if calls < 15:
            return output
        if not before:
            before.update({name: p.detach().clone() for name, p in net.named_parameters()})
        # Two micro-batches a step: from the first of the eighth on, and never repaired.
        return output * float("nan")

    net.layers[1].mlp.register_forward_hook(spoil)
    # A compiled layer would call the hook only while it is traced, and a graph never.
    training = small.settings(log_every=12, evaluate_every=50, checkpoint_every=50, compile=False, graph=False)
    with pytest.raises(DivergenceError, match=r"step 8 of 12.*`layers\.1\.mlp` \(\w+\) in the forward pass"):
        small.run(tmp_path, training, net, device="cuda")
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0)


def test_stopping_and_going_on_keeps_the_curve(small: ModuleType, tmp_path: Path) -> None:
    def stop(progress: Progress, /) -> None:
        if progress.stage == "train" and progress.done == 7 * 128:
            raise Stopped("enough")

    training = small.settings(dtype="fp32")
    small.run(tmp_path / "straight", training, device="cuda")
    with pytest.raises(Stopped):
        small.run(tmp_path / "stopped", training, report=stop, device="cuda")
    small.run(tmp_path / "stopped", training, device="cuda")
    curves = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("straight", "stopped")]
    assert [line["step"] for line in curves[0]] == [line["step"] for line in curves[1]]
    assert [line["loss"] for line in curves[0]] == pytest.approx([line["loss"] for line in curves[1]], rel=1e-4)
    random = [read_state(tmp_path / n / "checkpoints" / "last")["random"] for n in ("straight", "stopped")]
    assert random[0] == random[1]


# With dropout, so rare that none is ever drawn, sums and norms are the compiler's.
@pytest.mark.parametrize("dropout", [0.0, 1e-12])
def test_compiled_layers_train_the_same(small: ModuleType, tmp_path: Path, dropout: float) -> None:
    for on in (False, True):
        training = small.settings(compile=on, dtype="fp32", log_every=1)
        small.run(tmp_path / str(on), training, small.model(dropout=dropout), device="cuda")
    assert curve(tmp_path / "True") == pytest.approx(curve(tmp_path / "False"), rel=1e-3)


# CUDA graphs of micro-batches

LONG = 256


def documents(small: ModuleType, rows: int) -> Any:
    """Rows of documents whose number and boundaries change from row to row."""

    def make(number: int) -> Batch:
        generator = numpy_generator(5, "documents", number)
        whole = small.rows_of(rows, LONG, generator)
        starts = generator.random((rows, LONG)) < 1 / 40
        return Batch(whole.tokens, whole.targets, starts.cumsum(1).astype(np.int32))

    return small.Stream(make)


def sized(small: ModuleType, pattern: str) -> Any:
    """Large enough for FlexAttention and the kernels."""
    sizes = {"width": 64, "heads": 4, "mamba_head_dim": 16, "delta_head_dim": 16, "state": 16, "chunk": 64}
    return small.model(pattern=pattern, **sizes, dropout=0.1)


def long_settings(small: ModuleType, **changes: Any) -> Any:
    basis = {"context": LONG, "batch_tokens": 8 * LONG, "steps": 20, "log_every": 1, "evaluate_every": 50}
    return small.settings(**{**basis, "checkpoint_every": 50, **changes})


def curve(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


# What was never captured before comes first, for whoever has little time on a GPU.
@pytest.mark.parametrize(
    ("pattern", "dtype", "compile"),
    [
        ("D", "bf16", True),
        ("AM", "fp32", False),
        ("C", "bf16", True),
        ("D", "fp32", False),
        ("A", "bf16", True),
        ("M", "bf16", True),
        ("AM", "bf16", False),
    ],
)
def test_a_graph_trains_as_the_kernels_it_replays(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, dtype: str, compile: bool
) -> None:
    recorded: list[object] = []

    class Counted(CudaRecorder):
        def __call__(self, work: Any) -> Any:
            recorded.append(work)
            return super().__call__(work)

    monkeypatch.setattr(updates, "CudaRecorder", Counted)
    settings = {graph: long_settings(small, dtype=dtype, compile=compile, graph=graph) for graph in (False, True)}
    rows = settings[True].rows
    for graph, training in settings.items():
        small.run(tmp_path / str(graph), training, sized(small, pattern), lambda: documents(small, rows), device="cuda")
    assert len(recorded) == 2
    apart = [abs(a - b) for a, b in zip(curve(tmp_path / "False"), curve(tmp_path / "True"), strict=True)]
    print(f"{pattern} {dtype} compiled {compile}: losses apart by at most {max(apart):.3g}")
    # In fp32 attention is torch's own kernel, which adds the gradients of queries in any order.
    allowed = 1e-4 if dtype == "fp32" else 1e-6
    assert curve(tmp_path / "True") == pytest.approx(curve(tmp_path / "False"), rel=allowed)
    random = [read_state(tmp_path / str(on) / "checkpoints" / "last")["random"] for on in (False, True)]
    assert random[0] == random[1]


def test_a_graphed_run_that_is_gone_on_with_keeps_its_curve(small: ModuleType, tmp_path: Path) -> None:
    def stop(progress: Progress, /) -> None:
        if progress.stage == "train" and progress.done == 9 * 8 * LONG:
            raise Stopped("enough")

    training = long_settings(small, dtype="bf16", compile=False, graph=True)
    arguments: dict[str, Any] = {"batches": lambda: documents(small, training.rows), "device": "cuda"}
    small.run(tmp_path / "straight", training, sized(small, "AM"), **arguments)
    with pytest.raises(Stopped):
        small.run(tmp_path / "stopped", training, sized(small, "AM"), report=stop, **arguments)
    small.run(tmp_path / "stopped", training, sized(small, "AM"), **arguments)
    assert curve(tmp_path / "stopped") == pytest.approx(curve(tmp_path / "straight"), rel=1e-6)
    random = [read_state(tmp_path / n / "checkpoints" / "last")["random"] for n in ("straight", "stopped")]
    assert random[0] == random[1]


def test_a_replayed_update_that_is_not_finite_is_held_back_and_its_step_is_named(
    small: ModuleType, tmp_path: Path
) -> None:
    net = sized(small, "AM")
    before: dict[str, torch.Tensor] = {}

    def spoil(progress: Progress, /) -> None:
        if progress.stage == "train" and progress.done == 7 * 8 * LONG:
            # The graph reads the weights where they are: the eighth step meets one that is not finite.
            with torch.no_grad():
                net.layers[1].mlp.output_linear.weight[0, 0] = float("nan")
            before.update({name: p.detach().clone() for name, p in net.named_parameters()})

    training = long_settings(small, log_every=12, dtype="fp32", compile=False, graph=True)
    with pytest.raises(DivergenceError, match=r"step 8 of 20.*`layers\.1\.mlp\.output_linear\.weight` were already"):
        small.run(tmp_path, training, net, lambda: documents(small, training.rows), report=spoil, device="cuda")
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=0, equal_nan=True)
