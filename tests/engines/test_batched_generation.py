"""Many prompts at once: each row is what it would be alone, whatever stands beside it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from longspan.engines import batched_generation
from longspan.engines.base import Generation, Sampling, UnusableAnswer
from longspan.engines.graphs import SLOT_STEP, VARIABLE
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel

MakeModel = Callable[..., LanguageModel]
MakeEngine = Callable[..., NativeEngine]
PATTERNS = ["A", "M", "mG", "SL", "[AM]D", "AMA"]
GREEDY = Sampling(max_new_tokens=8, stop_at_boundary=False)
DRAWN = Sampling(max_new_tokens=8, temperature=1.5, top_k=40, top_p=0.9, seed=3, stop_at_boundary=False)


def draw(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 250, length) for length in lengths]


def alone(engine: NativeEngine, prompt: np.ndarray, sampling: Sampling, index: int) -> Generation:
    continuation = engine.continue_text(prompt, sampling, index=index)
    for _ in continuation:
        pass
    return continuation.result()


PROMPTS = {
    "equal": draw(20, 20, 20, 20),
    "different": draw(1, 2, 3, 30, 31, 17, 90, 1),
    "shared": [np.concatenate([draw(40, seed=9)[0], part]) for part in draw(1, 4, 4, 9)],
    "the same": [draw(40, seed=9)[0]] * 3,
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_every_row_is_what_it_is_alone(
    kind: str, pattern: str, sampling: Sampling, tiny_model: MakeModel, tiny_engine: MakeEngine
) -> None:
    engine = tiny_engine(tiny_model(pattern, embedding_multiplier=16.0, window=5, delta_head_dim=6), batch_tokens=50)
    for i, found in enumerate(engine.generate(PROMPTS[kind], sampling)):
        expected = alone(engine, PROMPTS[kind][i], sampling, i)
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert found.text == expected.text
        assert found.finish_reason == expected.finish_reason
        assert found.prompt_tokens == len(PROMPTS[kind][i])
        assert found.together > 1 or kind in ("different", "shared")
        if found.state_bytes is not None:
            assert found.state_bytes == expected.state_bytes


@pytest.mark.parametrize("kind", ["different", "shared"])
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_a_state_is_handed_over_after_as_many_tokens_of_every_row(
    kind: str, graphs: str, tiny_model: MakeModel, tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts end before, at and behind it; padding in front would move it, and steps on fixed memory never round."""
    model = tiny_model("AM", embedding_multiplier=16.0, state_bits=2, handover=31)
    monkeypatch.setenv(VARIABLE, "off")
    expected = [alone(tiny_engine(model), prompt, GREEDY, i).tokens.tolist() for i, prompt in enumerate(PROMPTS[kind])]
    monkeypatch.setenv(VARIABLE, graphs)
    found = tiny_engine(model, batch_tokens=50).generate(PROMPTS[kind], GREEDY)
    assert [each.tokens.tolist() for each in found] == expected


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_in_fixed_memory_are_what_they_are_without(
    kind: str,
    pattern: str,
    device: str,
    tiny_model: MakeModel,
    tiny_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(pattern, embedding_multiplier=16.0, window=5, delta_head_dim=6)
    monkeypatch.setenv(VARIABLE, "off")
    expected = tiny_engine(model, batch_tokens=50, device=device).generate(PROMPTS[kind], GREEDY)
    monkeypatch.setenv(VARIABLE, "on")
    taken: list[tuple[int, int]] = []
    stepped = GraphedDecoding.step
    monkeypatch.setattr(
        GraphedDecoding, "step", lambda self, tokens: (taken.append((self.rows, self.slots)), stepped(self, tokens))[1]
    )
    found = tiny_engine(model, batch_tokens=50, device=device).generate(PROMPTS[kind], GREEDY)
    for one, other in zip(found, expected, strict=True):
        assert (one.tokens.tolist(), one.finish_reason) == (other.tokens.tolist(), other.finish_reason)
        assert (one.together, one.state_bytes) == (other.together, other.state_bytes)
    assert {rows for rows, _ in taken} == {each.together for each in expected}
    # What is taken for rounding up is that of one row, however many there are.
    assert all(rows * slots < rows * (90 + 8) + 2 * SLOT_STEP for rows, slots in taken)


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_rows_end_each_for_themselves(
    graphs: str, tiny_model: MakeModel, tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, graphs)
    engine = tiny_engine(tiny_model("AM"))
    free = [g.tokens for g in engine.generate(PROMPTS["different"], GREEDY)]
    stop = Sampling(max_new_tokens=8, stop=(engine.tokenizer.decode(free[3][2:3]),), stop_at_boundary=False)
    found = engine.generate(PROMPTS["different"], stop)
    for i, generation in enumerate(found):
        expected = alone(engine, PROMPTS["different"][i], stop, i)
        assert (generation.tokens.tolist(), generation.text, generation.finish_reason) == (
            expected.tokens.tolist(),
            expected.text,
            expected.finish_reason,
        )
    assert found[3].finish_reason == "stop"


@pytest.mark.parametrize("graphs", ["on", "off"])
def test_a_learned_table_ends_a_row_where_it_ends(
    graphs: str, tiny_model: MakeModel, tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, graphs)
    engine = tiny_engine(tiny_model("A", positions="learned", max_positions=12))
    prompts = draw(10, 12, 4)
    found = engine.generate(prompts, GREEDY)
    assert [g.finish_reason for g in found] == ["context", "context", "length"]
    assert [len(g.tokens) for g in found] == [len(alone(engine, p, GREEDY, i).tokens) for i, p in enumerate(prompts)]


@pytest.mark.parametrize("pattern", ["A", "M", "AMG"])
def test_what_is_given_is_read_in_place_of_what_was_written(
    pattern: str, tiny_model: MakeModel, tiny_engine: MakeEngine
) -> None:
    engine = tiny_engine(tiny_model(pattern))
    rows = draw(30, 30, 26)
    starts = (10, 12, 7)
    given = [row[start:].copy() for row, start in zip(rows, starts, strict=True)]
    found = engine.generate(
        [row[:start] for row, start in zip(rows, starts, strict=True)],
        Sampling(max_new_tokens=30, stop_at_boundary=False),
        given,
    )
    for row, start, generation in zip(rows, starts, found, strict=True):
        wanted = np.arange(len(row)) >= start - 1
        assert generation.tokens.tolist() == engine.predict([row], [wanted])[0].tolist()
    own = engine.generate(rows[:2], Sampling(max_new_tokens=30, stop_at_boundary=False), [np.full(6, -1)] * 2)
    assert [g.tokens.tolist() for g in own] == [
        g.tokens.tolist() for g in engine.generate(rows[:2], Sampling(max_new_tokens=7, stop_at_boundary=False))
    ]


def test_a_shared_beginning_is_computed_once(
    tiny_model: MakeModel, tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(tiny_model("AM"))
    seen: list[int] = []
    forward = engine._model.forward
    monkeypatch.setattr(engine._model, "forward", lambda t, *a, **k: (seen.append(t.numel()), forward(t, *a, **k))[1])
    engine.generate(PROMPTS["shared"], Sampling(max_new_tokens=1, stop_at_boundary=False))
    assert sum(seen) == 40 + 1 + 4 + 4 + 9


def test_many_rows_go_through_in_parts(
    tiny_model: MakeModel, tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(tiny_model("AM"))
    whole = engine.generate(PROMPTS["different"], DRAWN)
    monkeypatch.setattr(batched_generation, "BATCH_TOKENS", 60)
    parts = engine.generate(PROMPTS["different"], DRAWN)
    assert [g.tokens.tolist() for g in whole] == [g.tokens.tolist() for g in parts]
    assert max(g.together for g in parts) < max(g.together for g in whole)


def test_one_request_is_timed_alone(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(tiny_model("AM"))
    (one,) = engine.generate(draw(20), GREEDY)
    several = engine.generate(draw(20, 20), GREEDY)
    assert one.together == 1
    assert {g.together for g in several} == {2}
    assert all(g.first_token_seconds > 0 and g.decode_seconds > 0 for g in (one, *several))


def test_numbers_that_are_none_are_refused(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    model = tiny_model("A")
    model.norm.weight.data[0] = float("nan")
    with pytest.raises(UnusableAnswer, match="gave nan as the likelihood of token 1"):
        tiny_engine(model).generate(draw(4, 5), GREEDY)


def test_prompts_too_long_for_the_subject_are_refused(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(tiny_model("A", positions="learned", max_positions=12))
    with pytest.raises(UserError, match="prompt 1"):
        engine.generate(draw(4, 13), GREEDY)
    assert engine.generate([], GREEDY) == []


def test_prediction_is_the_likeliest_token_of_one_pass(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    rows = draw(5, 40, 61)
    wanted = [np.arange(len(row)) % 3 == 0 for row in rows]
    whole, cut = (tiny_engine(tiny_model("AM"), batch_tokens=n).predict(rows, wanted) for n in (8_192, 23))
    for row, where, one, two in zip(rows, wanted, whole, cut, strict=True):
        assert one.tolist() == two.tolist()
        assert len(one) == where.sum()
        for position, token in zip(np.flatnonzero(where), one, strict=True):
            engine = tiny_engine(tiny_model("AM"))
            (written,) = engine.generate([row[: position + 1]], Sampling(max_new_tokens=1, stop_at_boundary=False))
            assert written.tokens.tolist() == [token]
