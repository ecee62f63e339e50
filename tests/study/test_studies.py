"""The shipped studies on the text they are about, small."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import pytest

from longspan.corpus.prepare import PreparedCorpus
from longspan.report.data import ReportInput, load
from longspan.study.plan import make_plan
from longspan.study.run import check_items, run_study
from longspan.study.schema import load_study
from longspan.terminal import Terminal

pytestmark = pytest.mark.usefixtures("no_figures")

TINY = [
    "vocab_size=320", "model.width=32", "model.heads=2", "model.state=8", "model.mamba_head_dim=16",
    "model.mlp_width=48", "training.context=64", "training.batch_tokens=512", "training.evaluate_every=10",
]  # fmt: skip
FEW = {
    "perplexity": "{max_documents: 12, max_tokens: 128}",
    "perplexity_as_trained": "{kind: perplexity, mode: as_trained, max_documents: 12}",
    "position_curve": "{length: 128, max_documents: 8}",
    "suffix_identification": "{contexts: [16, 64], suffix: 8, num_items: 16}",
}


def run(name: str, runs: Path, overrides: list[str]) -> ReportInput:
    outcome = run_study(name, [*TINY, *overrides], runs, until="report", terminal=Terminal(quiet=True))
    return load(Path(outcome.data["report"]).with_name("report.json"))


def few(*probes: str) -> list[str]:
    return [f"probes.{name}={FEW[name]}" for name in probes]


@pytest.mark.parametrize(
    ("name", "variant"),
    [("copying", ""), ("copying", "cpu"), ("recall", ""), ("recall", "cpu"), ("recall-bits", "")],
)
def test_a_study_of_a_task_asks_what_its_task_can_draw(name: str, variant: str, tmp_path: Path) -> None:
    """As it is shipped, without a training."""
    overrides = [f"variant={variant}"] if variant else []
    run_study(name, overrides, tmp_path, until="prepare", terminal=Terminal(quiet=True))
    check_items(make_plan(load_study(name, overrides), tmp_path), tmp_path)


def test_wikitext_baseline_on_the_real_text(shared_data: Path, tmp_path: Path) -> None:
    """Validation trains and test is asked, since the training split comes from the hub."""
    folder = shared_data / "wikitext-2"
    facts = run(
        "wikitext-baseline",
        tmp_path / "runs",
        [
            "variant=cpu",
            "corpus.source=wikitext",
            f"corpus.path={{train: {folder}/wiki.valid.raw.zst, test: {folder}/wiki.test.raw.zst}}",
            "corpus.carve=[validation]",
            "corpus.splits={train: 0.9, validation: 0.1, test: 0.0}",
            "tokens=15_360",
            *few("perplexity", "position_curve", "suffix_identification"),
        ],
    )
    (subject,) = facts.subjects
    losses = [row["loss"] for row in facts.training[0].rows]
    assert losses[0] is not None
    assert losses[-1] is not None
    assert losses[-1] < losses[0] - 0.3
    assert subject.mixers == ("attention",) * 4
    section = next(section for section in facts.probes if section.kind == "perplexity")
    measured = {m.metric: m for m in section.summary.measurements}
    for name in ("bits_per_byte", "perplexity"):
        assert measured[name].low is not None
        assert measured[name].low < measured[name].value < (measured[name].high or 0)
    (job,) = (tmp_path / "runs/jobs").glob("prepare-*")
    corpus = PreparedCorpus.open(job / "corpus")
    shards = corpus.shards["test"]
    text = "".join(corpus.tokenizer.decode(shards.document(i)) for i in range(shards.num_documents))
    # Published: 241,211 words (1,290,590 bytes) in 60 articles; words and the line ends that WikiText counts as <eos>.
    assert (shards.num_documents, shards.num_bytes) == (60, 1_290_590)
    assert len(text.split()) == 241_211


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_wiki_leakage_compares_isolation_markers_and_mixers_on_a_real_dump(tmp_path: Path) -> None:
    sample = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
    dump = importlib.metadata.distribution("gensim").locate_file(sample)
    facts = run(
        "wiki-leakage",
        tmp_path / "runs",
        [
            "variant=cpu",
            f"corpus.path={dump}",
            "model.width=48",
            "model.mlp_width=120",
            "tokens=2_048",
            "packing.method=[concat, best_fit]",
            "isolation=[full, attention, state, none]",
            *few("perplexity", "perplexity_as_trained", "position_curve", "suffix_identification"),
        ],
    )
    labels = {subject.label for subject in facts.subjects}
    assert len(labels) == (3 * 2 + 4) * 2 * 2
    assert all(abs(subject.match_residual or 0.0) <= 0.005 for subject in facts.subjects)
    assert {mixer for subject in facts.subjects for mixer in subject.mixers} == {"attention", "mamba2", "gru"}
    section = next(section for section in facts.probes if section.kind == "perplexity_as_trained")
    effects = {(c.a, c.b) for c in section.summary.comparisons if "=" in c.a}
    assert any({"isolation=full", "isolation=none"} == set(pair) for pair in effects)
    assert any("markers=" in a for a, _ in effects)
    assert any("merged" in entry.topic or "listed once" in entry.text for entry in facts.ledger)
    json.dumps([subject.factors for subject in facts.subjects])
