"""Steps as graphs: what is kept in place, what is copied there, and what happens where there can be no graph.

A CPU has no graphs. `StandIn` keeps their contract: recording leaves no trace, and a replay reads and writes the memory
of the recording.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longspan.corpus.packing import Batch
from longspan.foundation.errors import MachineError, Stopped, UserError
from longspan.foundation.progress import Progress
from longspan.foundation.randomness import numpy_generator
from longspan.models.segments import Segments
from longspan.ops.flex_attention import flex_block_mask
from longspan.training import distributed, updates
from longspan.training.feeding import Fed
from longspan.training.metrics import read_metrics
from longspan.training.micro_steps import PLAIN_STEPS, GraphedMicroSteps, PlainMicroSteps, why_no_graph
from longspan.training.result import TrainingResult

CPU = torch.device("cpu")
PATTERNS = ["AM", "G"]
STEPS = 6
SHORT: dict[str, Any] = {"steps": STEPS, "evaluate_every": STEPS, "checkpoint_every": STEPS}


class StandIn:
    """Records and replays for one model; `fails_at` names the recording (from 0) that fails."""

    def __init__(self, net: torch.nn.Module, fails_at: int | None = None) -> None:
        self.parameters, self.fails_at = list(net.parameters()), fails_at
        self.recorded = self.replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        held = [p.grad for p in self.parameters]
        kept = [None if grad is None else grad.clone() for grad in held]
        outcome = work()
        if self.recorded == self.fails_at:
            self._put(held, kept)
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recorded += 1
        adds = held[0] is not None
        if adds:
            self._put(held, kept)
        place = [p.grad for p in self.parameters]

        def replay() -> None:
            self.replayed += 1
            assert all(p.grad is at for p, at in zip(self.parameters, place, strict=True)), "gradients moved"
            if not adds:
                for p in self.parameters:
                    p.grad = None
            outcome.copy_(work())
            if not adds:
                written = [p.grad for p in self.parameters]
                self._put(place, written)

        return replay, outcome

    def _put(self, places: list[Any], values: list[Any]) -> None:
        for p, place, value in zip(self.parameters, places, values, strict=True):
            p.grad = place
            if place is not None:
                place.copy_(value)


class ShardedStandIn:
    """For FSDP2, which keeps gradients of its own between micro-batches: nothing is done before the first replay.

    Each recording leaves a mark in `marks`.
    """

    def __init__(self, net: torch.nn.Module, marks: Path) -> None:
        self.parameters, self.marks = list(net.parameters()), marks

    def __call__(self, work: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        with self.marks.open("a") as file:
            file.write("x")
        outcome = torch.zeros(())
        place: list[Any] = []
        assert all(p.grad is None for p in self.parameters), "a captured pass would add to gradients of another step"

        def replay() -> None:
            held = [p.grad for p in self.parameters]
            for p in self.parameters:
                p.grad = None
            outcome.copy_(work())
            written = [p.grad for p in self.parameters]
            if written[0] is None:
                place[:] = held
            elif not place:
                place[:] = written
            else:
                assert all(a is b for a, b in zip(held, place, strict=True)), "gradients moved"
            for p, at, value in zip(self.parameters, place, written, strict=True):
                p.grad = at
                if value is not None:
                    at.copy_(value)

        return replay, outcome


def varied(small: ModuleType, rows: int) -> Any:
    """Rows of two documents each, whose boundary moves."""

    def make(number: int) -> Batch:
        generator = numpy_generator(3, "varied", number)
        whole = small.rows_of(rows, small.CONTEXT, generator)
        cut = generator.integers(1, small.CONTEXT - 1, (rows, 1))
        return Batch(whole.tokens, whole.targets, (np.arange(small.CONTEXT) >= cut).astype(np.int32))

    return small.Stream(make)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


@pytest.fixture
def graphed(
    small: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[StandIn, torch.nn.Module, list[str]]]:
    """Trains on a CPU as if it had graphs."""

    def train(folder: Path, *, pattern: str = "AM", fails_at: int | None = None, **more: Any) -> Any:
        net = small.model(pattern=pattern)
        stand_in = StandIn(net, fails_at)
        told: list[str] = []
        report = more.pop("report", lambda progress: None)

        def listen(progress: Progress, /) -> None:
            told.extend(filter(None, [progress.message]))
            report(progress)

        with monkeypatch.context() as patch:
            patch.setattr(updates, "why_no_graph", lambda *args: None)
            patch.setattr(updates, "CudaRecorder", lambda device: stand_in)
            training = small.settings(**SHORT, **more)
            small.run(folder, training, net, lambda: varied(small, training.rows), report=listen)
        return stand_in, net, told

    return train


def plain(small: ModuleType, folder: Path, pattern: str = "AM", **more: Any) -> torch.nn.Module:
    net: torch.nn.Module = small.model(pattern=pattern)
    training = small.settings(**SHORT, **more)
    small.run(folder, training, net, lambda: varied(small, training.rows))
    return net


def assert_same_run(one: torch.nn.Module, other: torch.nn.Module, folders: tuple[Path, Path]) -> None:
    assert losses(folders[0]) == losses(folders[1])
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_replays_train_as_the_calls_they_stand_for(
    small: ModuleType, graphed: Any, tmp_path: Path, pattern: str, accumulation: int
) -> None:
    folders = (tmp_path / "graphed", tmp_path / "plain")
    stand_in, net, _ = graphed(folders[0], pattern=pattern, accumulation=accumulation)
    assert_same_run(net, plain(small, folders[1], pattern, accumulation=accumulation), folders)
    assert stand_in.recorded == accumulation
    assert stand_in.replayed == (STEPS - PLAIN_STEPS) * accumulation


@pytest.mark.parametrize(
    ("parallel", "accumulation", "graphs"), [("ddp", 2, 2), ("fsdp", 1, 1), ("fsdp", 2, 2), ("fsdp", 4, 3)]
)
def test_two_processes_that_replay_graphs_train_as_one_that_does_not(
    small: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parallel: str,
    accumulation: int,
    graphs: int,
) -> None:
    settings: dict[str, Any] = {**SHORT, "log_every": 1, "accumulation": accumulation}
    net, other = (small.model(dropout=0.0) for _ in range(2))
    small.run(tmp_path / "alone", small.settings(**settings), net)
    monkeypatch.setattr(updates, "why_no_graph", lambda *args: None)
    marks = tmp_path / "marks"

    def recorder(device: torch.device) -> Any:
        return StandIn(other) if parallel == "ddp" else ShardedStandIn(other, marks)

    monkeypatch.setattr(updates, "CudaRecorder", recorder)
    # Several exchanges a step.
    monkeypatch.setattr(distributed, "UNIT_BYTES", 1000)
    first, second = small.together(tmp_path / "two", 2, small.settings(parallel=parallel, **settings), net=other)
    assert isinstance(first, TrainingResult), first
    assert first == second
    assert parallel == "ddp" or marks.read_text() == 2 * graphs * "x"
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    found = load_file(tmp_path / "two" / "checkpoints/last/model.safetensors")
    for name, weight in net.state_dict().items():
        if name in found:
            torch.testing.assert_close(found[name], weight, rtol=1e-4, atol=1e-5)


def test_a_run_that_is_gone_on_with_captures_again_and_keeps_its_curve(
    small: ModuleType, graphed: Any, tmp_path: Path
) -> None:
    def stop(progress: Progress, /) -> None:
        if progress.stage == "train" and progress.done == 3 * 128:
            raise Stopped("enough")

    with pytest.raises(Stopped):
        graphed(tmp_path / "graphed", report=stop)
    stand_in, net, _ = graphed(tmp_path / "graphed")
    assert stand_in.replayed == (STEPS - 3 - PLAIN_STEPS) * 2
    assert_same_run(net, plain(small, tmp_path / "plain"), (tmp_path / "graphed", tmp_path / "plain"))


@pytest.mark.parametrize("fails_at", [0, 1])
def test_where_capturing_fails_it_is_told_and_nothing_of_the_step_is_lost(
    small: ModuleType, graphed: Any, tmp_path: Path, fails_at: int
) -> None:
    folders = (tmp_path / "graphed", tmp_path / "plain")
    stand_in, net, told = graphed(folders[0], fails_at=fails_at)
    assert_same_run(net, plain(small, folders[1]), folders)
    assert stand_in.replayed == fails_at
    assert any("capturing it failed (RuntimeError: operation not permitted" in text for text in told)


def test_where_capturing_fails_no_batch_is_held(small: ModuleType) -> None:
    def refuse(work: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    net = small.model()
    passes = PlainMicroSteps(net.loss, lambda: torch.autocast("cpu", enabled=False), CPU)
    steps = GraphedMicroSteps(passes, list(net.parameters()), record=refuse, quiet=nullcontext)
    batch = small.rows_of(1, 8, numpy_generator(3, "one"))
    tokens, targets = (torch.from_numpy(each).long() for each in (batch.tokens, batch.targets))
    held = []
    for _ in range(PLAIN_STEPS + 1):
        fed = Fed(batch, tokens, targets, Segments.build(torch.zeros(1, 8)), 8)
        steps.run(fed, 8, first=True)
        held.append(weakref.ref(fed.segments))
        del fed
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


def test_a_graph_that_is_demanded_and_fails_ends_the_run(graphed: Any, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"not permitted(.*\n)+.*set `training\.graph` to false"):
        graphed(tmp_path, fails_at=0, graph=True)


def test_a_graph_is_no_part_of_what_a_run_is(small: ModuleType) -> None:
    assert small.settings(graph=False).model_dump() == small.settings().model_dump()


@pytest.mark.parametrize(
    ("choice", "pattern", "device", "reason"),
    [
        (False, "A", "cuda", "graph = false"),
        ("auto", "A", "cpu", "cpu has none"),
        ("auto", "AGL", "cuda", "G, L may wait"),
    ],
)
def test_what_keeps_a_step_from_being_captured_is_named(
    small: ModuleType, choice: Any, pattern: str, device: str, reason: str
) -> None:
    net = small.model(pattern=pattern)
    assert reason in (why_no_graph(choice, net, torch.device(device)) or "")
    if choice == "auto":
        with pytest.raises(UserError, match=reason):
            why_no_graph(True, net, torch.device(device))


def test_a_step_in_which_the_state_is_handed_over_is_not_captured(small: ModuleType) -> None:
    net = small.model(pattern="A", state_bits=2, handover=4)
    assert why_no_graph("auto", net, torch.device("cuda")) == "the state is handed over inside a row"


@pytest.mark.parametrize("pattern", ["AS", "MmDC", "[AD]M"])
def test_what_waits_for_nothing_is_captured(small: ModuleType, pattern: str) -> None:
    net = small.model(pattern=pattern, width=32, delta_head_dim=8)
    assert why_no_graph("auto", net, torch.device("cuda")) is None


def test_keys_wider_than_their_kernel_takes_keep_a_step_from_being_captured(small: ModuleType) -> None:
    net = small.model(pattern="D", width=192, delta_head_dim=144)
    assert "D may wait" in (why_no_graph("auto", net, torch.device("cuda")) or "")


def test_a_batch_copied_over_another_leaves_nothing_of_that(small: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [(torch.rand(2, 300, generator=generator) < 0.02).cumsum(1).int() for _ in range(2)]
    both = [Segments.build(doc, keep_ids=True) for doc in ids]
    for segments in both:
        segments.rotation(8, 10_000.0, torch.float32)
        segments.block_mask(None)
        segments.block_mask(64)
    for to, value in zip(both[0].tensors(), both[1].tensors(), strict=True):
        to.copy_(value)
    q, k = torch.meshgrid(torch.arange(300), torch.arange(300), indexing="ij")
    for window in (None, 64):
        wanted, found = flex_block_mask(ids[1], window=window), both[0].block_mask(window)
        assert torch.equal(found.to_dense(), wanted.to_dense())
        for row in torch.arange(2):
            assert torch.equal(found.mask_mod(row, 0, q, k), wanted.mask_mod(row, 0, q, k))
    assert torch.equal(both[0].positions, both[1].positions)
    assert torch.equal(
        both[0].rotation(8, 10_000.0, torch.float32).cos, both[1].rotation(8, 10_000.0, torch.float32).cos
    )
