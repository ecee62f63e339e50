"""Models that are asked as they are: runs, and folders with Hugging Face weights, beside trained subjects or alone."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from longspan.engines.server import ServerGone
from longspan.engines.source import ModelSource
from longspan.engines.trained_run import TrainedRun
from longspan.engines.transformers import TransformersEngine
from longspan.foundation.errors import UserError
from longspan.models.interchange import write_folder
from longspan.report.data import ReportInput, load
from longspan.study.asked import imported_engine
from longspan.study.plan import make_plan
from longspan.study.run import run_study
from longspan.study.schema import load_study
from longspan.terminal import Terminal

pytestmark = pytest.mark.usefixtures("no_figures")

_spec = importlib.util.spec_from_file_location("stub_server", Path(__file__).parents[1] / "engines" / "stub_server.py")
assert _spec is not None
assert _spec.loader is not None
stub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stub_server)

CORPUS = """
corpus: {source: synthetic, max_documents: 100, splits: {train: 0.6, validation: 0.2, test: 0.2}, dedup: null}
probes:
  - perplexity: {max_tokens: 128, max_documents: 8}
  - suffix_identification: {contexts: [8, 32], suffix: 4, num_items: 12}
"""
TRAINED = f"""
question: What does each of them reach?
{CORPUS}
tokenizer: {{kind: byte_bpe, vocab_size: 300}}
model: {{width: 32, heads: 2, state: 8, mamba_head_dim: 16, mlp_width: 48}}
training: {{context: 48, batch_tokens: 192, tokens: 1_920, peak_lr: 3.0e-3, warmup: 2}}
vary: {{pattern: [AM, AA]}}
"""


def run(path: Path, runs: Path, *overrides: str) -> ReportInput:
    outcome = run_study(str(path), overrides, runs, until="report", terminal=Terminal(quiet=True))
    return load(Path(outcome.data["report"]).with_name("report.json"))


def measured(facts: ReportInput, probe: str) -> dict[str, list[float]]:
    """subject → the values of all measurements of a probe."""
    section = next(section for section in facts.probes if section.kind == probe)
    found: dict[str, list[float]] = {}
    for each in section.summary.measurements:
        found.setdefault(each.subject, []).append(each.value)
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportInput, TrainedRun]:
    """A study's runs, its report, and the run of `AM`."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "both.yaml").write_text(TRAINED)
    facts = run(folder / "both.yaml", folder / "runs")
    plan = make_plan(load_study(str(folder / "both.yaml")), folder / "runs")
    return folder, facts, TrainedRun.open(plan.subjects[0].train.folder(folder / "runs"))


def test_a_checkpoint_and_its_export_answer_as_the_subject_they_come_from(
    trained: tuple[Path, ReportInput, TrainedRun], tmp_path: Path
) -> None:
    _, facts, found = trained
    exported = tmp_path / "exported"
    write_folder(found.load_model(), exported, tokenizer=found.tokenizer, markers=found.markers, context=found.context)
    study = tmp_path / "asked.yaml"
    elsewhere = f"{{pretrained: {exported}, engine: transformers, name: elsewhere, context_limit: 128}}"
    subjects = f"subjects: [{{checkpoint: {found.folder}, name: run}}, {{pretrained: {exported}}}, {elsewhere}]"
    study.write_text(f"question: The same?\n{subjects}\nprobe_context: 48\n{CORPUS}")
    asked = run(study, tmp_path / "runs")
    for probe in ("perplexity", "suffix_identification"):
        wanted = measured(facts, probe)["AM"]
        assert measured(asked, probe) == {
            "run": pytest.approx(wanted, rel=1e-5),
            "exported": pytest.approx(wanted, rel=1e-5),
            "elsewhere": pytest.approx(wanted, rel=1e-4),
        }
    kinds = {subject.label: (subject.kind, subject.mixers) for subject in asked.subjects}
    assert kinds == {
        "run": ("checkpoint", ("attention", "mamba2")),
        "exported": ("pretrained", ("attention", "mamba2")),
        "elsewhere": ("pretrained", ("attention", "mamba2")),
    }
    assert not asked.training
    # What is known of the model is the same whoever holds it, and each was checked before it was believed.
    ours, theirs = (next(each for each in asked.subjects if each.label == name) for name in ("exported", "elsewhere"))
    assert ours.parameters is not None
    assert theirs.parameters is not None
    assert theirs.parameters.total == ours.parameters.total
    assert theirs.letters == ours.letters == "AM"
    assert theirs.forward_flops == ours.forward_flops != {}
    # transformers keeps one tap more of the convolution over its 80 channels than is needed.
    assert {theirs.state_bytes[context] - size for context, size in ours.state_bytes.items()} == {80 * 4}
    for facts_of in asked.subjects:
        assert "oracle: batched = single, cached = cold, chunked = whole, streaming = parallel" in facts_of.notes
    assert [entry.level for entry in asked.ledger if entry.topic == "oracle" and entry.table] == ["info"] * 3


