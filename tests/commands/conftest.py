"""A study's folder with two tiny runs in it, and the command line as a person uses it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longspan import cli
from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.run_index import ListedRun, list_runs
from longspan.engines.trained_run import describe_run
from longspan.foundation.files import write_json
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.training.checkpoint import TrainingState, save_checkpoint

CONTEXT = 48


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [f"The {noun} {verb} the other {noun}." for noun in ("senate", "house") for verb in ("asks", "answers")]
    return train_tokenizer(TokenizerConfig(vocab_size=270, min_frequency=1), texts)


@pytest.fixture(scope="session")
def study(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/STUDY` with the patterns AMG (markers), MM (none) and A (learned positions)."""
    runs = tmp_path_factory.mktemp("runs")
    listed = []
    for pattern, markers, more in (
        ("AMG", True, {}),
        ("MM", False, {}),
        ("A", True, {"positions": "learned", "max_positions": CONTEXT}),
    ):
        options = {"width": 16, "heads": 2, "state": 8, "mamba_head_dim": 8, "chunk": 16, "mlp": "none", **more}
        config = ModelConfig.parse({"pattern": pattern, **options}, "model")
        folder = runs / "jobs" / f"train-{pattern}"
        describe_run(
            folder,
            name=f"{pattern} seed 0",
            model=config.model_dump(mode="json"),
            tokenizer=tokenizer,
            markers=markers,
            isolation="full",
            context=CONTEXT,
        )
        weights = LanguageModel(config, tokenizer.vocab_size)
        save_checkpoint(folder / "training" / "checkpoints" / "best", {}, TrainingState(), weights)
        write_json(folder / "training" / "result.json", {})
        listed.append(ListedRun(pattern, {"pattern": pattern}, 0, folder))
    list_runs(runs / "mini", listed)
    return runs / "mini"


@pytest.fixture
def longspan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The exit code of `longspan ARGUMENTS`, run here."""

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["longspan", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run
