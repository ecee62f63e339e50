"""Requests of lm-evaluation-harness: the same numbers as by hand, nothing cut in silence."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval")

from lm_eval.utils import get_rolling_token_windows

from longspan.engines.base import Sampling
from longspan.engines.lm_eval import LongspanLM
from longspan.foundation.errors import UserError
from longspan.probes.perplexity import rolling_windows

from .conftest import Lm, ask, by_hand, ids

# --- likelihoods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("markers", [True, False])
def test_a_likelihood_is_that_of_the_tokens_after_the_context(markers: bool, lm: Lm) -> None:
    model = lm(engine={"markers": markers})
    boundary = model.engine.tokenizer.special.boundary
    begin = [boundary] if markers else []
    pairs = [
        ("The senate", " asks"),  # the space belongs to the word after it
        ("The senate ", "asks"),  # and so it does here: context and continuation are cut together
        ("The senate", " answers the house."),
        ("The house", " asks"),
        ("", "The house"),
        (" ", "house"),
        ("The senate", " asks"),
        ("one\n\n", "The"),
    ]
    whole = [
        ([*begin, *ids(model, "The senate")], ids(model, " asks")),
        ([*begin, *ids(model, "The senate")], ids(model, " asks")),
        ([*begin, *ids(model, "The senate")], ids(model, " answers the house.")),
        ([*begin, *ids(model, "The house")], ids(model, " asks")),
        ([boundary], ids(model, "The house")),
        ([boundary], ids(model, " house")),
        ([*begin, *ids(model, "The senate")], ids(model, " asks")),
        ([*begin, *ids(model, "one")], ids(model, "one\n\nThe")[len(ids(model, "one")) :]),
    ]
    for (log_p, greedy), (shown, scored) in zip(ask(model, "loglikelihood", *pairs), whole, strict=True):
        expected, expected_greedy = by_hand(model, shown, scored)
        assert log_p == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_a_word_is_cut_as_in_the_whole_text(lm: Lm) -> None:
    """`sen` + `ate` is one text: the tokens of the whole that go beyond those of the context are scored."""
    model = lm()
    context, whole = ids(model, "The sen"), ids(model, "The senate asks")
    assert whole[: len(context)] != context, "the tokenizer merges over this boundary, or the test tests nothing"
    ((log_p, _),) = ask(model, "loglikelihood", ("The sen", "ate asks"))
    shown = [*model.engine.document_prefix, *context]
    assert log_p == pytest.approx(by_hand(model, shown, whole[len(context) :])[0], abs=1e-4)


def test_greedy_continuations_are_recognised(lm: Lm) -> None:
    model = lm(engine={"markers": False})
    engine = model.engine
    found = 0
    for prompt in ("The senate", "A", "answers", "The house asks the"):
        (written,) = engine.generate([engine.tokenizer.encode(prompt)], Sampling(max_new_tokens=4))
        whole = prompt + written.text
        if engine.tokenizer.encode(whole).tolist() != [*ids(model, prompt), *written.tokens.tolist()]:
            continue
        found += 1
        answers = ask(model, "loglikelihood", (prompt, written.text), (prompt, written.text + "x"), (prompt, "zzz"))
        assert answers[0][1] is True
        assert answers[2][1] is False
    assert found


def test_equal_contexts_are_computed_once(lm: Lm, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm()
    prefilled: list[int] = []
    original = model.engine._prefill
    monkeypatch.setattr(
        model.engine, "_prefill", lambda pieces, state: [prefilled.extend(map(len, pieces)), original(pieces, state)][1]
    )
    contexts = [f"The senate asks {name}" for name in ("one", "two", "three")]
    choices = [" yes", " no", " perhaps", " never"]
    ask(model, "loglikelihood", *[(context, choice) for choice in choices for context in contexts])
    assert len(prefilled) == 3


def test_what_does_not_fit_is_cut_on_the_left_said_and_counted(lm: Lm, caplog: pytest.LogCaptureFixture) -> None:
    model = lm(max_length=20)
    context = "The senate asks the other house. " * 4
    with caplog.at_level(logging.WARNING, logger="lm_eval"):
        (long, _), (short, _) = ask(model, "loglikelihood", (context, "Yes."), ("The house", " asks"))
    scored = ids(model, context + "Yes.")[len(ids(model, context.rstrip())) :]
    whole = [*model.engine.document_prefix.tolist(), *ids(model, context.rstrip())]
    # The harness shows max_length tokens, the last one scored not among them.
    kept = whole[-(21 - len(scored)) :]
    assert long == pytest.approx(by_hand(model, kept, scored)[0], abs=1e-4)
    assert short == pytest.approx(
        by_hand(model, [*model.engine.document_prefix, *ids(model, "The house")], ids(model, " asks"))[0], abs=1e-4
    )
    lost = len(whole) - len(kept)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        f"1 of 2 loglikelihood requests do not fit into max_length=20: their beginning was cut off, {lost} tokens"
        in message
    )
    assert model.get_model_info()["truncated"] == {"loglikelihood": {"requests": 1, "tokens": lost}}


def test_what_cannot_be_scored_is_refused_before_anything_runs(lm: Lm, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm(max_length=8)
    monkeypatch.setattr(model.engine, "score_greedy", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(UserError, match="1 to max_length = 8"):
        ask(model, "loglikelihood", ("The", " house"), ("The", " senate answers the other house asks"))
    with pytest.raises(UserError, match="has 0 tokens"):
        ask(model, "loglikelihood", ("The", ""))


# --- rolling ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(2, 40))
def test_the_probe_and_the_harness_cut_the_same_windows(tokens: int, max_length: int) -> None:
    sequence = list(range(tokens + 1))  # 0 is the boundary token
    ours = [
        (sequence[start : end - 1], sequence[first:end])
        for start, first, end in rolling_windows(tokens + 1, max_length)
    ]
    assert ours == list(get_rolling_token_windows(sequence[1:], 0, max_length, 1))


@pytest.mark.parametrize("pattern", ["A", "MG"])
def test_rolling_scores_every_token_once_with_as_much_context_as_fits(pattern: str, lm: Lm) -> None:
    model = lm(pattern, max_length=9)
    texts = ["The senate asks the other house. The house answers. Ünïcode 🙂!", "", "T", "The senate answers"]
    boundary = model.prefix_token_id
    for text, log_p in zip(texts, ask(model, "loglikelihood_rolling", *[(text,) for text in texts]), strict=True):
        whole = [boundary, *ids(model, text)]
        expected = 0.0
        for first in range(1, len(whole), 9):
            end = min(first + 9, len(whole))
            start = max(0, end - 10)
            expected += by_hand(model, whole[start:first], whole[first:end])[0]
        assert log_p == pytest.approx(expected, abs=1e-4)
    assert ask(lm(pattern), "loglikelihood_rolling", ("",)) == [0.0]


def test_batches_of_another_size_change_nothing(lm: Lm) -> None:
    model, small = lm(), lm(engine={"batch_tokens": 16})
    small._call_tokens = 50
    texts = [("The senate asks the other house. " * n,) for n in range(1, 9)]
    np.testing.assert_allclose(
        ask(model, "loglikelihood_rolling", *texts), ask(small, "loglikelihood_rolling", *texts), rtol=1e-5
    )
    pairs = [(text * (n % 3), f" {n % 4}") for n, (text,) in enumerate(texts)]
    for one, other in zip(ask(model, "loglikelihood", *pairs), ask(small, "loglikelihood", *pairs), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


# --- generation -------------------------------------------------------------------------------------------------------


def test_generation_ends_at_until_or_at_its_length(lm: Lm) -> None:
    model = lm(max_length=100)
    engine = model.engine
    prompt = np.concatenate([engine.document_prefix, engine.tokenizer.encode("The senate")])
    (free,) = engine.generate([prompt], Sampling(max_new_tokens=30))
    stop = free.text[len(free.text) // 2 :][:3]
    settings = [
        {"until": [], "max_gen_toks": 30},
        {"until": [stop], "max_new_tokens": 30, "do_sample": False, "temperature": 0.7},
        {"until": stop, "max_tokens": 30, "num_beams": 1},
        {"until": ["never this"], "max_gen_toks": 2, "temperature": 0.0},
    ]
    texts = ask(model, "generate_until", *[("The senate", each) for each in settings])
    assert texts[0] == free.text
    assert texts[1] == texts[2] == free.text[: free.text.index(stop)]
    assert texts[3] == engine.tokenizer.decode(free.tokens[:2])


def test_draws_are_reproducible_and_differ_between_repeats(lm: Lm) -> None:
    model = lm(max_length=100)
    asked = ("The senate", {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "max_gen_toks": 20})
    first = ask(model, "generate_until", asked, asked)
    assert first[0] != first[1]
    assert first == ask(model, "generate_until", asked, asked)
    assert ask(model, "generate_until", ("The senate", {"do_sample": True, "max_gen_toks": 20}))[0]


def test_a_long_prompt_leaves_room_for_what_is_written(lm: Lm, caplog: pytest.LogCaptureFixture) -> None:
    model = lm("A", max_length=None, positions="learned", max_positions=40)
    assert model.max_length == 40
    context = "The senate asks the other house. " * 9
    (text,) = ask(model, "generate_until", (context, {"max_gen_toks": 10}))
    whole = np.concatenate([model.engine.document_prefix, model.engine.tokenizer.encode(context)])
    (expected,) = model.engine.generate([whole[-30:]], Sampling(max_new_tokens=10))
    assert text == expected.text
    assert model.truncated["generate_until"].requests == 1
    assert model.truncated["generate_until"].tokens == len(whole) - 30
    with pytest.raises(UserError, match="max_gen_toks 256 with max_length 40"):
        ask(model, "generate_until", ("The", {"until": ["\n"]}))


def test_what_is_not_honoured_is_refused(lm: Lm) -> None:
    model = lm()
    with pytest.raises(UserError, match="num_beams = 4"):
        ask(model, "generate_until", ("The", {"num_beams": 4, "max_gen_toks": 4}))
    for refused in (
        lambda: model.apply_chat_template([{"role": "user", "content": "Hello"}]),
        lambda: model.chat_template(True),
    ):
        with pytest.raises(UserError, match="base model without a chat template"):
            refused()
    learned = lm("A", max_length=None, positions="learned", max_positions=40)
    with pytest.raises(UserError, match="1 to 40"):
        LongspanLM(learned.engine, max_length=41)
    with pytest.raises(UserError, match="what names and loads a path"):
        LongspanLM(learned.engine, pattern="A")


def test_the_length_is_the_limit_then_the_training_context_then_the_default(lm: Lm) -> None:
    assert lm(max_length=None).max_length == 2_048
    assert lm(max_length=None, engine={"trained_context": 512}).max_length == 512
    assert lm(max_length=777, engine={"trained_context": 512}).max_length == 777


def test_a_subject_without_markers_says_from_what_its_texts_begin(lm: Lm, caplog: pytest.LogCaptureFixture) -> None:
    ask(lm(), "loglikelihood_rolling", ("The house",))
    assert not [r for r in caplog.records if "without a marker" in r.getMessage()]
    model = lm(engine={"markers": False})
    ask(model, "loglikelihood_rolling", ("The house",))
    ask(model, "loglikelihood", ("", "The house"))
    assert len([r for r in caplog.records if "without a marker" in r.getMessage()]) == 1
