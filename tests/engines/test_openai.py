"""Claims about servers: token ids go out, what comes back is read or refused, and every failure has its cause."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Sampling, UnusableAnswer
from longspan.engines.openai import OpenAIEngine
from longspan.engines.oracle import check_equivalence
from longspan.engines.server import Server, ServerGone
from longspan.engines.source import EndpointArguments
from longspan.foundation.errors import UserError

pytest.importorskip("httpx2")
_spec = importlib.util.spec_from_file_location("stub_server", Path(__file__).with_name("stub_server.py"))
assert _spec is not None
assert _spec.loader is not None
stub_server = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(stub_server)

Open = Callable[..., OpenAIEngine]
LIMIT = Sampling(max_new_tokens=4)


@pytest.fixture
def stub() -> Iterator[Any]:
    with stub_server.serving() as served:
        yield served


@pytest.fixture
def pauses() -> list[float]:
    return []


@pytest.fixture
def connect(stub: Any, tokenizer: Tokenizer, pauses: list[float]) -> Iterator[Open]:
    opened = []

    def make(api: str = "completions", url: str | None = None, **arguments: Any) -> OpenAIEngine:
        told = EndpointArguments(**{"retries": 2, "timeout": 5.0, **arguments})
        server = Server(url or stub.url, told, sleep=pauses.append, what="m")
        engine = OpenAIEngine(
            "",
            "m",
            tokenizer,
            markers=True,
            fingerprint="f",
            arguments=told,
            api=api,
            server=server,  # type: ignore[arg-type]
        )
        opened.append(engine)
        stub.asked.clear()
        return engine

    yield make
    for engine in opened:
        engine.close()


def prompts(*lengths: int) -> list[np.ndarray]:
    return [np.arange(length) % 200 + 5 for length in lengths]


def test_prompts_go_as_token_ids_and_ids_come_back(stub: Any, connect: Open) -> None:
    engine = connect()
    assert engine.takes_ids
    assert engine.capabilities == {"nll", "score", "generate"}
    assert engine.context_limit == 512
    (written,) = engine.generate(prompts(7), Sampling(max_new_tokens=3, temperature=0.5, top_k=9, stop=("x",), seed=4))
    ((path, body),) = stub.asked
    assert path == "/v1/completions"
    assert body["prompt"] == prompts(7)[0].tolist()
    wanted = {"max_tokens": 3, "temperature": 0.5, "top_k": 9, "stop": ["x"], "seed": 4, "ignore_eos": False}
    assert {name: body[name] for name in wanted} == wanted
    assert written.tokens.tolist() == [0, 1, 2]
    assert (written.text, written.finish_reason, written.prompt_tokens) == (" 0 1 2", "length", 7)
    assert not written.tokens_from_text
    assert written.first_token_seconds > 0
    assert written.decode_seconds >= 0


def test_likelihoods_are_those_that_the_server_repeats(connect: Open) -> None:
    engine = connect()
    first, second = prompts(5, 9)
    for found, tokens in zip(engine.nll([first, second]), (first, second), strict=True):
        assert found == pytest.approx((tokens[:-1] + 2 * tokens[1:]) / 100)
    prefix, choices = first, [second[:2], second[3:6]]
    cold = [engine.nll([np.concatenate([prefix, choice])])[0][4:] for choice in choices]
    assert all(np.array_equal(a, b) for a, b in zip(engine.score(prefix, choices), cold, strict=True))
    checks = {check.name: check.verdict for check in check_equivalence(engine, prompts(90)[0])}
    assert checks["batched = single"] == checks["cached = cold"] == "equal"
    assert checks["chunked = whole"] == "not used"
    packed = engine.nll([np.concatenate([first, second])], [np.array([0] * 5 + [1] * 9)])[0]
    assert packed[5:] == pytest.approx(engine.nll([second])[0])


def test_what_the_server_cannot_do_is_said_and_refused(stub: Any, connect: Open) -> None:
    stub.echo = False
    engine = connect()
    assert engine.capabilities == {"generate"}
    with pytest.raises(UserError, match="echo is not supported"):
        engine.nll(prompts(5))
    stub.ids = False
    engine = connect()
    assert not engine.takes_ids
    assert any("prompt must be a string" in note for note in engine.notes)
    ids = np.concatenate([engine.document_prefix, engine.tokenizer.encode("The senate asks.")])
    engine.generate([ids], LIMIT)
    # The server puts its marker there itself.
    assert stub.asked[-1][1]["prompt"] == "The senate asks."


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_that_lists_no_models_is_asked_all_the_same(stub: Any, connect: Open, status: int) -> None:
    stub.listed = status
    engine = connect()
    assert engine.context_limit is None
    assert any("list its models" in note or "does not say how many" in note for note in engine.notes)
    assert engine.generate(prompts(4), LIMIT)[0].text == " 0 1 2 3"


def test_an_address_that_points_elsewhere_is_told_and_not_followed(stub: Any, connect: Open) -> None:
    engine = connect()
    stub.behave = lambda body: (308, "", {"Location": "https://elsewhere.test/v1/completions"})
    with pytest.raises(UserError, match=r"HTTP 308 and points to https://elsewhere\.test/v1/completions"):
        engine.generate(prompts(4), LIMIT)


def test_the_chat_api_gets_the_question_only(stub: Any, connect: Open) -> None:
    engine = connect(api="chat")
    (written,) = engine.generate([engine.encode_prompt("Who asks?", "It is")], LIMIT)
    path, body = stub.asked[-1]
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "Who asks?It is"}]
    assert engine.answer_prefix_mode == "in prompt"
    assert written.text == " 0 1 2 3"
    assert engine.capabilities == {"generate"}


def test_fields_that_a_server_refuses_are_left_out_and_that_is_said(stub: Any, connect: Open) -> None:
    stub.behave = lambda body: (
        (400, {"error": {"message": "unknown field"}}, {}) if "return_token_ids" in body else None
    )
    engine = connect()
    (written,) = engine.generate(prompts(4), LIMIT)
    assert "return_token_ids" not in stub.asked[-1][1]
    assert written.tokens_from_text
    assert any("encoded again" in note for note in engine.notes)
    assert any("cannot be told to go on" in note for note in engine.notes)


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        ((200, "not json", {}), "malformed reply"),
        ((200, [{"choices": [{"text": " a"}]}], {"cut": "yes"}), "malformed reply"),
        ((200, ["{broken"], {}), "malformed reply"),
        ((200, [{"choices": [{"text": 7}]}], {}), "malformed reply"),
        ((200, [], {}), "empty reply"),
        ((200, [{"choices": []}], {}), "empty reply"),
        ((500, "oops", {}), "refused request"),
        ((400, {"error": {"message": "bad prompt"}}, {}), "refused request"),
        ((400, {"error": {"message": "maximum context length is 8 tokens"}}, {}), "context overflow"),
        ((200, [{"error": {"message": "the prompt is longer than the maximum model length"}}], {}), "context overflow"),
        ((200, [{"choices": [{"text": "", "finish_reason": "content_filter"}]}], {}), "refused request"),
    ],
)
def test_a_request_that_fails_is_an_answer_with_its_cause(
    stub: Any, connect: Open, reply: tuple[int, Any, dict[str, str]], cause: str
) -> None:
    engine = connect()
    stub.behave = lambda body: (reply[0], reply[1], dict(reply[2])) if len(body["prompt"]) == 5 else None
    first, failed, last = engine.generate(prompts(4, 5, 6), LIMIT)
    assert (failed.finish_reason, failed.failure) == ("failed", cause)
    assert failed.detail
    assert len(failed.tokens) == 0
    # The others are answered all the same.
    assert first.text == last.text == " 0 1 2 3"


def test_an_answer_of_no_text_that_has_ended_is_an_answer(stub: Any, connect: Open) -> None:
    engine = connect()
    stub.behave = lambda body: (200, [{"choices": [{"text": "", "finish_reason": "stop"}]}], {})
    (written,) = engine.generate(prompts(4), LIMIT)
    assert (written.finish_reason, written.failure, written.text) == ("stop", "", "")


def test_a_stream_may_end_with_its_last_choice(stub: Any, connect: Open) -> None:
    engine = connect()
    stub.behave = lambda body: (200, [{"choices": [{"text": " a", "finish_reason": "stop"}]}], {"cut": "yes"})
    (written,) = engine.generate(prompts(4), LIMIT)
    assert (written.text, written.failure) == (" a", "")


def test_what_fails_now_is_tried_again_with_growing_pauses(stub: Any, connect: Open, pauses: list[float]) -> None:
    engine = connect(retries=3)
    replies = iter([(503, "busy", {}), (200, "not json", {}), (429, "slow down", {"Retry-After": "7"})])
    stub.behave = lambda body: next(replies, None)
    (written,) = engine.generate(prompts(4), LIMIT)
    assert written.text == " 0 1 2 3"
    assert 0.25 <= pauses[0] <= 0.5
    assert 0.5 <= pauses[1] <= 1.0
    assert pauses[2] == 7.0


@pytest.mark.parametrize(("status", "words"), [(429, "rate-limited"), (503, "cannot be reached")])
def test_a_server_that_refuses_everything_stops_the_run_which_goes_on_later(
    stub: Any, connect: Open, status: int, words: str
) -> None:
    engine = connect()
    stub.behave = lambda body: (status, "no", {})
    with pytest.raises(ServerGone, match=words) as stopped:
        engine.generate(prompts(4, 5), LIMIT)
    assert stopped.value.exit_code == 3
    assert "goes on from here" in stopped.value.fix


def test_a_server_that_is_gone_stops_the_run(connect: Open, stub: Any) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with pytest.raises(ServerGone, match="cannot be reached"):
        connect(url=nobody, timeout=0.3)


def test_an_answer_that_does_not_come_is_a_timeout(stub: Any, connect: Open) -> None:
    engine = connect(timeout=0.1, retries=1)
    stub.behave = lambda body: (200, [], {"slow": "yes"}) if len(body["prompt"]) == 5 else None
    slow, quick = engine.generate(prompts(5, 4), LIMIT)
    assert (slow.failure, quick.failure) == ("timeout", "")


def test_a_wrong_key_or_model_is_the_users_to_mend(stub: Any, connect: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = connect()
    stub.behave = lambda body: (401, {"error": {"message": "invalid key"}}, {})
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        engine.generate(prompts(4), LIMIT)


@pytest.mark.parametrize("values", [[None, -1.0], [None, -1.0, "x", -1.0, -1.0, -0.5], [-1.0] * 6, None])
def test_likelihoods_that_do_not_fit_the_prompt_are_no_scores(stub: Any, connect: Open, values: Any) -> None:
    engine = connect()
    stub.behave = lambda body: (200, {"choices": [{"logprobs": {"token_logprobs": values}}]}, {})
    with pytest.raises(UnusableAnswer, match="malformed reply"):
        engine.nll(prompts(5))


def test_requests_are_under_way_together_but_no_more_than_asked(stub: Any, connect: Open) -> None:
    engine = connect(concurrency=3)
    stub.behave = lambda body: (200, [{"choices": [{"text": "a", "finish_reason": "stop"}]}], {"slow": "yes"})
    stub.most_under_way = 0
    engine.generate(prompts(4, 5, 6, 7), LIMIT)
    assert stub.most_under_way == 3


def test_connections_are_used_again(stub: Any, connect: Open) -> None:
    engine = connect(concurrency=1)
    engine.generate(prompts(4, 5, 6, 7), LIMIT)
    engine.nll(prompts(4, 5))
    assert stub.connections == 1


def test_what_the_context_cannot_hold_is_not_sent(stub: Any, connect: Open) -> None:
    stub.limit = 60
    engine = connect()
    with pytest.raises(UserError, match="at most"):
        engine.nll(prompts(60))
    assert engine.nll(prompts(59))[0].shape == (58,)
    (full,) = engine.generate(prompts(60), LIMIT)
    assert full.failure == "context overflow"
    (end,) = engine.generate(prompts(56), LIMIT)
    assert end.finish_reason == "context"
