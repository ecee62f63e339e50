"""What a training configuration allows, and the numbers that follow from it."""

from __future__ import annotations

from typing import Any

import pytest

from longspan.foundation.errors import UserError
from longspan.training.config import TrainingConfig

BASIS: dict[str, Any] = {"context": 16, "batch_tokens": 128, "steps": 100, "peak_lr": 1e-3}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig.parse({**BASIS, **changes}, "training")


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    assert config(steps=None, tokens=1000).num_steps == 8
    assert config(steps=None, tokens=1024).num_steps == 8


def test_rows_are_those_of_one_micro_batch() -> None:
    assert config().rows == 8
    assert config(accumulation=4).rows == 2


def test_warmup_and_decay_are_steps_or_shares() -> None:
    assert config(warmup=7).warmup_steps == 7
    assert config(warmup=0.1).warmup_steps == 10
    assert config(warmup=0.001).warmup_steps == 1
    assert config(warmup=0).warmup_steps == 0
    assert config(schedule="wsd", decay=0.2).decay_steps == 20
    assert config(schedule="wsd").decay_steps == 10
    assert config().decay_steps == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 10}, "both `tokens` and `steps`"),
        ({"steps": None}, "neither `tokens` nor `steps`"),
        ({"batch_tokens": 100}, "set batch_tokens to 96"),
        ({"accumulation": 3}, "set batch_tokens to 144"),
        ({"warmup": 1.5}, "warmup = 1.5"),
        ({"warmup": 200}, "warm-up of 200"),
        ({"decay": 10}, "decay = 10.0 has no effect|decay = 10 has no effect"),
        ({"schedule": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio = 0.1 has no effect"),
        ({"min_delta": 0.1}, "min_delta = 0.1 has no effect"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"peek_lr": 1.0}, "did you mean `peak_lr`"),
        ({"clip": 0}, "clip"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_value_and_the_fix(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(**changes)
