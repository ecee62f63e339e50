"""A model or data set on the hub without a commit: the one of its first use is recorded, reported, and never mixed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from longspan.corpus.tokenizer import TokenizerConfig, train_tokenizer
from longspan.engines.source import ModelSource
from longspan.foundation.errors import DataError, UserError
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.probes.base import make_probe
from longspan.report.data import load
from longspan.study.pinned import pinned, pinned_probes
from longspan.study.plan import make_plan
from longspan.study.run import run_study
from longspan.study.schema import load_study
from longspan.terminal import Terminal

pytestmark = pytest.mark.usefixtures("no_figures")

pytest.importorskip("huggingface_hub")
FIRST, SECOND = "a" * 39 + "1", "a" * 39 + "2"
STUDY = """
question: Which commit?
corpus: {source: synthetic, max_documents: 60, splits: {train: 0.6, validation: 0.2, test: 0.2}, dedup: null}
subjects: [{pretrained: owner/name, engine: ENGINE, context_limit: LIMIT}]
probe_context: 32
probes: [{perplexity: {max_tokens: 64, max_documents: 2}}]
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with two commits of a model, `main` at the first."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(FIRST)
    tokenizer = train_tokenizer(TokenizerConfig(vocab_size=270, min_frequency=1), ["any text will do"])
    config = ModelConfig(pattern="A", width=16, heads=2, mlp_width=16, mlp="swiglu")
    for seed, commit in enumerate((FIRST, SECOND)):
        model = LanguageModel(config, tokenizer.vocab_size, seed=seed)
        write_folder(model, repository / "snapshots" / commit, tokenizer=tokenizer, markers=True, context=128)
    return repository


