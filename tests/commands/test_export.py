"""`longspan export` as a person uses it: a folder that answers as the run does, or an error and no folder."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.loading import load
from longspan.engines.run_index import ListedRun, list_runs
from longspan.engines.trained_run import describe_run
from longspan.foundation.files import write_json
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.training.checkpoint import TrainingState, save_checkpoint

Longspan = Callable[..., int]
Capture = pytest.CaptureFixture[str]
DOCS = Path(__file__).parents[2] / "docs"
TOKENS = np.arange(40) * 7 % 250


@pytest.fixture(scope="session")
def hybrid(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`runs/STUDY` with the pattern AMAM and two seeds, whose weights differ between best and last."""
    runs = tmp_path_factory.mktemp("hybrid")
    config = ModelConfig.parse(
        {"pattern": "AMAM", "width": 16, "heads": 2, "state": 8, "mamba_head_dim": 8, "chunk": 16, "mlp_width": 24},
        "model",
    )
    listed = []
    for seed in (0, 1):
        folder = runs / "jobs" / f"train-{seed}"
        described = config.model_dump(mode="json")
        name = f"AMAM seed {seed}"
        describe_run(
            folder, name=name, model=described, tokenizer=tokenizer, markers=True, isolation="full", context=48
        )
        for number, weights in enumerate(("best", "last")):
            model = LanguageModel(config, tokenizer.vocab_size, seed=10 * number + seed)
            save_checkpoint(folder / "training" / "checkpoints" / weights, {}, TrainingState(), model)
        write_json(folder / "training" / "result.json", {})
        listed.append(ListedRun("AMAM", {"pattern": "AMAM"}, seed, folder))
    list_runs(runs / "quickstart", listed)
    return runs / "quickstart"


def test_the_folder_answers_as_the_run(hybrid: Path, longspan: Longspan, capsys: Capture, tmp_path: Path) -> None:
    for weights in ("best", "last"):
        folder = tmp_path / weights
        assert longspan("export", str(hybrid), "seed=1", "--to", str(folder), "--weights", weights, "--json") == 0
        shown = capsys.readouterr()
        said = json.loads(shown.out)
        assert shown.err == ""
        assert said["subject"] == "AMAM seed 1"
        assert said["architecture"] == "GraniteMoeHybridForCausalLM"
        assert said["mixers"] == "2 attention, 2 mamba2"
        assert said["context"] == 48
        assert said["differences"]["read_back"] == said["differences"]["rounding"] == 0.0
        assert said["differences"]["transformers"] is None
        assert said["files"] == {path.name: path.stat().st_size for path in folder.iterdir()}
        run, written = load(hybrid, select={"seed": 1}, weights=weights), load(folder)  # type: ignore[arg-type]
        np.testing.assert_array_equal(written.nll([TOKENS])[0], run.nll([TOKENS])[0])
        assert written.document_prefix.tolist() == run.document_prefix.tolist()
        assert written.tokenizer.encode("The senate 🙂").tolist() == run.tokenizer.encode("The senate 🙂").tolist()
    assert (tmp_path / "best" / "model.safetensors").read_bytes() != (
        tmp_path / "last" / "model.safetensors"
    ).read_bytes()


def test_a_person_reads_what_was_compared(hybrid: Path, longspan: Longspan, capsys: Capture, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = hybrid.parent / "jobs" / "train-0"
    options = ("--dtype", "bf16", "--context", "96", "--check")
    assert longspan("export", str(run), "--to", str(tmp_path / "out"), *options) == 0
    shown = capsys.readouterr()
    assert "GraniteMoeHybridForCausalLM, 2 attention, 2 mamba2" in shown.out
    assert "bf16, context 96" in shown.out
    assert re.search(r"^transformers 5\.\S+: logits differ by \S+e-\d+, with its cache by \S+e-\d+$", shown.out, re.M)
    assert re.search(r"^rounding to bf16: logits differ from the trained ones by [1-9]", shown.out, re.M)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 96
    assert "comparing" in shown.err


def test_models_without_attention_are_exported_too(
    study: Path, longspan: Longspan, capsys: Capture, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    words = ("export", str(study), "pattern=MM", "--to", str(tmp_path / "out"), "--check", "--json")
    assert longspan(*words) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["architecture"] == "Mamba2ForCausalLM"
    assert 0 < said["differences"]["transformers_cached"] <= said["differences"]["limit"] == 1e-4
    run, written = load(study, select={"pattern": "MM"}), load(tmp_path / "out")
    assert run.document_prefix.tolist() == written.document_prefix.tolist() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "pattern=MM seed=0"),
        (("pattern=AMG",), "G is gru"),
        (("pattern=A",), "positions = 'learned'"),
        (("pattern=MM", "--dtype", "fp8"), "fp8"),
        (("pattern=MM", "--weights", "first"), "first"),
        (("pattern=MM", "--context", "0"), "--context"),
    ],
)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    study: Path, longspan: Longspan, capsys: Capture, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert longspan("export", str(study), *arguments, "--to", str(tmp_path / "out")) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    assert not list(tmp_path.iterdir())


def test_what_is_no_run_is_said(study: Path, longspan: Longspan, capsys: Capture, tmp_path: Path) -> None:
    assert longspan("export", str(tmp_path), "--to", str(tmp_path / "out")) == 2
    assert "holds neither subject.json nor subjects.json" in capsys.readouterr().err
    assert longspan("export", str(tmp_path / "nowhere"), "--to", str(tmp_path / "out")) == 2
    assert "is not there" in capsys.readouterr().err
    assert longspan("export", str(study), "pattern=MM") == 2
    assert "--to" in capsys.readouterr().err


def test_an_earlier_export_is_replaced_only_when_asked(
    study: Path, longspan: Longspan, capsys: Capture, tmp_path: Path
) -> None:
    words = ("export", str(study), "pattern=MM", "--to", str(tmp_path / "out"))
    assert longspan(*words) == 0
    assert longspan(*words) == 2
    assert "--force" in capsys.readouterr().err
    assert longspan(*words, "--force") == 0
    capsys.readouterr()
    assert longspan("export", str(tmp_path / "out"), "--to", str(tmp_path / "again")) == 2
    shown = capsys.readouterr().err
    assert "is a Hugging Face folder already" in shown
    assert "use it as it is" in shown


def test_a_folder_that_computes_something_else_is_not_written(
    hybrid: Path, longspan: Longspan, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longspan.commands import export

    def damaged(folder: Path, **options: object) -> LanguageModel:
        model = right(folder, **options)  # type: ignore[arg-type]
        model.norm.weight.data *= 1.001
        return model

    right = export.read_folder
    monkeypatch.setattr(export, "read_folder", damaged)
    assert longspan("export", str(hybrid), "seed=0", "--to", str(tmp_path / "out")) == 1
    assert "computes something else" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_check_without_transformers_names_the_extra(
    hybrid: Path, longspan: Longspan, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert longspan("export", str(hybrid), "seed=0", "--to", str(tmp_path / "out"), "--check") == 2
    assert "longspan[transformers]" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_python_of_the_page_runs(
    hybrid: Path, longspan: Longspan, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    assert longspan("export", str(hybrid), "seed=0", "--to", "amam") == 0
    capsys.readouterr()
    page = (DOCS / "export.md").read_text(encoding="utf-8")
    theirs, ours = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    names: dict[str, object] = {}
    exec(theirs, names)
    assert capsys.readouterr().out.startswith("['The state of the Union is")
    exec(ours, names)
    assert isinstance(names["model"], LanguageModel)
    assert names["begins_with_boundary"] is True
