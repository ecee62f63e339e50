"""Several processes train the model that one would: same losses, same weights, same files, from any checkpoint."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from longspan.foundation.errors import DivergenceError, Stopped, UserError
from longspan.foundation.progress import Progress
from longspan.foundation.randomness import numpy_generator
from longspan.training import distributed
from longspan.training.config import TrainingConfig
from longspan.training.metrics import read_metrics
from longspan.training.ranks import LostRank, Ranks
from longspan.training.result import TrainingResult

BEST, LAST = "checkpoints/best/model.safetensors", "checkpoints/last/model.safetensors"


def plain(small: ModuleType, **changes: Any) -> dict[str, Any]:
    """Dropout differs from rank to rank, so a comparison leaves it out."""
    return {
        "net": small.model(dropout=0.0),
        "training": small.settings(log_every=1, **changes),
        # Three batches for two processes: one of them has none in the last round.
        "validation": lambda: (small.rows_of(4, small.CONTEXT, numpy_generator(9, i)) for i in range(3)),
    }


@pytest.fixture(scope="module")
def alone(small: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone")
    small.run(directory, **plain(small))
    return directory


def losses(directory: Path) -> list[tuple[int, float, float]]:
    lines = read_metrics(directory / "metrics.jsonl")
    return [(line["step"], line["tokens"], line["loss"]) for line in lines]


def assert_same_run(found: Path, wanted: Path) -> None:
    assert [line[:2] for line in losses(found)] == [line[:2] for line in losses(wanted)]
    for (_, _, a), (_, _, b) in zip(losses(found), losses(wanted), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for name in (BEST, LAST):
        weights, others = load_file(found / name), load_file(wanted / name)
        assert weights.keys() == others.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(weight, others[key], rtol=1e-4, atol=1e-5)
    results = [TrainingResult.read(directory / "result.json") for directory in (found, wanted)]
    assert len({(r.steps, r.tokens, r.targets, r.best.step, r.best.num_targets) for r in results}) == 1


@pytest.mark.parametrize(("parallel", "least"), [("ddp", None), ("fsdp", None), ("fsdp", 1)])
def test_two_processes_do_what_one_does(
    small: ModuleType, tmp_path: Path, alone: Path, parallel: str, least: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if least is not None:
        # As a large model: every layer by itself, given back after its forward pass.
        monkeypatch.setattr(distributed, "UNIT_BYTES", least)
        monkeypatch.setattr(distributed, "GATHERED_BYTES", 0)
    first, second = small.together(tmp_path, 2, **plain(small, parallel=parallel))
    assert isinstance(first, TrainingResult), first
    assert first == second
    assert first.device.startswith("2 × cpu")
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize(
    ("sizes", "least", "wanted"),
    [
        ([5, 5, 5, 5], 10, [[0, 1], [2, 3]]),
        ([5, 5, 5], 10, [[0, 1, 2]]),
        ([20, 3, 20, 20], 10, [[0], [1, 2], [3]]),
        ([1, 1], 10, [[0, 1]]),
        ([], 10, []),
    ],
)
def test_small_layers_are_gathered_together(sizes: list[int], least: int, wanted: list[list[int]]) -> None:
    assert [list(unit) for unit in distributed.units(sizes, least)] == wanted


def stop_after(calls: int) -> Callable[[int], Callable[[Progress], None]]:
    """A user's report that asks to stop; only that of rank 0 is ever called."""

    def report_of(rank: int) -> Callable[[Progress], None]:
        counted = iter(range(1000))

        def report(progress: Progress, /) -> None:
            assert rank == 0
            if next(counted) == calls:
                raise Stopped("enough")

        return report

    return report_of


def test_a_run_goes_on_with_any_number_of_processes_and_either_way_of_sharing(
    small: ModuleType, tmp_path: Path, alone: Path
) -> None:
    with pytest.raises(Stopped, match="step 2 of 12"):
        small.run(tmp_path, report=stop_after(2)(0), **plain(small))
    # Counted on are the first call, one for each step, and in the second stretch one for each round of validation.
    for parallel, calls, step in (("ddp", 5, 5), ("fsdp", 3, 8)):
        for outcome in small.together(tmp_path, 2, report_of=stop_after(calls), **plain(small, parallel=parallel)):
            assert isinstance(outcome, Stopped), outcome
            assert f"step {step} of 12" in str(outcome)
    small.run(tmp_path, **plain(small))
    assert_same_run(tmp_path, alone)
    assert TrainingResult.read(tmp_path / "result.json").sessions == 4


def striking(small: ModuleType, number: int, at: int) -> Callable[[], Any]:
    """Batches that send rank 1 a signal when it asks for that many."""

    class Striking(small.Rows):  # type: ignore[misc, name-defined]
        def __next__(self) -> Any:
            if self.taken == at and dist.get_rank() == 1:
                os.kill(os.getpid(), number)
            return super().__next__()

    return lambda: Striking(small.settings().rows)


def test_ctrl_c_at_one_process_stops_all_after_a_checkpoint(small: ModuleType, tmp_path: Path, alone: Path) -> None:
    outcomes = small.together(tmp_path, 2, batches=striking(small, signal.SIGINT, 4), **plain(small))
    assert all(isinstance(outcome, Stopped) and "step 3 of 12" in str(outcome) for outcome in outcomes), outcomes
    small.run(tmp_path, **plain(small))
    assert_same_run(tmp_path, alone)


def test_a_killed_process_is_noticed_and_the_run_goes_on_from_its_checkpoint(
    small: ModuleType, tmp_path: Path, alone: Path
) -> None:
    settings = plain(small, parallel="fsdp")
    left, killed = small.together(tmp_path, 2, batches=striking(small, signal.SIGKILL, 13), **settings)
    assert killed is None
    assert isinstance(left, LostRank), left
    assert "one of them was killed or failed" in left.given
    small.run(tmp_path, **plain(small))
    assert_same_run(tmp_path, alone)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_all_processes_tell_the_same_divergence(small: ModuleType, tmp_path: Path, parallel: str) -> None:
    first, second = small.together(tmp_path, 2, **plain(small, parallel=parallel, peak_lr=1e30))
    assert isinstance(first, DivergenceError), first
    assert str(first) == str(second)
    assert "loss or gradient is not finite, first seen in" in str(first)


def test_rows_must_divide_by_the_processes(small: ModuleType, tmp_path: Path) -> None:
    written = {**small.settings().model_dump(), "processes": 3}
    with pytest.raises(UserError, match="context × accumulation × processes = 16 × 2 × 3 = 96") as refused:
        TrainingConfig.parse(written, "training")
    assert refused.value.fix == "set batch_tokens to 96"
    with pytest.raises(UserError, match="16 × 2 × 3"):
        small.run(tmp_path, small.settings(), ranks=Ranks(0, 3))


def test_how_many_processes_train_is_no_part_of_what_a_run_is(small: ModuleType) -> None:
    one, two = small.settings(), small.settings(processes=2, parallel="fsdp")
    assert one.model_dump(mode="json") == two.model_dump(mode="json")
