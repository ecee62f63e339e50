"""Claims about the native engine: what it says is what the model says, however the work was cut."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Sampling, UnusableAnswer
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.models.language_model import LanguageModel

MakeModel = Callable[..., LanguageModel]
MakeEngine = Callable[..., NativeEngine]
PATTERNS = ["A", "M", "G", "AMG"]


def draw(count: int, length: int, seed: int = 0, high: int = 250) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, high, (count, length)))


def direct(model: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Log-softmax of the full logits: what the engine must agree with."""
    with torch.no_grad():
        ids = torch.tensor(tokens)[None]
        hidden, _ = model(ids[:, :-1])
        log_p = model.logits(hidden).log_softmax(-1)
        return -log_p.gather(-1, ids[:, 1:, None])[0, :, 0].double().numpy()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_nll_is_that_of_the_model_for_any_mix_of_lengths(
    pattern: str, tiny_model: MakeModel, tiny_engine: MakeEngine
) -> None:
    model = tiny_model(pattern)
    sequences = [draw(1, n, seed=n)[0] for n in (2, 50, 3, 97, 50, 21)]
    for batch_tokens in (8_192, 60):
        answers = tiny_engine(model, batch_tokens=batch_tokens).nll(sequences)
        for sequence, answer in zip(sequences, answers, strict=True):
            assert answer.dtype == np.float64
            assert answer.shape == (len(sequence) - 1,)
            np.testing.assert_allclose(answer, direct(model, sequence), atol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_long_sequences_go_through_in_chunks_with_carried_state(
    pattern: str, tiny_model: MakeModel, tiny_engine: MakeEngine
) -> None:
    model = tiny_model(pattern)
    (sequence,) = draw(1, 200)
    doc_id = np.repeat([0, 1, 2], [70, 30, 100])
    whole, cut = (tiny_engine(model, batch_tokens=n) for n in (8_192, 37))
    np.testing.assert_allclose(cut.nll([sequence])[0], whole.nll([sequence])[0], atol=2e-5)
    np.testing.assert_allclose(cut.nll([sequence], [doc_id])[0], whole.nll([sequence], [doc_id])[0], atol=2e-5)


def test_isolated_documents_of_a_row_are_scored_as_if_alone(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    model = tiny_model()
    first, second = draw(2, 40)
    row, doc_id = np.concatenate([first, second]), np.repeat([0, 1], 40)
    isolated = tiny_engine(model).nll([row], [doc_id])[0]
    np.testing.assert_allclose(isolated[40:], direct(model, second), atol=2e-5)
    leaking = tiny_engine(model, isolation="none").nll([row], [doc_id])[0]
    np.testing.assert_allclose(leaking, direct(model, row), atol=2e-5)
    assert np.abs(leaking[40:] - isolated[40:]).max() > 1e-4


@pytest.mark.parametrize("pattern", PATTERNS)
def test_score_equals_computing_the_prefix_for_every_continuation(
    pattern: str, tiny_model: MakeModel, tiny_engine: MakeEngine
) -> None:
    model = tiny_model(pattern)
    prefixes = [*draw(3, 60), *draw(1, 17, seed=1), *draw(1, 1, seed=2)]
    choices = [[draw(1, n, seed=10 * i + n)[0] for n in (5, 1, 9, 5)] for i in range(len(prefixes))]
    for batch_tokens in (8_192, 25):
        scored = tiny_engine(model, batch_tokens=batch_tokens).score_many(prefixes, choices)
        for prefix, some, values in zip(prefixes, choices, scored, strict=True):
            for choice, value in zip(some, values, strict=True):
                expected = direct(model, np.concatenate([prefix, choice]))[len(prefix) - 1 :]
                np.testing.assert_allclose(value, expected, atol=2e-5)
    one = tiny_engine(model).score(prefixes[0], choices[0])
    assert [len(v) for v in one] == [5, 1, 9, 5]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_is_said_of_what_greedy_decoding_writes(
    pattern: str, tiny_model: MakeModel, tiny_engine: MakeEngine
) -> None:
    prefixes = [*draw(3, 20), *draw(2, 7, seed=1), *draw(1, 1, seed=2)]
    for batch_tokens in (8_192, 13):
        engine = tiny_engine(tiny_model(pattern), batch_tokens=batch_tokens)
        written = engine.generate(prefixes, Sampling(max_new_tokens=5, stop_at_boundary=False))
        choices = []
        for i, right in enumerate(g.tokens for g in written):
            wrong = right.copy()
            wrong[-1] = (wrong[-1] + 1) % 250
            # Some alone, some several: the two ways through the model.
            choices.append([right] if i % 2 else [wrong, right, right[:2], wrong[-1:]])
        plain = engine.score_many(prefixes, choices)
        for i, scored in enumerate(engine.score_greedy(prefixes, choices)):
            assert [s.greedy for s in scored] == ([True] if i % 2 else [False, True, True, wrong_is_right(choices[i])])
            for s, nll in zip(scored, plain[i], strict=True):
                np.testing.assert_allclose(s.nll, nll, atol=2e-5)


def wrong_is_right(choices: list[np.ndarray]) -> bool:
    return bool(choices[3][0] == choices[1][0])


def test_many_continuations_of_a_long_prefix_go_through_in_parts(
    tiny_model: MakeModel, tiny_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tiny_engine(tiny_model("AM"))
    prefixes, choices = draw(2, 30), [draw(7, 4), draw(3, 6)]
    whole = engine.score_many(prefixes, choices)
    monkeypatch.setattr("longspan.engines.native.COPIED_TOKENS", 100)
    for some, parts in zip(whole, engine.score_many(prefixes, choices), strict=True):
        for one, part in zip(some, parts, strict=True):
            np.testing.assert_allclose(part, one, atol=2e-5)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_generation_with_the_cache_equals_recomputing_everything(
    pattern: str, tiny_model: MakeModel, tiny_engine: MakeEngine, tokenizer: Tokenizer
) -> None:
    model = tiny_model(pattern)
    (prompt,) = draw(1, 30)
    engine = tiny_engine(model, batch_tokens=11)
    (written,) = engine.generate([prompt], Sampling(max_new_tokens=12, stop_at_boundary=False))
    tokens = prompt
    for _ in range(12):
        with torch.no_grad():
            hidden, _ = model(torch.tensor(tokens)[None])
            tokens = np.append(tokens, model.logits(hidden[0, -1]).argmax().item())
    np.testing.assert_array_equal(written.tokens, tokens[30:])
    assert written.finish_reason == "length"
    assert written.text == tokenizer.decode(written.tokens)
    assert written.prompt_tokens == 30
    assert written.first_token_seconds > 0
    assert written.decode_seconds > 0


def test_sampling_is_reproducible_and_top_p_keeps_the_likely(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(tiny_model())
    prompts = draw(2, 10)
    warm = Sampling(max_new_tokens=20, temperature=1.0, stop_at_boundary=False, seed=1)
    first = [g.tokens.tolist() for g in engine.generate(prompts, warm)]
    assert first == [g.tokens.tolist() for g in engine.generate(prompts, warm)]
    assert first != [g.tokens.tolist() for g in engine.generate(prompts, warm.model_copy(update={"seed": 2}))]
    greedy = Sampling(max_new_tokens=20, stop_at_boundary=False)
    narrow = warm.model_copy(update={"top_p": 1e-6})
    assert [g.tokens.tolist() for g in engine.generate(prompts, narrow)] == [
        g.tokens.tolist() for g in engine.generate(prompts, greedy)
    ]


def test_top_k_keeps_the_likeliest(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(tiny_model())
    prompts = draw(2, 10)
    hot = Sampling(max_new_tokens=40, temperature=50.0, stop_at_boundary=False)
    greedy = Sampling(max_new_tokens=40, stop_at_boundary=False)
    one = hot.model_copy(update={"top_k": 1})
    assert tokens_of(engine, prompts, one) == tokens_of(engine, prompts, greedy)
    three = hot.model_copy(update={"top_k": 3})
    for prompt, written in zip(prompts, tokens_of(engine, prompts, three), strict=True):
        ranks = []
        for i, token in enumerate(written):
            with torch.no_grad():
                hidden, _ = engine._model(torch.tensor([*prompt, *written[:i]])[None])
                logits = engine._model.logits(hidden[0, -1])
            ranks.append(int((logits > logits[token]).sum()))
        assert set(ranks) == {0, 1, 2}
    everything = hot.model_copy(update={"top_k": 10_000})
    assert tokens_of(engine, prompts, everything) == tokens_of(engine, prompts, hot)


def tokens_of(engine: NativeEngine, prompts: list[np.ndarray], sampling: Sampling) -> list[list[int]]:
    return [g.tokens.tolist() for g in engine.generate(prompts, sampling)]


def test_text_can_be_watched_and_broken_off(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(tiny_model())
    (prompt,) = draw(1, 10)
    sampling = Sampling(max_new_tokens=30, stop_at_boundary=False)
    (whole,) = engine.generate([prompt], sampling)
    watched = engine.continue_text(prompt, sampling)
    assert "".join(watched) == whole.text == watched.result().text
    assert watched.result().finish_reason == "length"
    broken = engine.continue_text(prompt, sampling)
    text = "".join(next(broken) for _ in range(12))
    assert broken.result().finish_reason == "interrupted"
    assert broken.result().tokens.tolist() == whole.tokens[:12].tolist()
    assert whole.text.startswith(text)


def test_generation_ends_before_a_stop_string(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(tiny_model())
    (prompt,) = draw(1, 10)
    sampling = Sampling(max_new_tokens=60, temperature=1.0, stop_at_boundary=False)
    (free,) = engine.generate([prompt], sampling)
    stop = free.text[len(free.text) // 2 :][:2]
    (stopped,) = engine.generate([prompt], sampling.model_copy(update={"stop": ("never this", stop)}))
    assert stopped.finish_reason == "stop"
    assert stopped.text == free.text[: free.text.index(stop)]
    assert len(stopped.tokens) < 60


def test_generation_stops_at_a_boundary_and_at_the_context_limit(
    tiny_model: MakeModel, tiny_engine: MakeEngine, tokenizer: Tokenizer
) -> None:
    model = tiny_model("A", positions="learned", max_positions=24)
    engine = tiny_engine(model)
    assert engine.context_limit == 24
    (prompt,) = draw(1, 20)
    (limited,) = engine.generate([prompt], Sampling(max_new_tokens=50, stop_at_boundary=False))
    assert limited.finish_reason == "context"
    assert len(limited.tokens) == 5
    with torch.no_grad():
        model.norm.weight.zero_()  # all logits equal 0, so that greedy picks the first id
        model.embedding.weight.zero_()
    tokens = engine.generate([prompt], Sampling(max_new_tokens=3))[0]
    assert tokens.tokens.tolist() == [0, 0, 0]
    engine.tokenizer = _with_boundary_zero(tokenizer)
    (stopped,) = engine.generate([prompt], Sampling(max_new_tokens=3))
    assert stopped.finish_reason == "stop"
    assert len(stopped.tokens) == 0


def _with_boundary_zero(tokenizer: Tokenizer) -> Tokenizer:
    import copy

    from longspan.corpus.tokenizer import SpecialTokens

    other = copy.copy(tokenizer)
    other.special = SpecialTokens(boundary=0, pad=1)
    return other


def test_what_does_not_fit_is_refused_with_its_numbers(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    engine = tiny_engine(tiny_model("A", positions="learned", max_positions=24))
    engine.nll(draw(1, 25))
    for ask in (
        lambda: engine.nll(draw(1, 26)),
        lambda: engine.score(draw(1, 20)[0], draw(1, 6)),
        lambda: engine.generate(draw(1, 25), Sampling()),
    ):
        with pytest.raises(UserError, match="at most 24"):
            ask()
    with pytest.raises(UserError, match="too short"):
        engine.nll(draw(1, 1))
    with pytest.raises(UserError, match="no prefix"):
        engine.score(np.array([], dtype=np.int64), draw(1, 2))
    with pytest.raises(UserError, match="empty continuation"):
        engine.score(draw(1, 3)[0], [np.array([], dtype=np.int64)])
    with pytest.raises(UserError, match="one id per token"):
        engine.nll(draw(1, 9), [np.zeros(8, dtype=int)])
    with pytest.raises(UserError, match="fp16"):
        tiny_engine(tiny_model(), dtype="fp16")


def test_nan_is_an_error_that_names_the_subject_and_never_a_score(
    tiny_model: MakeModel, tiny_engine: MakeEngine
) -> None:
    model = tiny_model("M")
    engine = tiny_engine(model, name="MMMM seed 3")
    with torch.no_grad():
        model.norm.weight.fill_(torch.nan)
    for ask in (
        lambda: engine.nll(draw(2, 20)),
        lambda: engine.score(draw(1, 20)[0], draw(4, 5)),
        lambda: engine.generate(draw(1, 20), Sampling()),
    ):
        with pytest.raises(UnusableAnswer, match="MMMM seed 3"):
            ask()


def test_markers_isolation_and_state_bytes_are_those_of_the_subject(
    tiny_model: MakeModel, tiny_engine: MakeEngine, tokenizer: Tokenizer
) -> None:
    model = tiny_model("AM")
    marked = tiny_engine(model)
    assert marked.document_prefix.tolist() == [tokenizer.special.boundary]
    assert tiny_engine(model, markers=False).document_prefix.tolist() == []
    assert marked.state_bytes(200) > marked.state_bytes(100)
    (written,) = marked.generate(draw(1, 50), Sampling(max_new_tokens=1, stop_at_boundary=False))
    assert written.state_bytes == marked.state_bytes(50)
    recurrent = tiny_engine(tiny_model("MG"))
    assert recurrent.state_bytes(10) == recurrent.state_bytes(10_000)


def test_bf16_stays_close_to_fp32(tiny_model: MakeModel, tiny_engine: MakeEngine) -> None:
    sequences = draw(2, 60)
    full = tiny_engine(tiny_model("AM")).nll(sequences)
    half = tiny_engine(tiny_model("AM"), dtype="bf16").nll(sequences)
    assert np.abs(full[0].mean() - half[0].mean()) < 0.05


@pytest.mark.parametrize(("dtype", "moved"), [("fp32", True), ("bf16", False)])
def test_on_a_cpu_matrices_of_fp32_lie_as_one_token_reads_them(tiny_model, tiny_engine, dtype, moved):
    engine = tiny_engine(tiny_model("M"), dtype=dtype)
    weight = engine.module.blocks[0].mixer.in_proj.weight
    assert weight.shape[0] > weight.shape[1]
    assert weight.t().is_contiguous() == moved
