"""Claims about models of transformers: what they say is what a direct call says, whichever way they are asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Sampling
from longspan.engines.opening import Described
from longspan.engines.oracle import check_equivalence
from longspan.engines.source import ModelSource
from longspan.engines.transformers import TransformersEngine
from longspan.foundation.errors import UserError

pytest.importorskip("transformers")

from .tiny_transformers import CONFIGS, IN_PARTS, PADDED, VOCAB, WITH_STATE, model

GREEDY = Sampling(max_new_tokens=8, stop_at_boundary=False)
DRAWN = Sampling(max_new_tokens=8, temperature=1.5, top_p=0.9, seed=3, stop_at_boundary=False)
Make = Callable[..., TransformersEngine]


@pytest.fixture
def engine(tokenizer: Tokenizer) -> Make:
    def make(name: str, **options: Any) -> TransformersEngine:
        settings = {"markers": True, "fingerprint": "f", **options}
        return TransformersEngine(model(name), tokenizer, **settings)

    return make


def tokens(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, length)


@torch.inference_mode()
def directly(name: str, sequence: np.ndarray) -> np.ndarray:
    """NLL by the model's own logits, the whole at once and nothing kept."""
    ids = torch.from_numpy(sequence)[None]
    logits = model(name)(input_ids=ids, use_cache=False).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()


@pytest.mark.parametrize("name", CONFIGS)
def test_likelihoods_are_those_of_a_direct_call(name: str, engine: Make) -> None:
    some = [tokens(40, 1), tokens(7, 2), tokens(2, 3)]
    # 16 positions at a time, so that the longest goes through in parts where that is right.
    for found, sequence in zip(engine(name, batch_tokens=16).nll(some), some, strict=True):
        assert found == pytest.approx(directly(name, sequence), abs=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_continuations_of_a_shared_prefix_score_as_if_computed_with_it(name: str, engine: Make) -> None:
    prefix = tokens(30, 4)
    choices = [tokens(5, 5), tokens(1, 6), tokens(9, 7), tokens(5, 8)]
    for found, choice in zip(engine(name).score(prefix, choices), choices, strict=True):
        assert found == pytest.approx(directly(name, np.concatenate([prefix, choice]))[29:], abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "mamba", "zamba2", "sliding"])
