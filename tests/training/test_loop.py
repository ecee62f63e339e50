"""What the loop promises: gradients, evaluations, early stopping, and a clear word when numbers break."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from longspan.foundation.errors import DataError, DivergenceError, UserError
from longspan.foundation.progress import Progress
from longspan.foundation.randomness import numpy_generator
from longspan.training.checkpoint import load_weights, read_state
from longspan.training.evaluation import evaluate
from longspan.training.metrics import read_metrics
from longspan.training.precision import autocast_for, resolve_dtype
from longspan.training.result import TrainingResult

CPU = torch.device("cpu")


def split(small: ModuleType, batch: Any, rows: int) -> list[Any]:
    cuts = range(0, batch.tokens.shape[0], rows)
    return [small.Batch(*(a[i : i + rows] for a in (batch.tokens, batch.targets, batch.doc_id))) for i in cuts]


def test_accumulation_equals_one_big_batch(small: ModuleType, tmp_path: Path) -> None:
    big = [small.rows_of(8, small.CONTEXT, numpy_generator(1, i)) for i in range(6)]
    # Unequal numbers of targets, so that a mean of micro-batch means would be another number.
    for batch in big:
        batch.targets[:4, 3:] = -100
    streams = {1: big, 4: [part for batch in big for part in split(small, batch, 2)]}

    def stream(batches: list[Any]) -> Any:
        given = iter(batches)
        rows = small.Rows(0)
        rows.__class__ = type("Given", (small.Rows,), {"__next__": lambda self: next(given)})
        return rows

    models = {}
    for accumulation, batches in streams.items():
        models[accumulation] = small.model()
        training = small.settings(steps=6, accumulation=accumulation, peak_lr=1e-3)
        small.run(tmp_path / str(accumulation), training, models[accumulation], lambda batches=batches: stream(batches))
    for a, b in zip(models[1].parameters(), models[4].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    losses = [[line["loss"] for line in read_metrics(tmp_path / str(n) / "metrics.jsonl", "train")] for n in models]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_line_holds_the_mean_loss_since_the_last_line(small: ModuleType, tmp_path: Path) -> None:
    small.run(tmp_path / "each", small.settings(log_every=1))
    small.run(tmp_path / "some", small.settings(log_every=4))
    each = {line["step"]: line["loss"] for line in read_metrics(tmp_path / "each" / "metrics.jsonl", "train")}
    some = read_metrics(tmp_path / "some" / "metrics.jsonl", "train")
    assert [line["step"] for line in some] == [1, 4, 8, 12]
    assert some[1]["loss"] == pytest.approx(np.mean([each[s] for s in (2, 3, 4)]))
    assert some[2]["loss"] == pytest.approx(np.mean([each[s] for s in (5, 6, 7, 8)]))
    assert [line["tokens"] for line in some] == [128, 512, 1024, 1536]
    assert each[1] == pytest.approx(math.log(small.VOCAB), abs=0.1)


def test_the_learning_rate_in_the_first_line_is_peak_over_warmup(small: ModuleType, tmp_path: Path) -> None:
    small.run(tmp_path, small.settings(warmup=4))
    assert read_metrics(tmp_path / "metrics.jsonl", "train")[0]["lr"] == pytest.approx(1e-2 / 4)


def evaluated(small: ModuleType, batches: list[Any], token_bytes: np.ndarray | None = None) -> Any:
    return evaluate(
        small.model(),
        batches,
        isolation="full",
        token_bytes=np.full(small.VOCAB, 2, np.int32) if token_bytes is None else token_bytes,
        device=CPU,
        autocast=autocast_for("fp32", CPU),
        report=lambda progress: None,
        step=1,
        tokens=2,
    )


def test_validation_weighs_tokens_and_not_batches(small: ModuleType) -> None:
    batch = small.rows_of(6, small.CONTEXT, numpy_generator(3))
    batch.targets[0, 2:] = -100
    whole = evaluated(small, [batch])
    parts = evaluated(small, [*split(small, batch, 4)])
    assert parts.num_targets == whole.num_targets == int((batch.targets != -100).sum())
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert whole.perplexity == pytest.approx(math.exp(whole.loss))


def test_bits_per_byte_divides_by_the_bytes_of_scored_tokens(small: ModuleType) -> None:
    batch = small.rows_of(2, small.CONTEXT, numpy_generator(3))
    sizes = np.arange(small.VOCAB, dtype=np.int32)
    found = evaluated(small, [batch], sizes)
    scored = batch.targets[batch.targets != -100]
    assert found.num_bytes == scored.sum()
    assert found.bits_per_byte == pytest.approx(found.loss * scored.size / math.log(2) / scored.sum())


def test_an_empty_validation_split_is_refused(small: ModuleType) -> None:
    with pytest.raises(DataError, match="no token to score"):
        evaluated(small, [])


class Poison(torch.autograd.Function):
    """The identity, with NaN as its value or its gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: bool) -> torch.Tensor:
        ctx.forward_only = forward
        return x * math.nan if forward else x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient if ctx.forward_only else gradient * math.nan, None