def study(tmp_path: Path, engine: str) -> str:
    path = tmp_path / f"{engine}.yaml"
    text = STUDY.replace("ENGINE", engine).replace("LIMIT", "128" if engine == "transformers" else "null")
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_study_goes_on_with_the_commit_it_began_with_and_its_report_names_it(
    engine: str, hub: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    runs, name = tmp_path / "runs", study(tmp_path, engine)
    before = [job.key for job in make_plan(load_study(name), runs).jobs_until("report")]
    (hub / "refs" / "main").write_text(SECOND)
    outcome = run_study(name, (), runs, until="report", terminal=Terminal(quiet=True))
    (subject,) = load(Path(outcome.data["report"]).with_name("report.json")).subjects
    assert f"revision {FIRST}" in subject.notes
    after = make_plan(load_study(name), runs)
    assert [job.key for job in after.jobs_until("report")] == before
    assert all(
        job.details["source"]["revision"] == FIRST for job in after.jobs_until("report") if job.kind != "prepare"
    )
    # Elsewhere nothing was asked before, so there it is the newest.
    other = make_plan(load_study(name), tmp_path / "others").jobs_until("report")
    assert {job.key for job in other if job.kind != "prepare"}.isdisjoint(before)


def test_a_commit_that_is_gone_is_refused_and_not_replaced(hub: Path, tmp_path: Path) -> None:
    runs, name = tmp_path / "runs", study(tmp_path, "native")
    make_plan(load_study(name), runs)
    (hub / "refs" / "main").write_text(SECOND)
    shutil.rmtree(hub / "snapshots" / FIRST)
    with pytest.raises(UserError) as refused:
        make_plan(load_study(name), runs)
    assert f"owner/name was asked at commit {FIRST}, which cannot be had now" in refused.value.given
    assert "`revision:`" in refused.value.fix
    chosen = f"subjects=[{{pretrained: owner/name, revision: {SECOND}}}]"
    assert make_plan(load_study(name, [chosen]), runs).subjects[0].subject.config.source.revision == SECOND  # type: ignore[union-attr]


def test_a_note_that_was_changed_by_hand_is_seen(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ModelSource(pretrained="owner/name")
    assert pinned(source, tmp_path).revision == FIRST
    (note,) = (tmp_path / "models").iterdir()
    assert json.loads(note.read_text()) == {"model": "owner/name", "revision": None, "commit": FIRST}
    # A branch of that name, which is no commit.
    note.write_text(json.dumps({"model": "owner/name", "revision": None, "commit": "main"}))
    with pytest.raises(UserError, match=f"was asked at commit main, and is {FIRST} now"):
        pinned(source, tmp_path)


def test_folders_runs_servers_and_commits_stay_as_they_are(hub: Path, tmp_path: Path) -> None:
    folder = hub / "snapshots" / FIRST
    endpoint = {"base_url": "http://x", "model": "m", "tokenizer": str(folder)}
    for source in (
        ModelSource(pretrained=str(folder)),
        ModelSource(checkpoint="run"),
        ModelSource.parse({"endpoint": endpoint}, ""),
        ModelSource(pretrained="owner/name", revision=SECOND),
    ):
        assert pinned(source, tmp_path / "downloads") is source
    assert not (tmp_path / "downloads").exists()
    assert pinned(ModelSource(pretrained="owner/name", revision="main"), tmp_path / "downloads").revision == FIRST


# --- data sets --------------------------------------------------------------------------------------------------------

QUESTIONS = """
question: Which items?
corpus: {source: synthetic, max_documents: 60, splits: {train: 0.6, validation: 0.2, test: 0.2}, dedup: null}
subjects: [{pretrained: MODEL, engine: native, template: raw}]
probe_context: 400
probes: [{longbench_v2: {max_new_tokens: 2}}]
"""


@pytest.fixture
def data_set(hub: Path) -> Path:
    """Two commits of LongBench-v2 in the hub's cache, `main` at the first."""
    repository = hub.parent / "datasets--THUDM--LongBench-v2"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(FIRST)
    for commit in (FIRST, SECOND):
        row = {"_id": commit, "question": "What is told?", "answer": "B", "context": "A story."}
        row |= {f"choice_{letter}": letter * 3 for letter in "ABCD"}
        (repository / "snapshots" / commit).mkdir(parents=True)
        (repository / "snapshots" / commit / "data.json").write_text(json.dumps([row]))
    return repository


def test_items_stay_those_of_the_commit_a_study_began_with_and_its_report_names_it(
    hub: Path, data_set: Path, tmp_path: Path
) -> None:
    runs, name = tmp_path / "runs", tmp_path / "study.yaml"
    name.write_text(QUESTIONS.replace("MODEL", str(hub / "snapshots" / FIRST)))
    before = [job.key for job in make_plan(load_study(str(name)), runs).jobs_until("report")]
    (data_set / "refs" / "main").write_text(SECOND)
    outcome = run_study(str(name), (), runs, until="report", terminal=Terminal(quiet=True))
    report = load(Path(outcome.data["report"]).with_name("report.json"))
    assert [(row.item, row.x) for row in report.items] == [(f"{FIRST}@400", 400.0)]
    assert not report.items[0].answers[0].text.startswith("at 400")
    (entry,) = (entry for entry in report.ledger if entry.topic == "longbench_v2")
    assert entry.text == f"The items are those of THUDM/LongBench-v2 at commit {FIRST}."
    # Neither the hub nor its cache is asked again.
    shutil.rmtree(data_set / "refs")
    assert [job.key for job in make_plan(load_study(str(name)), runs).jobs_until("report")] == before


def test_books_are_pinned_as_questions_are_and_local_data_as_little_as_probes_without(
    data_set: Path, tmp_path: Path
) -> None:
    shutil.copytree(data_set, data_set.parent / "datasets--emozilla--pg19-test")
    named = {"data": "books.jsonl"}
    given = {
        "pg19": make_probe("pg19"),
        "second": make_probe("pg19", {"revision": SECOND}),
        "own": make_probe("pg19", named),
        "efficiency": make_probe("efficiency"),
    }
    found = pinned_probes(given, tmp_path)
    assert found["pg19"]["revision"] == FIRST
    assert make_probe("pg19", found["pg19"]).protocol()["data"] == f"emozilla/pg19-test@{FIRST}"
    assert {name: found[name] for name in ("second", "own", "efficiency")} == {
        name: given[name].model_dump(mode="json") for name in ("second", "own", "efficiency")
    }


def test_a_data_set_that_cannot_be_asked_is_told_with_another_way(hub: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="which commit the data set THUDM/LongBench-v2 is at cannot be asked") as told:
        pinned_probes({"longbench_v2": make_probe("longbench_v2")}, tmp_path)
    assert "`data: PATH`" in told.value.fix