def test_one_continuation_after_another_starts_from_the_same_state(
    name: str, engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One copy of a state at a time, which is put back after each continuation.
    monkeypatch.setattr("longspan.engines.transformers.COPIED_TOKENS", 1)
    prefix, choices = tokens(20, 4), [tokens(6, seed) for seed in range(3)]
    for found, choice in zip(engine(name).score(prefix, choices), choices, strict=True):
        assert found == pytest.approx(directly(name, np.concatenate([prefix, choice]))[19:], abs=1e-4)


def test_the_prefix_goes_through_once(engine: Make) -> None:
    subject, seen = engine("granite"), []
    hidden = subject.model.hidden
    subject.model.hidden = lambda tokens_BT, *a, **k: (seen.append(tokens_BT.numel()), hidden(tokens_BT, *a, **k))[1]  # type: ignore[method-assign]
    subject.score(tokens(50), [tokens(3, seed) for seed in range(8)])
    assert sum(seen) == 49 + 8 * 3


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_is_that_of_transformers(name: str, engine: Make) -> None:
    prompt = tokens(12, 9)
    (written,) = engine(name).generate([prompt], Sampling(max_new_tokens=8, stop_at_boundary=False))
    wanted = model(name).generate(
        torch.from_numpy(prompt)[None],
        attention_mask=torch.ones(1, 12, dtype=torch.long),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        use_cache=name in WITH_STATE,
        eos_token_id=None,
    )
    assert written.tokens.tolist() == wanted[0, 12:].tolist()
    assert written.finish_reason == "length"
    assert written.first_token_seconds > 0
    assert written.decode_seconds > 0


@pytest.mark.parametrize("name", CONFIGS)
def test_the_bytes_of_a_state_are_as_predicted(name: str, engine: Make) -> None:
    subject = engine(name)
    (written,) = subject.generate([tokens(20)], Sampling(max_new_tokens=4, stop_at_boundary=False))
    # The last token written has not gone through.
    assert written.state_bytes == subject.state_bytes(23)
    assert (written.state_bytes is None) == (name not in WITH_STATE)


@pytest.mark.parametrize("name", CONFIGS)
def test_only_ways_that_are_right_are_used(name: str, engine: Make) -> None:
    subject = engine(name)
    assert subject.model.keeps_state == (name in WITH_STATE)
    assert subject.model.takes_parts == (name in IN_PARTS)
    assert subject.model.takes_padding == (name in PADDED)
    assert bool(subject.notes) == (name not in IN_PARTS)
    assert subject.model.head_found


@pytest.mark.parametrize("name", CONFIGS)
def test_the_ways_of_asking_agree(name: str, engine: Make) -> None:
    found = {check.name: check for check in check_equivalence(engine(name, batch_tokens=64), tokens(120))}
    assert {check.verdict for check in found.values()} <= {"equal", "not used"}
    assert found["cached = cold"].verdict == "equal"
    assert (found["chunked = whole"].verdict == "equal") == (name in IN_PARTS)
    assert (found["streaming = parallel"].verdict == "equal") == (name in WITH_STATE)


def test_a_way_that_is_wrong_is_seen(engine: Make) -> None:
    subject = engine("mamba")
    subject.model.takes_parts = True
    found = {check.name: check.verdict for check in check_equivalence(subject, tokens(120))}
    assert found["chunked = whole"] == "differs"
    assert found["cached = cold"] == "differs"
    assert found["batched = single"] == "equal"


def test_costs_are_measured_as_generate_goes_on_even_where_that_is_not_right(engine: Make) -> None:
    """Whoever runs the model does so with its cache, whatever a check says of it."""
    subject, read = engine("mamba2"), []
    right = subject.generate([tokens(20)], GREEDY)[0].tokens.tolist()
    subject.model.keeps_state = subject.model.takes_parts = False
    body = subject.model._body
    subject.model._body = lambda **given: read.append(given["input_ids"].shape[1]) or body(**given)
    assert subject.timed(tokens(20), GREEDY).tokens.tolist() == right
    # The prompt goes through whole, then each token alone.
    assert read == [20] + [1] * 7
    assert subject.state_bytes(20) is not None
    assert not subject.rereads
    read.clear()
    subject.generate([tokens(20)], GREEDY)
    assert read == list(range(20, 28))


def test_without_any_state_costs_are_those_of_reading_all_again(engine: Make) -> None:
    subject = engine("granite all mamba")
    assert subject.rereads
    assert subject.timed(tokens(20), GREEDY).state_bytes is None


def test_without_a_known_head_the_logits_of_a_part_are_all_that_exists(
    engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = engine("llama").nll([tokens(40)])[0]
    monkeypatch.setattr(type(model("llama")), "get_output_embeddings", lambda self: None)
    subject = engine("llama", batch_tokens=16)
    assert not subject.model.head_found
    assert "logits" in subject.notes[0]
    assert subject.nll([tokens(40)])[0] == pytest.approx(known, abs=1e-5)
    monkeypatch.setattr(type(model("mamba")), "get_output_embeddings", lambda self: None)
    with pytest.raises(UserError, match="whose head is not found"):
        engine("mamba", batch_tokens=16).nll([tokens(40)])


def test_packed_documents_are_computed_alone(engine: Make) -> None:
    first, second = tokens(10, 1), tokens(8, 2)
    row = np.concatenate([first, second])
    (found,) = engine("granite").nll([row], [np.array([7] * 10 + [9] * 8)])
    alone = engine("granite").nll([np.append(first, second[:1]), second])
    assert found == pytest.approx(np.concatenate(alone), abs=1e-5)
    with pytest.raises(UserError, match="document ids"):
        engine("granite").nll([row], [np.array([7] * 10)])


def test_what_is_longer_than_the_limit_is_refused(engine: Make) -> None:
    subject = engine("llama", context_limit=16)
    assert len(subject.nll([tokens(17)])[0]) == 16
    for ask in (
        lambda: subject.nll([tokens(18)]),
        lambda: subject.score(tokens(14), [tokens(4)]),
        lambda: subject.generate([tokens(17)], Sampling()),
    ):
        with pytest.raises(UserError, match="at most 16"):
            ask()
    (written,) = subject.generate([tokens(14)], Sampling(max_new_tokens=9, stop_at_boundary=False))
    assert (written.finish_reason, len(written.tokens)) == ("context", 3)


@pytest.mark.parametrize("room", [0, 1, 37, 1_000, 5_000])
def test_the_largest_batch_is_found_by_trying(engine: Make, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    subject, tried = engine("llama"), []
    row = subject.state_bytes(100)
    assert subject.largest_batch(100) is None

    def seconds_per_step(rows: int) -> float:
        tried.append(rows)
        if rows > room:
            raise torch.cuda.OutOfMemoryError
        return 0.5

    monkeypatch.setattr(subject, "steps_after", lambda context, new_tokens: seconds_per_step)
    monkeypatch.setattr(subject, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (37 * row, 37 * row))
    found = subject.largest_batch(100)
    assert found is not None
    most = min(room, 4_096)
    assert most * 15 // 16 <= found.sequences <= most
    assert found.tokens_per_second == (2 * found.sequences if room else None)
    assert len(tried) < 50


def test_decoding_steps_of_batches_are_timed_after_one_reading_of_the_prompt(
    engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, read = engine("granite"), []
    prefill = subject._prefill
    monkeypatch.setattr(subject, "_prefill", lambda *given: read.append(1) or prefill(*given))
    seconds_per_step = subject.steps_after(30, new_tokens=2)
    assert seconds_per_step(3) > 0
    assert seconds_per_step(1) > 0
    assert len(read) == 1
    with pytest.raises(UserError, match="keeps no state"):
        engine("granite all mamba").steps_after(30, new_tokens=2)


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_together_are_continued_as_each_alone(name: str, sampling: Sampling, engine: Make) -> None:
    subject = engine(name)
    prompts = [tokens(length, length + seed) for seed, length in enumerate((20, 9, 20, 13, 20))]
    together = subject.generate(prompts, sampling)
    if sampling is GREEDY:
        alone = [subject.generate([prompt], sampling)[0] for prompt in prompts]
        assert {each.together for each in alone} == {1}
    else:
        # Every prompt draws from the stream of its place.
        fillers = [tokens(70 + 90 * n, n) for n in range(4)]
        alone = [subject.generate([*fillers[:n], prompt], sampling)[n] for n, prompt in enumerate(prompts)]
    for found, expected, prompt in zip(together, alone, prompts, strict=True):
        assert found.tokens.tolist() == expected.tokens.tolist()
        assert (found.text, found.finish_reason) == (expected.text, expected.finish_reason)
        assert found.prompt_tokens == len(prompt)
        assert found.state_bytes in (None, expected.state_bytes)
    assert [each.together for each in together] == ([5] * 5 if name in PADDED else [3, 1, 3, 1, 3])


def test_rows_of_a_batch_end_each_for_themselves(engine: Make) -> None:
    subject = engine("granite", context_limit=24)
    prompts = [tokens(20, 1), tokens(23, 2), tokens(12, 3)]
    free = subject.generate(prompts, GREEDY)
    assert [each.finish_reason for each in free] == ["context", "context", "length"]
    assert [len(each.tokens) for each in free] == [5, 2, 8]
    stop = Sampling(max_new_tokens=8, stop=(subject.tokenizer.decode(free[2].tokens[1:2]),), stop_at_boundary=False)
    stopped = subject.generate(prompts, stop)
    assert [each.finish_reason for each in stopped][2] == "stop"
    for found, prompt in zip(stopped, prompts, strict=True):
        assert found.tokens.tolist() == subject.generate([prompt], stop)[0].tokens.tolist()


def test_what_is_given_is_read_in_place_of_what_was_written(engine: Make) -> None:
    subject, rows, starts = engine("granite"), [tokens(30, 1), tokens(26, 2)], (10, 7)
    given = [row[start:] for row, start in zip(rows, starts, strict=True)]
    prompts = [row[:start] for row, start in zip(rows, starts, strict=True)]
    found = subject.generate(prompts, Sampling(max_new_tokens=30, stop_at_boundary=False), given)
    for row, start, each in zip(rows, starts, found, strict=True):
        logits = model("granite")(input_ids=torch.from_numpy(row)[None]).logits[0, start - 1 :]
        assert each.tokens.tolist() == logits.argmax(-1).tolist()


def test_padding_that_changes_a_text_is_seen_and_not_used(engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from longspan.engines.causal_model import CausalModel

    blind = CausalModel.padded
    monkeypatch.setattr(CausalModel, "padded", lambda self, t, m, s=None, **k: blind(self, t, m * 0 + 1, s, **k))
    subject = engine("llama")
    assert not subject.model.takes_padding
    assert "padding before a text changes its logits" in subject.notes[-1]
    assert {each.together for each in subject.generate([tokens(9), tokens(13)], GREEDY)} == {1}
    found = {check.name: check for check in check_equivalence(subject, tokens(60))}
    assert found["left-padded = unpadded"].verdict == "not used"
    subject.model.takes_padding = True
    found = {check.name: check for check in check_equivalence(subject, tokens(60))}
    assert found["left-padded = unpadded"].verdict == "differs"


def test_sampling_draws_from_a_stream_of_its_own_for_each_prompt(engine: Make) -> None:
    subject, sampling = engine("mamba2"), Sampling(max_new_tokens=12, temperature=1.0, stop_at_boundary=False)
    first, second = subject.generate([tokens(5), tokens(5)], sampling)
    again = subject.generate([tokens(5)], sampling)[0]
    assert first.tokens.tolist() == again.tokens.tolist()
    assert first.tokens.tolist() != second.tokens.tolist()


def test_what_an_architecture_computes_is_counted_where_it_is_known_and_else_not(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    for name, known in (("llama", True), ("jamba", False)):
        CONFIGS[name]().save_pretrained(tmp_path / name)
        source = ModelSource.parse({"pretrained": str(tmp_path / name), "engine": "transformers"}, "subjects[0]")
        counted = Described(source, tmp_path / name, tokenizer, markers=False).counted_as
        assert (counted is not None) == known
        if counted is not None:
            assert ("".join(counted[0].layers()), counted[0].width, counted[1]) == ("AA", 32, VOCAB)