def poisoned(small: ModuleType, *, forward: bool, from_call: int) -> Any:
    model = small.model(pattern="AMA")
    calls = itertools.count()
    mlp = model.layers[1].mlp
    real = mlp.forward

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = real(x)
        return Poison.apply(y, forward) if model.training and next(calls) >= from_call else y

    mlp.forward = broken
    return model


def test_a_loss_that_is_not_finite_stops_at_its_step_and_names_the_layer(small: ModuleType, tmp_path: Path) -> None:
    net = poisoned(small, forward=True, from_call=14)
    with pytest.raises(DivergenceError, match=r"step 8 of 12.*output of `layers\.1\.mlp` \(\w+\) in the forward pass"):
        small.run(tmp_path, net=net)
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert read_state(tmp_path / "checkpoints" / "last")["state"]["step"] == 5
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl", "train")] == [1, 3, 6]


def test_a_gradient_that_is_not_finite_stops_at_its_step_and_names_the_layer(small: ModuleType, tmp_path: Path) -> None:
    net = poisoned(small, forward=False, from_call=6)
    with pytest.raises(DivergenceError, match=r"step 4 of 12.*gradient of `layers\.1\.mlp\.\S+` in the backward pass"):
        small.run(tmp_path, net=net)
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_weights_that_were_never_finite_are_named(small: ModuleType, tmp_path: Path) -> None:
    net = small.model()
    with torch.no_grad():
        net.layers[1].mixer.out_proj.weight[0, 0] = math.inf
    with pytest.raises(
        DivergenceError, match=r"step 1 of 12.*weights `layers\.1\.mixer\.out_proj\.weight` were already"
    ):
        small.run(tmp_path, net=net)


def test_a_learning_rate_far_too_high_stops_and_says_what_to_do(small: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"lower `training\.peak_lr`"):
        small.run(tmp_path, small.settings(peak_lr=1e38, clip=None, weight_decay=0.0))


def test_early_stopping_and_the_best_weights(small: ModuleType, tmp_path: Path) -> None:
    # The training rows say what the validation rows deny, so validation rises after a while.
    def misled() -> Any:
        rows = small.Rows(4)

        def backwards(self: Any) -> Any:
            batch = small.Rows.__next__(self)
            if self.taken > 10:
                batch.targets[batch.targets != -100] = 0
            return batch

        rows.__class__ = type("Misled", (small.Rows,), {"__next__": backwards})
        return rows

    training = small.settings(steps=60, evaluate_every=2, patience=3, checkpoint_every=50)
    net = small.model()
    result = small.run(tmp_path, training, net, misled)
    validations = read_metrics(tmp_path / "metrics.jsonl", "validation")
    losses = [line["loss"] for line in validations]
    assert result.stopped_early
    assert result.steps < 60
    assert result.best.loss == min(losses)
    assert result.steps == result.best.step + 3 * 2
    assert result.final.loss == losses[-1] > result.best.loss
    # What is in `best` really has that loss.
    load_weights(tmp_path / "checkpoints" / "best", net)
    again = evaluate(
        net,
        (small.rows_of(4, small.CONTEXT, numpy_generator(9, i)) for i in range(2)),
        isolation="full",
        token_bytes=np.ones(small.VOCAB, np.int32),
        device=CPU,
        autocast=autocast_for("fp32", CPU),
        report=lambda progress: None,
        step=0,
        tokens=0,
    )
    assert again.loss == result.best.loss


