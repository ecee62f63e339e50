"""A subject as the harness sees it, asked directly, and what its answers are by hand."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch

from longspan.engines.native import NativeEngine
from longspan.models.language_model import LanguageModel

if TYPE_CHECKING:
    from longspan.engines.lm_eval import LongspanLM

MakeModel = Callable[..., LanguageModel]
MakeEngine = Callable[..., NativeEngine]
Lm = Callable[..., "LongspanLM"]


@pytest.fixture(autouse=True)
def log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness keeps its log from pytest once its command line has run."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)


@pytest.fixture
def lm(tiny_model: MakeModel, tiny_engine: MakeEngine) -> Lm:
    def build(
        pattern: str = "AM", *, max_length: int | None = 64, engine: dict[str, Any] | None = None, **model: Any
    ) -> LongspanLM:
        from longspan.engines.lm_eval import LongspanLM

        return LongspanLM(tiny_engine(tiny_model(pattern, **model), **(engine or {})), max_length=max_length)

    return build


def ask(lm: LongspanLM, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]
    answers: list[Any] = getattr(lm, kind)(requests, disable_tqdm=True)
    return answers


def by_hand(lm: LongspanLM, shown: list[int], scored: list[int]) -> tuple[float, bool]:
    """Log-likelihood and greediness from all logits of one plain pass."""
    with torch.no_grad():
        hidden, _ = lm.engine._model(torch.tensor([[*shown, *scored]])[:, :-1])
        logits = lm.engine._model.logits(hidden[0, -len(scored) :])
    right = torch.tensor(scored)
    log_p = logits.log_softmax(-1).gather(-1, right[:, None]).sum().item()
    return log_p, bool((logits[:, : lm.engine.tokenizer.vocab_size].argmax(-1) == right).all())


def ids(lm: LongspanLM, text: str) -> list[int]:
    return lm.engine.tokenizer.encode(text).tolist()
