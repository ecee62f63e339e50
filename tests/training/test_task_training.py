"""Training on a task: fresh strings, exact resumption, judged string by string, ended by mastery."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.corpus.packing import PackingConfig
from longspan.corpus.tasks import TaskBatches, make_task, validation_batches
from longspan.foundation.errors import Stopped
from longspan.foundation.progress import Progress
from longspan.models.language_model import IGNORE, LanguageModel, ModelConfig
from longspan.training.config import TrainingConfig
from longspan.training.evaluation import evaluate
from longspan.training.loop import train
from longspan.training.metrics import read_metrics
from longspan.training.optimizer import learning_rate
from longspan.training.precision import autocast_for
from longspan.training.result import TrainingResult

TASK = make_task({"task": "copy", "vocab_size": 3, "min_length": 1, "max_length": 3}, "task")
CONTEXT, PACKING, CPU = 24, PackingConfig(isolation="none"), torch.device("cpu")


def settings(**changes: Any) -> TrainingConfig:
    basis = {"context": CONTEXT, "batch_tokens": 8 * CONTEXT, "steps": 24, "peak_lr": 6e-3, "warmup": 2,
             "evaluate_every": 6, "checkpoint_every": 4, "log_every": 3}  # fmt: skip
    return TrainingConfig(**{**basis, **changes})


def model() -> LanguageModel:
    sizes = {"width": 16, "heads": 2, "state": 4, "mamba_head_dim": 8, "chunk": 8, "mlp_width": 16}
    return LanguageModel(ModelConfig(pattern="AM", **sizes), TASK.tokenizer().vocab_size, 0)


def validation(strings: int = 40) -> list[Any]:
    return list(validation_batches(TASK, PACKING, context=CONTEXT, rows=8, strings=strings))


def run(folder: Path, training: TrainingConfig, net: LanguageModel | None = None, **more: Any) -> TrainingResult:
    return train(
        net or model(),
        training,
        make_batches=lambda: TaskBatches(TASK, PACKING, context=CONTEXT, rows=training.rows, seed=training.seed),
        validation=validation,
        isolation="none",
        token_bytes=TASK.tokenizer().token_bytes,
        directory=folder,
        **more,
    )


def stopping_after(steps: int) -> Any:
    def report(progress: Progress) -> None:
        if progress.stage == "train" and progress.done >= steps * 8 * CONTEXT:
            raise Stopped("enough")

    return report


def numbers(folder: Path) -> list[dict[str, Any]]:
    timed = {"seconds", "tokens_per_second"}
    return [{k: v for k, v in line.items() if k not in timed} for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.parametrize("stop", [3, 9])
def test_a_stopped_training_ends_as_one_that_never_stopped(stop: int, tmp_path: Path) -> None:
    straight = run(tmp_path / "straight", settings())
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", settings(), report=stopping_after(stop))
    resumed = run(tmp_path / "stopped", settings())
    weights = [
        (tmp_path / name / "checkpoints/last/model.safetensors").read_bytes() for name in ("straight", "stopped")
    ]
    assert weights[0] == weights[1]
    assert numbers(tmp_path / "straight") == numbers(tmp_path / "stopped")
    assert (resumed.samples, resumed.targets) == (straight.samples, straight.targets)


def test_samples_are_the_strings_whose_answers_were_trained_on(tmp_path: Path) -> None:
    result = run(tmp_path, settings(steps=6))
    stream = TaskBatches(TASK, PACKING, context=CONTEXT, rows=8, seed=0)
    batches = [next(stream) for _ in range(6)]
    assert result.samples == sum(batch.samples for batch in batches)
    assert result.targets == sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    assert result.final.samples == result.samples
    assert result.final.num_strings == 40


def judged(net: LanguageModel, batches: list[Any]) -> Any:
    return evaluate(net, batches, isolation="none", token_bytes=TASK.tokenizer().token_bytes, device=CPU,
                    autocast=autocast_for("fp32", CPU), report=lambda progress: None, step=0, tokens=0)  # fmt: skip


def test_a_string_is_right_where_all_of_its_tokens_are(tmp_path: Path) -> None:
    net = model()
    run(tmp_path, settings(steps=40, evaluate_every=40), net)
    batches = validation()
    found = judged(net.eval(), batches)
    right: dict[int, list[bool]] = {}
    with torch.no_grad():
        for batch in batches:
            hidden, _ = net(torch.from_numpy(batch.tokens).long())
            likeliest = net.logits(hidden).argmax(-1).numpy()
            for row, column in np.argwhere(batch.targets != IGNORE):
                hit = bool(likeliest[row, column] == batch.targets[row, column])
                right.setdefault(int(batch.doc_id[row, column]), []).append(hit)
    tokens = [hit for hits in right.values() for hit in hits]
    assert 0 < sum(tokens) < len(tokens)
    assert found.string_accuracy == pytest.approx(sum(all(hits) for hits in right.values()) / 40)
    assert found.token_accuracy == pytest.approx(sum(tokens) / len(tokens))
    assert found.loss == pytest.approx(judged(net, batches).loss)


def test_text_is_not_judged_by_strings() -> None:
    (batch, *_) = validation()
    as_text = type(batch)(batch.tokens, batch.targets, batch.doc_id)
    found = judged(model(), [as_text])
    assert found.string_accuracy is None
    assert found.num_strings == 0


def test_mastery_ends_training_and_says_what_it_took(tmp_path: Path) -> None:
    result = run(tmp_path / "easy", settings(steps=60, mastery=0.01))
    assert result.mastered is not None
    assert result.mastered.string_accuracy is not None
    assert result.mastered.string_accuracy >= 0.01
    assert result.stopped_early == (result.steps < 60)
    assert result.mastered.samples == result.samples
    before = [v["string_accuracy"] for v in read_metrics(tmp_path / "easy/metrics.jsonl", "validation")][:-1]
    assert all(share < 0.01 for share in before)
    again = TrainingResult.read(tmp_path / "easy/result.json")
    assert again == result
    hard = run(tmp_path / "hard", settings(steps=6, mastery=1.0))
    assert hard.mastered is None
    assert not hard.stopped_early


def test_every_step_has_the_rate_of_its_schedule(tmp_path: Path) -> None:
    training = settings()
    run(tmp_path, training)
    rates = [line["lr"] for line in numbers(tmp_path) if line["kind"] == "train"]
    assert rates == [pytest.approx(learning_rate(training, step)) for step in (0, 2, 5, 8, 11, 14, 17, 20, 23)]
    assert len(set(rates)) == len(rates)


def test_a_result_of_text_reads_as_before() -> None:
    plain = {"step": 1, "tokens": 2, "loss": 1.0, "perplexity": 2.7, "bits_per_byte": 1.0, "num_targets": 3,
             "num_bytes": 4, "seconds": 0.1}  # fmt: skip
    stored = {"steps": 1, "tokens": 2, "targets": 3, "final": plain, "best": plain, "stopped_early": False,
              "tokens_per_second": None, "tokens_per_second_overall": None, "peak_memory_bytes": 1, "device": "cpu",
              "peak_memory_of": "process RSS", "seconds": 1.0, "sessions": 1, "dtype": "fp32"}  # fmt: skip
    found = TrainingResult.from_json(json.loads(json.dumps(stored)))
    assert found.samples == 0
    assert found.mastered is None
