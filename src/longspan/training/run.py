"""One process's part of a run: steps, evaluations and checkpoints in an order that any interruption leaves whole."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from longspan.foundation.errors import DivergenceError, Stopped, UserError
from longspan.foundation.progress import Progress, Report
from longspan.ops import kernels
from longspan.training.batches import ResumableBatches
from longspan.training.checkpoint import (
    TrainingState,
    read_state,
    save_checkpoint,
)
from longspan.training.compilation import compile_layers, resolve_compile
from longspan.training.config import TrainingConfig
from longspan.training.evaluation import evaluate
from longspan.training.feeding import Fed, Feed
from longspan.training.measurement import PeakMemory, Throughput, device_name, synchronizer
from longspan.training.metrics import MetricsFile, NoMetrics, read_metrics
from longspan.training.optimizer import learning_rate
from longspan.training.precision import autocast_for, resolve_dtype
from longspan.training.ranks import Ranks
from longspan.training.result import TrainingResult, Validation
from longspan.training.sharded_checkpoint import load_sharded_weights, load_state, save_sharded
from longspan.training.trackers import Tracker
from longspan.training.updates import Updates

if TYPE_CHECKING:
    from longspan.corpus.packing import Batch
    from longspan.models.language_model import LanguageModel
    from longspan.models.segments import Isolation

WARMUP_STEPS = 3
"""Steps at the start of a process that tokens/s leaves out."""


class Run:
    """One process's part of a run, with the arguments of `train`.

    Between `_step` calls, state, weights and data position agree.
    """

    def __init__(
        self,
        *,
        model: LanguageModel,
        training: TrainingConfig,
        batches: ResumableBatches,
        validation: Callable[[], Iterable[Batch]],
        isolation: Isolation,
        token_bytes: np.ndarray,
        directory: Path,
        device: torch.device,
        report: Report,
        trackers: Sequence[Tracker],
        configuration: Mapping[str, Any],
        ranks: Ranks,
        clock: Callable[[], float],
    ) -> None:
        self.model, self.training, self.batches, self.validation = model, training, batches, validation
        self.isolation, self.token_bytes, self.device, self.report = isolation, token_bytes, device, report
        self.directory, self.last, self.best = directory, directory / "checkpoints/last", directory / "checkpoints/best"
        self.trackers, self.configuration, self.clock, self.ranks = trackers, configuration, clock, ranks
        model.train()
        self.dtype = resolve_dtype(training.dtype, device)
        self.autocast = autocast_for(self.dtype, device)
        if ranks.size > 1:
            load_sharded_weights(self.last, configuration, model)
        self.updates = Updates(model, training, isolation=isolation, device=device, autocast=self.autocast, ranks=ranks)
        self.spread, self.optimizer = self.updates.spread, self.updates.optimizer
        self.cache = compile_layers(model) if resolve_compile(training.compile, device) else None
        self.compile_seconds: float | None = None
        self.compile_logged = False
        # Whether the next report follows a step that compiled.
        self.warming = False
        # A line for people that the next report carries.
        self.news = f"{kernels.described(device)}, {self.dtype}, layers {'compiled' if self.cache else 'not compiled'}"
        self.news += f", {ranks.size} processes ({ranks.parallel})" if ranks.size > 1 else ""
        self.news += f", {self.updates.graph}" if self.updates.graph else ""
        # (step, evaluated step) of the checkpoint in `last`.
        self.saved = (0, 0)
        self.state = self._resume()
        self.feed = Feed(batches, model, isolation, device, self.autocast, ranks)
        self.updates.capture(self.feed.quiet, self._tell)
        self.started = clock() - self.state.seconds
        self.metrics: MetricsFile | NoMetrics = NoMetrics()
        if ranks.is_first:
            self.metrics = MetricsFile(directory / "metrics.jsonl", self.state.metrics_bytes)
        self.memory = PeakMemory(device)
        self.throughput = Throughput(
            clock,
            synchronizer(device),
            WARMUP_STEPS,
            seconds=self.state.measured_seconds,
            positions=self.state.measured_positions,
        )
        self.numbers: dict[str, float] = {}
        # Whether state, weights and data position agree, so that a checkpoint may be written.
        self.consistent = True
        # Each rank sums up its own rows from here on; what went before counts once.
        before = self.state.window_nll if ranks.is_first else 0.0
        self.nll_sum = torch.full((), before, dtype=torch.float64, device=device)

    def _resume(self) -> TrainingState:
        state = load_state(
            self.last, self.configuration, self.model, self.optimizer, self.device, self.ranks, self.training.seed
        )
        if state is None:
            return TrainingState(sessions=1)
        self.batches.load_state_dict(state.data)
        self.saved = (state.step, state.evaluated_step)
        state.sessions += 1
        if state.best is not None and state.best.step == state.step and not self._has_best(state):
            # Killed after `last` and before `best` was written, and both hold the same weights.
            self._write(self.best, state)
        return state

    def _has_best(self, state: TrainingState) -> bool:
        return self.best.exists() and bool(read_state(self.best)["state"]["step"] == state.step)

    def to_end(self) -> TrainingResult:
        """Run until the last step, early stopping, or an interruption."""
        try:
            for tracker in self.trackers:
                tracker.start(self.directory, self.configuration, self.state.step)
            while True:
                if self._evaluation_due():
                    self._evaluate()
                if self.state.step % self.training.checkpoint_every == 0:
                    self._save()
                news, self.news = self.news, ""
                warming, self.warming = self.warming, False
                total = self._total()
                self.report(Progress("train", self._tokens(), total, "tok", self.numbers, news, warming))
                if self._finished():
                    return self._result()
                self.consistent = False
                self._step()
                self.consistent = True
        except Stopped:
            raise Stopped(self._stop()) from None
        except KeyboardInterrupt:
            # Several ranks cannot agree on a checkpoint in the middle of anything.
            self.consistent &= self.ranks.size == 1
            raise Stopped(self._stop()) from None
        except DivergenceError as error:
            raise DivergenceError(f"{error}\n  the last checkpoint is of step {self.saved[0]}") from None
        finally:
            self.updates.release()
            self.feed.close()
            self.metrics.close()
            for tracker in self.trackers:
                tracker.close()

    def _stop(self) -> str:
        if self.consistent:
            self._save()
        where = f"step {self.saved[0]} of {self.training.num_steps}"
        return f"stopped at {where}; run the same command again to go on from there"

    # One optimizer step

    def _step(self) -> None:
        """One update. On CUDA nothing here waits for the device, except where a line is due in `metrics.jsonl`."""
        step = self.state.step
        started = self.clock() if self.cache is not None and self.compile_seconds is None else None
        micro_batches = [self._next_batch() for _ in range(self.training.accumulation)]
        nll, norm = self.updates.step(step, micro_batches)
        self.nll_sum += nll.double()
        targets = sum(fed.num_targets for fed in micro_batches)
        self.state.step += 1
        self.state.targets += targets
        self.state.samples += sum(fed.batch.samples for fed in micro_batches)
        self.state.window_targets += targets
        self.throughput.step(self.training.batch_tokens)
        if started is not None:
            self._compiled(started)
        if self.state.step % self.training.log_every == 0 or self.state.step in (1, self.training.num_steps):
            self._log(learning_rate(self.training, step), norm)

    def _compiled(self, started: float) -> None:
        """Say how long the first step of this process took, nearly all of it compiling."""
        synchronizer(self.device)()
        self.compile_seconds = self.clock() - started
        self.warming = True
        self._tell(f"first step in {self.compile_seconds:.1f} s, compiling its layers (kept in {self.cache})")

    def _tell(self, news: str) -> None:
        """To people, with the next report."""
        self.news = "; ".join(filter(None, (self.news, news)))

    def _next_batch(self) -> Fed:
        fed = self.feed.take()
        shape, wanted = fed.batch.tokens.shape, (self.training.rows, self.training.context)
        if shape != wanted:
            raise UserError(
                f"a batch of {shape[0]} rows × {shape[1]} positions",
                f"{wanted[0]} × {wanted[1]}, from batch_tokens, accumulation and context",
                "build the batches with `training.rows` and `training.context`",
            )
        return fed

    # What happens between steps

    def _log(self, lr: float, norm: torch.Tensor) -> None:
        self.updates.check()
        rate = self.throughput.window()
        loss = float(self.ranks.sum(self.nll_sum).item()) / max(1, self.state.window_targets)
        self.state.window_nll, self.state.window_targets = 0.0, 0
        self.nll_sum.zero_()
        self._record(
            {
                "kind": "train",
                "step": self.state.step,
                "tokens": self._tokens(),
                "loss": loss,
                "lr": lr,
                "grad_norm": float(norm.item()),
                "tokens_per_second": rate,
                **self._start_up(),
                "seconds": self.clock() - self.started,
            }
        )
        self.numbers = {**self.numbers, "loss": loss} | ({"tok/s": rate} if rate else {})

    def _start_up(self) -> dict[str, float]:
        """What the first line of a process says beside: how long its first step took where that compiled something."""
        if self.compile_seconds is None or self.compile_logged:
            return {}
        self.compile_logged = True
        return {"first_step_seconds": self.compile_seconds}

    def _record(self, record: Mapping[str, Any]) -> None:
        self.metrics.append(record)
        for tracker in self.trackers:
            tracker.log(record)

    def _evaluation_due(self) -> bool:
        step = self.state.step
        due = step % self.training.evaluate_every == 0 or step == self.training.num_steps
        return step > self.state.evaluated_step and due

    def _evaluate(self) -> None:
        """Validate; the state changes only after all of it succeeded, so it can be interrupted and done again."""
        self.updates.check()
        with self.throughput.paused():
            found = evaluate(
                self.model if self.spread is None else self.spread.objective,
                self.validation(),
                isolation=self.isolation,
                token_bytes=self.token_bytes,
                device=self.device,
                autocast=self.autocast,
                report=self.report,
                step=self.state.step,
                tokens=self._tokens(),
                samples=self.state.samples,
                ranks=self.ranks,
                clock=self.clock,
            )
            if self.spread is not None:
                self.spread.settle()
        record = {"kind": "validation", **dataclasses.asdict(found)}
        if not np.isfinite(found.loss):
            raise DivergenceError(
                f"the validation loss at step {found.step} is {found.loss}; training losses were finite"
            )
        self.consistent = False
        self._record(record)
        better = self.state.judge(found, self.training.min_delta)
        strings = found.string_accuracy
        self.numbers = {**self.numbers, **({"bpb": found.bits_per_byte} if strings is None else {"strings": strings})}
        self.consistent = True
        if better:
            # `last` first: if the process dies in between, its weights are the best ones (`_resume`).
            self._save()
            with self.throughput.paused():
                self._write(self.best, self.state)

    def _save(self) -> None:
        if self.saved == (self.state.step, self.state.evaluated_step):
            return
        self.updates.check()
        with self.throughput.paused():
            state = self.state
            state.window_nll = float(self.ranks.sum(self.nll_sum).item())
            state.metrics_bytes = self.metrics.sync()
            state.measured_seconds, state.measured_positions = self.throughput.seconds, self.throughput.positions
            state.seconds = self.clock() - self.started
            state.peak_memory_bytes = max(state.peak_memory_bytes, self.ranks.largest(self.memory.bytes()))
            state.data = self.feed.state_dict()
            self._write(self.last, state, self.optimizer)
            self.saved = (state.step, state.evaluated_step)

    def _write(self, folder: Path, state: TrainingState, optimizer: torch.optim.Optimizer | None = None) -> None:
        if self.spread is None:
            save_checkpoint(folder, self.configuration, state, self.model, optimizer)
        else:
            save_sharded(folder, self.configuration, state, self.spread, optimizer, self.device)

    # The end

    def _stopped_early(self) -> bool:
        patience = self.training.patience
        return patience is not None and self.state.without_improvement >= patience

    def _mastered(self) -> Validation | None:
        """The last validation, if it reached `mastery`."""
        found, wanted = self.state.final, self.training.mastery
        reached = found is not None and wanted is not None and (found.string_accuracy or 0.0) >= wanted
        return found if reached else None

    def _finished(self) -> bool:
        return self.state.step >= self.training.num_steps or self._stopped_early() or self._mastered() is not None

    def _tokens(self) -> int:
        return self.state.step * self.training.batch_tokens

    def _total(self) -> int:
        return self.training.num_steps * self.training.batch_tokens

    def _result(self) -> TrainingResult:
        self._save()
        return self.ranks.on_first(self._write_result)

    def _write_result(self) -> TrainingResult:
        state = self.state
        assert isinstance(state.final, Validation)
        assert isinstance(state.best, Validation)
        metrics = read_metrics(self.directory / "metrics.jsonl", "train")
        rates = [record["tokens_per_second"] for record in metrics if record["tokens_per_second"]]
        result = TrainingResult(
            steps=state.step,
            tokens=self._tokens(),
            targets=state.targets,
            final=state.final,
            best=state.best,
            stopped_early=state.step < self.training.num_steps,
            tokens_per_second=statistics.median(rates) if rates else None,
            tokens_per_second_overall=self.throughput.overall(),
            peak_memory_bytes=state.peak_memory_bytes,
            peak_memory_of=self.memory.kind,
            seconds=state.seconds,
            sessions=state.sessions,
            dtype=self.dtype,
            device=self._device_name(),
            samples=state.samples,
            mastered=self._mastered(),
        )
        result.write(self.directory / "result.json")
        return result

    def _device_name(self) -> str:
        name, ranks = device_name(self.device), self.ranks
        return name if ranks.size == 1 else f"{ranks.size} × {name} ({ranks.parallel})"
