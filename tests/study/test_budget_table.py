"""`longspan budget`: what the subjects cost, from the study file alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from longspan import cli
from longspan.foundation.errors import UserError
from longspan.foundation.files import read_json, write_json
from longspan.models.language_model import LanguageModel
from longspan.study.budget_table import ASSUMED_VOCABULARY, BudgetTable, budget_table, parse_contexts
from longspan.study.jobs import Job
from longspan.study.schema import load_study

STUDY = """
question: What does it cost?
corpus: {source: text, path: not-there}
tokenizer: {kind: byte_bpe, vocab_size: 320}
model:
  {width: 32, heads: 2, state: 8, mamba_head_dim: 16, mlp_width: 64, match: {non_embedding_parameters: AAAA}}
training: {context: 64, batch_tokens: 256, tokens: 5_000, peak_lr: 3.0e-3}
vary:
  pattern: [AAAA, "[AM]2M", "M3"]
  seed: [0, 1]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "cost.yaml"
    path.write_text(STUDY)
    return path


def table(file: Path, *overrides: str, **settings: int) -> BudgetTable:
    return budget_table(load_study(str(file), overrides), file.parent / "runs", **settings)


def test_every_number_is_that_of_the_real_model(file: Path) -> None:
    found = table(file, contexts=[16, 64]).subjects
    assert [each.label for each in found] == ["AAAA", "[AM]2M", "M3"]
    for each in found:
        model = LanguageModel(each.model, 320)
        _, state = model(model.embedding.weight.new_zeros(1, 16).long(), None, model.initial_state())
        assert state is not None
        assert each.state[16] == state.bytes()
        p = each.parameters
        assert p.total == sum(parameter.numel() for parameter in model.parameters())
        assert p.total == p.embedding + p.mixers + p.mlp + p.norms + p.head
        assert (each.arms, each.runs) == ((each.label,), 2)
        assert each.match is not None
        assert abs(each.match.residual) <= 0.005
        # 5,000 tokens are 20 whole steps of 256.
        assert each.tokens == 5_120
        assert each.training_flops == 3 * each.forward_flops * 5_120
    assert found[1].mixers == ("[attention+mamba2]", "[attention+mamba2]", "mamba2")


def test_arms_that_cost_the_same_are_one_row(file: Path) -> None:
    found = table(file, "vary.isolation=[full, none]", "vary.markers=[true, false]").subjects
    assert [(each.label, len(each.arms), each.runs) for each in found] == [
        ("AAAA", 4, 8),
        ("[AM]2M", 4, 8),
        ("M3", 4, 8),
    ]
    assert found[0].arms[1] == "AAAA · full · no markers"
    apart = table(file, "vary.context=[64, 128]").subjects
    assert [each.label for each in apart][:2] == ["AAAA · 64", "AAAA · 128"]


def finish_training(file: Path, pattern: str, rate: float, **training: object) -> Path:
    """A finished training job of a subject, as a run leaves it."""
    (found,) = [each for each in table(file).subjects if each.label == pattern]
    settings = {**load_study(str(file)).base["training"], "accumulation": 1, "optimizer": "adamw", "dtype": "auto"}
    specification = {
        "model": found.model.model_dump(mode="json"),
        "vocab_size": 320,
        "training": {**settings, "compile": "auto", "seed": 5, "tokens": 999, **training},
    }
    job = Job("train", f"train {pattern}", specification)
    with job.claim(file.parent / "runs") as folder:
        job.finish(folder, {"training": {"tokens_per_second": rate}})
    return folder


def test_time_comes_from_earlier_runs_of_the_same_model_on_this_machine(file: Path) -> None:
    before = table(file)
    assert all(each.tokens_per_second is None for each in before.subjects)
    assert any("assumes 35 %" in note for note in before.notes)
    finish_training(file, "AAAA", 640.0)
    finish_training(file, "AAAA", 10.0, context=32)
    finish_training(file, "AAAA", 20.0, dtype="bf16")
    marker = finish_training(file, "AAAA", 30.0, seed=9) / "done.json"
    done = read_json(marker)
    done["environment"]["hardware"]["processor"] = "another"
    write_json(marker, done)
    first, second, _ = table(file).subjects
    assert first.tokens_per_second == 640.0
    assert first.seconds == 5_120 / 640
    assert second.tokens_per_second is None


def test_a_tokenizer_that_is_not_at_hand_is_assumed_and_said_or_given(file: Path) -> None:
    missing = 'tokenizer={"pretrained": "./not-there.json"}'
    assumed = table(file, missing)
    assert assumed.subjects[0].parameters.embedding == ASSUMED_VOCABULARY * 32
    (note,) = [note for note in assumed.notes if "assumed" in note]
    assert "not-there.json does not exist" in note
    given = table(file, missing, vocab_size=500)
    assert given.subjects[0].parameters.embedding == 500 * 32
    assert not [note for note in given.notes if "assumed (" in note]


def test_the_bits_of_a_rounded_state_are_shown(tmp_path: Path) -> None:
    file = tmp_path / "bits.yaml"
    file.write_text(
        """
question: What does a state of few bits hold?
corpus: {source: task, task: mqar, vocab_size: 34, length: 32, border: 16, pairs: [2]}
packing: {method: one_per_row}
model: {width: 16, heads: 1, state: 8, expand: 1, mamba_head_dim: 16, state_bits: 2}
training: {context: 32, batch_tokens: 256, tokens: 512, peak_lr: 1.0e-3}
vary: {pattern: [M, MA]}
"""
    )
    found = budget_table(load_study(str(file)), tmp_path / "runs", contexts=[16])
    # 16 x 8 numbers of Mamba-2; keys and values of 16 tokens in width 16.
    assert [each.handed_over for each in found.subjects] == [2 * 128, 2 * (128 + 2 * 16 * 16)]
    columns, rows = found.tables()[1]
    assert [row[columns.index("handed over")] for row in rows] == ["256 bit", "1,280 bit"]
    assert any("after 16 tokens" in note for note in found.notes)
    assert found.to_json()["subjects"][0]["handed_over_bits"] == 256


def test_a_study_without_a_rounded_state_has_no_column_for_it(file: Path) -> None:
    assert "handed over" not in table(file).tables()[1][0]


def test_contexts_are_numbers_of_tokens() -> None:
    assert parse_contexts("4k,512,128K,512") == [512, 4096, 131_072]
    for wrong in ("", "4m", "512,,1", "k"):
        with pytest.raises(UserError, match="--contexts"):
            parse_contexts(wrong)


@pytest.mark.parametrize("arguments", [["--json"], []])
def test_the_command_prints_tables_or_one_object(
    file: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["longspan", "budget", str(file), "tokens=2560", "--contexts", "1k,32k", *arguments]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    shown = capsys.readouterr().out
    if not arguments:
        assert "state at 32k" in shown
        assert "2 × [attention+mamba2], 1 × mamba2" in shown
        assert "one after the other" in shown
        return
    subjects = json.loads(shown)["subjects"]
    assert [each["subject"] for each in subjects] == ["AAAA", "[AM]2M", "M3"]
    assert subjects[0]["state_bytes_fp32"] == {"1024": 1024 * 4 * 2 * 32 * 4, "32768": 32768 * 4 * 2 * 32 * 4}
    assert subjects[2]["match"]["free"] == "mlp_width"
    assert subjects[0]["tokens_per_run"] == 2560
    assert subjects[0]["predicted_from"] == "matmul rate"


def test_an_impossible_match_is_refused_with_its_bound(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["longspan", "budget", str(file), "model.match={parameters: 100}"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "mlp_width cannot be below 1" in capsys.readouterr().err
