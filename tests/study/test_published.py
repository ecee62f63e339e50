"""The earlier projects' models, to the unit, as the shipped studies build them."""

from __future__ import annotations

import pytest

from longspan.models.budget import count_parameters
from longspan.study.expand import expand, match_model
from longspan.study.schema import load_study


@pytest.mark.parametrize(
    ("study", "total", "non_embedding"),
    # non-embedding counts leave out learned positions, as token embeddings and head
    [("wikitext-baseline", 6_868_992, 4_739_072), ("wiki-leakage", 2_460_160, 395_776)],
)
def test_as_published_has_the_published_parameters(study: str, total: int, non_embedding: int) -> None:
    subjects = expand(load_study(study, ["variant=as_published"])).subjects
    assert subjects
    for subject in subjects:
        vocab_size = subject.config.tokenizer.vocab_size
        model, match = match_model(subject.config, vocab_size)
        parameters = count_parameters(model, vocab_size)
        assert match is None
        assert (parameters.total, parameters.non_embedding) == (total, non_embedding)


@pytest.mark.parametrize(("study", "variant"), [("quickstart", ""), ("wiki-leakage", ""), ("wiki-leakage", "cpu")])
def test_matched_subjects_agree_to_half_a_percent(study: str, variant: str) -> None:
    seen = set()
    for subject in expand(load_study(study, [f"variant={variant}"] if variant else [])).subjects:
        if subject.config.model.pattern in seen:
            continue
        seen.add(subject.config.model.pattern)
        _, match = match_model(subject.config, subject.config.tokenizer.vocab_size)
        assert match is not None
        assert abs(match.residual) <= 0.005
    assert len(seen) >= 3