def test_a_model_whose_ways_differ_is_warned_about(
    trained: tuple[Path, ReportInput, TrainedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained[2]
    exported = tmp_path / "exported"
    write_folder(found.load_model(), exported, tokenizer=found.tokenizer, markers=found.markers, context=found.context)
    score = TransformersEngine._after
    monkeypatch.setattr(TransformersEngine, "_after", lambda *given: [nll + 0.1 for nll in score(*given)])
    study = tmp_path / "asked.yaml"
    subjects = f"subjects: [{{pretrained: {exported}, engine: transformers, template: raw, name: bad}}]"
    study.write_text(f"question: Right?\n{subjects}\nprobe_context: 48\n{CORPUS}")
    facts = run(study, tmp_path / "runs")
    (warning,) = [entry for entry in facts.ledger if entry.level == "warning"]
    assert "ORACLE FAILED: cached = cold" in warning.text
    assert "ORACLE FAILED" in facts.subjects[0].notes
    assert "engine transformers, fp32, template raw" in facts.subjects[0].notes


def test_an_import_is_not_asked_by_text_without_a_template(
    trained: tuple[Path, ReportInput, TrainedRun], tmp_path: Path
) -> None:
    found = trained[2]
    exported = tmp_path / "exported"
    write_folder(found.load_model(), exported, tokenizer=found.tokenizer, markers=found.markers, context=found.context)
    silent = imported_engine(found, ModelSource(pretrained=str(exported)), "cpu")
    with pytest.raises(UserError, match="template: raw"):
        silent.encode_prompt("Who asks?")
    told = imported_engine(found, ModelSource(pretrained=str(exported), template="raw"), "cpu")
    ids = told.encode_prompt("Who asks?", " The")
    assert ids[0] == found.tokenizer.special.boundary
    assert found.tokenizer.decode(ids) == "Who asks? The"
    assert told.fingerprint != silent.fingerprint
    # What was trained here is asked as it was trained.
    assert imported_engine(found, ModelSource(checkpoint="run"), "cpu").encode_prompt("Who asks?", " The").tolist() == (
        ids.tolist()
    )


def test_a_tokenizer_with_more_entries_than_the_model_has_rows_is_refused_by_the_plan(
    trained: tuple[Path, ReportInput, TrainedRun], tmp_path: Path
) -> None:
    found = trained[2]
    exported = tmp_path / "exported"
    write_folder(found.load_model(), exported, tokenizer=found.tokenizer, markers=found.markers, context=found.context)
    config = json.loads((exported / "config.json").read_text())
    (exported / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    study = tmp_path / "asked.yaml"
    study.write_text(f"question: Which?\nsubjects: [{{pretrained: {exported}}}]\nprobe_context: 48\n{CORPUS}")
    with pytest.raises(UserError, match="a tokenizer of 300 entries for a model of 100 rows"):
        make_plan(load_study(str(study)), tmp_path / "runs")


def test_a_checkpoint_stands_beside_subjects_that_are_trained(
    trained: tuple[Path, ReportInput, TrainedRun], tmp_path: Path
) -> None:
    folder, _, found = trained
    before = set((folder / "runs" / "jobs").iterdir())
    facts = run(folder / "both.yaml", folder / "runs", f"subjects=[{{checkpoint: {found.folder}, name: again}}]")
    assert [subject.label for subject in facts.subjects] == ["AM", "AA", "again"]
    values = measured(facts, "perplexity")
    assert values["again"] == values["AM"]
    # Only its own import and probes are new; the corpus is prepared once more, under the run's tokenizer.
    made = sorted(path.name.partition("-")[0] for path in set((folder / "runs" / "jobs").iterdir()) - before)
    assert made == ["import", "prepare", "probe", "probe"]


@pytest.mark.parametrize(
    ("subjects", "given"),
    [
        ("[{}]", "a subject without weights"),
        ("[{checkpoint: a, pretrained: b}]", "`checkpoint` and `pretrained`"),
        ("[{pretrained: nowhere/at/all}]", "nowhere/at/all is not there"),
        ("[{checkpoint: nowhere}]", "nowhere holds no run"),
        ("[{checkpoint: a, revision: main}]", "revision = 'main' of a checkpoint"),
        ("[{pretrained: a/x}, {pretrained: b/x}]", "two subjects are called 'x'"),
        ("[{pretrained: a, weights: last}]", "weights = 'last' of a"),
        ("{pretrained: a}", "subjects = "),
        ("[{pretraned: a}]", "pretraned"),
        ("[{checkpoint: a, engine: transformers}]", "engine = 'transformers' of a checkpoint"),
        ("[{pretrained: a, engine: transformrs}]", "subjects[0].engine = 'transformrs'"),
        ("[{pretrained: a, rope_scaling: {rope_type: yarn}}]", "rope_scaling of a with the engine native"),
        ("[{pretrained: a, template: custom}]", "custom_template = None"),
        ("[{pretrained: a, template: custom, custom_template: Q}]", "custom_template = 'Q'"),
        ("[{pretrained: a, system: be brief}]", "system or template_arguments"),
        ("[{pretrained: a, engine: transformers, arguments: {batch_tokens: 0}}]", "batch_tokens = 0"),
        ("[{pretrained: a, arguments: {batch_tokens: 1}}]", "batch_tokens"),
        ("[{endpoint: {base_url: localhost, model: m, tokenizer: t}}]", "base_url = 'localhost'"),
        ("[{endpoint: {base_url: 'http://x', model: m, tokenizer: t}, dtype: bf16}]", "dtype or rope_scaling"),
    ],
)
def test_entries_that_name_no_model_are_refused(tmp_path: Path, subjects: str, given: str) -> None:
    study = tmp_path / "asked.yaml"
    study.write_text(f"question: Which?\nsubjects: {subjects}\nprobe_context: 48\n{CORPUS}")
    with pytest.raises(UserError) as refused:
        make_plan(load_study(str(study)), tmp_path / "runs")
    assert given in refused.value.given


def test_without_training_the_length_of_the_items_must_be_said(
    trained: tuple[Path, ReportInput, TrainedRun], tmp_path: Path
) -> None:
    study = tmp_path / "asked.yaml"
    study.write_text(f"question: Which?\nsubjects: [{{checkpoint: {trained[2].folder}}}]\n{CORPUS}")
    with pytest.raises(UserError, match="probe_context"):
        make_plan(load_study(str(study)), tmp_path / "runs")


def test_a_server_that_goes_away_stops_the_study_and_the_same_command_goes_on(
    trained: tuple[Path, ReportInput, TrainedRun], tmp_path: Path
) -> None:
    found = trained[2]
    exported = tmp_path / "exported"
    write_folder(found.load_model(), exported, tokenizer=found.tokenizer, markers=found.markers, context=found.context)
    with stub_server.serving() as stub:
        endpoint = f"{{base_url: '{stub.url}', model: m, tokenizer: {exported}}}"
        served = f"{{endpoint: {endpoint}, name: served, template: raw, arguments: {{retries: 0, concurrency: 2}}}}"
        here = f"{{pretrained: {exported}, engine: transformers, name: here, context_limit: 256}}"
        study = tmp_path / "asked.yaml"
        study.write_text(
            f"question: Which?\nsubjects: [{served}, {here}]\nprobe_context: 48\n{CORPUS}"
            "  - efficiency: {contexts: [16, 32], repeats: 3, warm_ups: 0, new_tokens: 4}\n"
        )
        # The server gives up after the oracle and some answers.
        stub.behave = lambda body: (503, "busy", {}) if len(stub.asked) > 60 else None
        with pytest.raises(ServerGone, match="served cannot be reached"):
            run(study, tmp_path / "runs")
        before = {path: path.read_text() for path in (tmp_path / "runs").rglob("records.jsonl")}
        assert before
        stub.behave = None
        facts = run(study, tmp_path / "runs")
        stub.asked.clear()
        run(study, tmp_path / "runs")
        assert stub.asked == []
    for path, text in before.items():
        assert path.read_text().startswith(text)
    for path in (tmp_path / "runs").rglob("records.jsonl"):
        keys = [json.loads(line)["key"] for line in path.read_text().splitlines()]
        assert len(set(keys)) == len(keys)
    assert {subject.label: subject.kind for subject in facts.subjects} == {"served": "endpoint", "here": "pretrained"}
    costs = measured(facts, "efficiency")
    # Two contexts: no line through fewer than three, so no time without context and no growth.
    assert (
        len(costs["here"])
        == len({"prefill_rate", "first_token", "output_token", "bandwidth", "copy_share", "held"}) * 2
    )
    # The stub's whole stream comes at once, so only what it says counts; its state is not known.
    assert set(measured(facts, "perplexity")) == {"served", "here"}
