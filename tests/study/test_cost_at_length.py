"""Claims about the study of what three shapes cost: real sizes, one order of asking, and failures that are recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longspan.engines.native import NativeEngine
from longspan.engines.opening import open_engine
from longspan.engines.source import ModelSource
from longspan.foundation.errors import UserError
from longspan.models.budget import count_parameters
from longspan.report.data import load
from longspan.report.decision import decide
from longspan.study.environment import hardware
from longspan.study.plan import make_plan
from longspan.study.run import run_study
from longspan.study.schema import load_study
from longspan.terminal import Terminal

pytestmark = pytest.mark.usefixtures("no_figures")


def test_the_shapes_are_of_one_size() -> None:
    sizes = [count_parameters(*source.shape_config()).total for source in load_study("cost-at-length").sources]
    assert sizes[:3] == sizes[5:] + sizes[3:5]
    assert max(sizes) / min(sizes) < 1.07
    assert sizes[1] == 8_030_261_248


def test_small_shapes_are_checked_and_asked_one_after_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = "pattern: MA, vocab_size: 300, width: 16, heads: 2, mlp_width: 16, state: 4, mamba_head_dim: 8, chunk: 8"
    overrides = [
        "variant=cpu",
        f"subjects=[{{name: a, shape: {{{small}}}}}, {{name: b, engine: transformers, shape: {{{small}}}}}]",
        "probes.efficiency.contexts=[8, 16]",
        "probes.efficiency.new_tokens=2",
        "corpus.num_documents=20",
        "corpus.splits.test=0.5",
        "corpus.splits.train=0.25",
        "corpus.splits.validation=0.25",
    ]
    plan = make_plan(load_study("cost-at-length", overrides), tmp_path)
    kinds = [(job.kind, job.title.split()[1]) for job in plan.jobs_until("report")]
    assert kinds == [("prepare", "corpus"), ("check", "a"), ("probe", "a"), ("check", "b"), ("probe", "b")]
    generate = NativeEngine.generate

    def refuse(self, prompts, sampling, given=None):  # type: ignore[no-untyped-def]
        if len(prompts[0]) == 16:
            raise MemoryFull("out of memory: 9 GiB wanted")
        return generate(self, prompts, sampling, given)

    from torch.cuda import OutOfMemoryError as MemoryFull

    monkeypatch.setattr(NativeEngine, "generate", refuse)
    outcome = run_study("cost-at-length", overrides, tmp_path, until="report", terminal=Terminal(quiet=True))
    facts = load(Path(outcome.data["report"]).with_name("report.json"))
    assert [subject.kind for subject in facts.subjects] == ["shape", "shape"]
    assert any(note.startswith("Nothing was trained: the models were asked as they are, in") and
               hardware()["processor"] in note for note in facts.notes)  # fmt: skip
    # What transformers computes of a shape is counted as what Longspan computes of it.
    assert facts.subjects[0].forward_flops == facts.subjects[1].forward_flops != {}
    assert decide(facts).verdict == "costs"
    (section,) = facts.probes
    at = {(each.subject, each.x) for each in section.summary.measurements if each.metric == "first_token"}
    assert at == {("a", 8.0), ("b", 8.0), ("b", 16.0)}
    (missing,) = [entry for entry in facts.ledger if entry.text == "Contexts whose cost was not measured."]
    assert [(row["subject"], row["context"]) for row in missing.table] == [("a", 16)]
    assert "9 GiB wanted" in str(missing.table[0]["reason"])


def test_what_was_not_measured_is_told_of_a_probe_of_any_name(tmp_path: Path) -> None:
    small = "pattern: A, vocab_size: 300, width: 16, heads: 2, mlp_width: 16, positions: learned, max_positions: 12"
    overrides = [
        "variant=cpu",
        f"subjects=[{{name: a, shape: {{{small}}}}}]",
        "probes={speed: {kind: efficiency, contexts: [8, 16], new_tokens: 2}}",
        "corpus.num_documents=20",
        "corpus.splits={train: 0.25, validation: 0.25, test: 0.5}",
    ]
    outcome = run_study("cost-at-length", overrides, tmp_path, until="report", terminal=Terminal(quiet=True))
    facts = load(Path(outcome.data["report"]).with_name("report.json"))
    (missing,) = [entry for entry in facts.ledger if entry.text == "Contexts whose cost was not measured."]
    assert [(row["subject"], row["context"]) for row in missing.table] == [("a", 16)]


@pytest.mark.parametrize("shape", range(3), ids=["hybrid", "llama", "mamba"])
def test_both_engines_compute_the_same_function_of_a_shape(shape: int) -> None:
    """Else rounding is compared between two functions, of which one may be chaotic."""
    every = load_study("cost-at-length", ["variant=cpu"]).sources
    sources = [source for source in every if source.shape == every[shape].shape]
    assert [source.engine for source in sources] == ["native", "transformers"]
    tokens = np.random.default_rng(0).integers(0, 258, 60)
    ours, theirs = (open_engine(source, "cpu").nll([tokens])[0] for source in sources)
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"shape": {"pattern": "A"}, "name": "a"}, "vocab_size"),
        ({"shape": {"pattern": "A", "vocab_size": 300}}, "no name"),
        ({"shape": {"pattern": "A", "vocab_size": 300}, "name": "a", "engine": "vllm"}, "vllm"),
    ],
)
def test_a_shape_that_says_too_little_is_refused(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        ModelSource.parse(given, "subjects[0]")