def test_min_delta_gates_patience_but_never_the_best(small: ModuleType, tmp_path: Path) -> None:
    training = small.settings(steps=12, evaluate_every=2, patience=3, min_delta=100.0)
    result = small.run(tmp_path, training)
    assert result.stopped_early
    assert result.steps == 8
    assert result.best.step == 8


def test_without_patience_the_run_goes_to_its_end(small: ModuleType, tmp_path: Path) -> None:
    result = small.run(tmp_path)
    assert (result.steps, result.tokens, result.stopped_early) == (12, 12 * 128, False)
    assert result.final.step == 12
    assert result.targets == 12 * 8 * 15
    assert (result.dtype, result.peak_memory_of) == ("fp32", "process RSS")
    assert TrainingResult.read(tmp_path / "result.json") == result


def test_evaluation_time_is_not_in_tokens_per_second(small: ModuleType, tmp_path: Path) -> None:
    now = [0.0]

    class Rows(small.Rows):  # type: ignore[name-defined,misc]
        def __next__(self) -> Any:
            now[0] += 1.0
            return super().__next__()

    def validation() -> Any:
        now[0] += 1000.0
        yield small.rows_of(4, small.CONTEXT, numpy_generator(9))

    result = small.run(tmp_path, batches=lambda: Rows(4), validation=validation, clock=lambda: now[0])
    # Two micro-batches, so two seconds, for each 128 positions.
    assert result.tokens_per_second == 64.0
    assert result.tokens_per_second_overall == 64.0
    assert result.seconds == 3 * 1000 + 24


def test_progress_says_where_it_is(small: ModuleType, tmp_path: Path) -> None:
    seen: list[Progress] = []
    small.run(tmp_path, report=seen.append)
    steps = [progress for progress in seen if progress.stage == "train"]
    assert steps[0].message == "plain torch (auto), fp32, layers not compiled"
    assert [progress.done for progress in steps] == [128.0 * i for i in range(13)]
    assert all(progress.total == 12 * 128 and progress.unit == "tok" for progress in steps)
    assert {"loss", "tok/s", "bpb"} <= steps[-1].numbers.keys()
    assert any(progress.stage == "validate" for progress in seen)


def test_the_step_that_compiled_is_told_and_no_measure_of_the_others(
    small: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("longspan.training.run.compile_layers", lambda model: Path("kept"))
    seen: list[Progress] = []
    small.run(tmp_path, small.settings(steps=3, compile=True), report=seen.append)
    steps = [progress for progress in seen if progress.stage == "train"]
    assert [progress.warming for progress in steps] == [False, True, False, False]
    assert "compiling its layers (kept in kept)" in steps[1].message


def test_batches_of_another_shape_are_refused(small: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a batch of 3 rows × 16 positions"):
        small.run(tmp_path, batches=lambda: small.Rows(3))


def test_bf16_is_refused_where_it_is_only_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_dtype("auto", CPU) == "fp32"
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    with pytest.raises(UserError, match="no native bf16"):
        resolve_dtype("bf16", CPU)


def test_the_callers_random_numbers_stay_as_they_were(small: ModuleType, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    small.run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
