"""Claims about efficiency: medians over counted runs, state bytes as computed, nothing asked that cannot be taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from torch.cuda import OutOfMemoryError

from longspan.engines.base import LargestBatch
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.probes.base import ProbeData, make_probe
from longspan.records.store import Record

SETTINGS = {"contexts": [16, 64], "repeats": 3, "warm_ups": 1, "new_tokens": 6}
Ask = Callable[..., list[Record]]


def test_rates_are_prompt_tokens_over_time_and_further_tokens_over_theirs(
    data: ProbeData, fake: Callable[..., object], ask: Ask, read: Callable[..., object]
) -> None:
    probe = make_probe("efficiency", SETTINGS)
    _, summary = read(probe, ask(probe, fake(), data))  # type: ignore[misc]
    values = {(m.metric, m.x): m for m in summary.measurements}
    assert values["prefill_rate", 16.0].value == pytest.approx(1_000)
    assert values["first_token", 64.0].value == pytest.approx(64)
    assert values["output_token", 64.0].value == pytest.approx(100)
    assert values["prefill_rate", 16.0].n == 3
    assert summary.comparisons == ()


def test_a_real_subject_is_timed_and_attention_state_grows(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask
) -> None:
    probe = make_probe("efficiency", SETTINGS)
    attention, mamba = ([r.answer["state_bytes"] for r in ask(probe, subject(pattern), data)] for pattern in ("A", "M"))
    assert attention[1] == 4 * attention[0]
    assert mamba[1] == mamba[0]


def test_contexts_beyond_the_limit_have_no_runs(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, read: Callable[..., object]
) -> None:
    probe = make_probe("efficiency", SETTINGS)
    records = ask(probe, subject("A", positions="learned", max_positions=32), data)
    assert [len(record.answer["runs"]) for record in records] == [3, 0]
    observations, _ = read(probe, records)  # type: ignore[misc]
    assert {o.x for o in observations} == {16.0}


def test_prompts_are_fresh_exact_and_repeat_a_short_split(data: ProbeData) -> None:
    probe = make_probe("efficiency")
    prompts = [probe._prompt(data, 5_000, run) for run in range(2)]  # type: ignore[attr-defined]
    assert [len(prompt) for prompt in prompts] == [5_000, 5_000]
    assert not np.array_equal(*prompts)
    assert [item.details["context"] for item in probe.items(data)] == [32, 64, 128, 256, 512]


def test_contexts_that_are_no_lengths_are_refused_when_they_are_read() -> None:
    for contexts in ([0, 64], []):
        with pytest.raises(UserError, match=r"probes\.efficiency\.contexts(\.0 = 0| = \[\])"):
            make_probe("efficiency", {**SETTINGS, "contexts": contexts})


def test_time_per_token_is_a_line_over_the_contexts(
    data: ProbeData, fake: Callable[..., object], ask: Ask, read: Callable[..., object]
) -> None:
    probe = make_probe("efficiency", {**SETTINGS, "contexts": [16, 64, 256]})
    engine = fake()
    # Two milliseconds a token, and one more for every thousand tokens of context.
    write = type(engine).generate
    prompt_to_seconds = lambda prompt: 5 * (2e-3 + 1e-6 * len(prompt))  # noqa: E731
    engine.generate = lambda prompts, sampling: [  # type: ignore[attr-defined]
        replace(each, decode_seconds=prompt_to_seconds(prompts[0])) for each in write(engine, prompts, sampling)
    ]
    records = ask(probe, engine, data)
    found = {each.metric: each.numerator / each.denominator for each in probe.observe_together(records)}
    assert found == {"fixed": pytest.approx(2.0), "growth": pytest.approx(1.0)}
    assert len(list(probe.observe_together(records))) == 2 * 3
    assert list(probe.observe_together(records[:2])) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timed": False}, "at once"),
        ({"failure": "timeout", "detail": "slow"}, "timeout: slow"),
        ({"cached_tokens": 12}, "12 of 16 tokens"),
    ],
)
def test_runs_that_say_nothing_about_cost_are_not_counted(
    data: ProbeData, fake: Callable[..., object], ask: Ask, change: dict[str, object], words: str
) -> None:
    probe, engine = make_probe("efficiency", {**SETTINGS, "contexts": [16]}), fake()
    write = type(engine).generate
    engine.generate = lambda *given: [replace(each, **change) for each in write(engine, *given)]  # type: ignore[attr-defined]
    (record,) = ask(probe, engine, data)
    assert words in record.answer["not_counted"]
    assert list(probe.observe(record)) == list(probe.observe_together([record])) == []


def test_bandwidth_and_batches_are_measured_where_the_engine_knows(
    data: ProbeData, fake: Callable[..., object], ask: Ask
) -> None:
    probe, engine = make_probe("efficiency", {**SETTINGS, "contexts": [16], "largest_batch": True}), fake()
    (record,) = ask(probe, engine, data)
    assert {each.metric for each in probe.observe(record)} == {"prefill_rate", "first_token", "output_token"}
    engine.weight_bytes = 10**9 - 160  # type: ignore[attr-defined]
    engine.largest_batch = lambda context: LargestBatch(1024 // context, 50.0)  # type: ignore[attr-defined]
    (record,) = ask(probe, engine, data)
    seen = {each.metric: each.numerator / each.denominator for each in probe.observe(record)}
    # 5 tokens in half a second read a gigabyte each.
    assert seen["bandwidth"] == pytest.approx(10.0)
    assert "copy_share" not in seen
    engine.copy_rate = lambda: 40e9  # type: ignore[attr-defined]
    (record,) = ask(probe, engine, data)
    seen = {each.metric: each.numerator / each.denominator for each in probe.observe(record)}
    assert seen["copy_share"] == pytest.approx(25.0)
    assert (seen["largest_batch"], seen["batch_rate"]) == (64.0, 50.0)


def test_a_context_that_would_take_too_long_is_not_asked_and_nor_are_longer_ones(
    data: ProbeData, fake: Callable[..., object], ask: Ask, read: Callable[..., object]
) -> None:
    settings = {**SETTINGS, "contexts": [16, 32, 64, 128], "longest": 1.05, "once_above": 60}
    probe, engine = make_probe("efficiency", settings), fake()
    write, asked = type(engine).generate, []

    def generate(prompts, sampling):  # type: ignore[no-untyped-def]
        asked.append(len(prompts[0]))
        return [replace(each, first_token_seconds=0.01 * asked[-1], decode_seconds=0.1) for each in
                write(engine, prompts, sampling)]  # fmt: skip

    engine.generate = generate  # type: ignore[attr-defined]
    records = ask(probe, engine, data)
    assert [len(record.answer["runs"]) for record in records] == [3, 3, 3, 0]
    # 2 tokens are the trial before the first.
    assert set(asked) == {2, 16, 32, 64}
    reason = "predicted to take 1 s and more, 1 allowed: 64 tokens took 0.6 s, and 5 further tokens 0.1 s"
    assert records[3].answer["not_evaluable"] == reason
    assert {each.x for each in read(probe, records)[0]} == {16.0, 32.0, 64.0}  # type: ignore[index]


def test_the_first_context_is_bounded_by_a_trial_of_an_eighth(
    data: ProbeData, fake: Callable[..., object], ask: Ask
) -> None:
    """Whoever keeps no state reads all again for each token, and would take as many times longer for each."""
    probe, engine = make_probe("efficiency", {**SETTINGS, "contexts": [64, 128], "longest": 1.0}), fake()
    write, asked = type(engine).generate, []

    def generate(prompts, sampling):  # type: ignore[no-untyped-def]
        asked.append((len(prompts[0]), sampling.max_new_tokens))
        (each,) = write(engine, prompts, sampling)
        # The first run compiles.
        first = 0.03 if len(asked) > 1 else 9.0
        return [replace(each, first_token_seconds=first, decode_seconds=3 * 0.03)]

    engine.generate = generate  # type: ignore[attr-defined]
    engine.rereads = True  # type: ignore[attr-defined]
    reasons = [record.answer["not_evaluable"] for record in ask(probe, engine, data)]
    assert asked == [(8, 4)] * 2
    # 8 times longer, for the first token and for 5 more.
    assert reasons == ["predicted to take 1 s and more, 1 allowed: 8 tokens took 0.0 s, and 3 further tokens 0.1 s"] * 2
    engine.rereads = False  # type: ignore[attr-defined]
    assert [len(record.answer["runs"]) for record in ask(probe, engine, data)] == [3, 3]


def test_a_trial_spoils_no_prompt_for_a_server_that_keeps_what_it_met(
    data: ProbeData, fake: Callable[..., object], ask: Ask
) -> None:
    """The trial before 128 has 16 tokens, which are asked in earnest after it."""
    probe, engine = make_probe("efficiency", {**SETTINGS, "contexts": [128, 16], "longest": 1e9}), fake()
    write, met = type(engine).generate, set()

    def generate(prompts, sampling):  # type: ignore[no-untyped-def]
        (each,) = write(engine, prompts, sampling)
        words = prompts[0].tobytes()
        cached = len(prompts[0]) if words in met else 0
        met.add(words)
        return [replace(each, cached_tokens=cached)]

    engine.generate = generate  # type: ignore[attr-defined]
    assert [len(record.answer["runs"]) for record in ask(probe, engine, data)] == [3, 3]


def test_without_room_for_the_copy_its_rate_is_not_known_and_the_rest_is(
    data: ProbeData, fake: Callable[..., object], ask: Ask
) -> None:
    def full() -> float:
        raise OutOfMemoryError("CUDA out of memory.")

    engine = fake()
    engine.copy_rate = full  # type: ignore[attr-defined]
    (record,) = ask(make_probe("efficiency", {**SETTINGS, "contexts": [16]}), engine, data)
    assert record.answer["copy_rate"] is None
    assert len(record.answer["runs"]) == 3


def test_after_a_length_without_room_no_longer_one_is_tried(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tried = subject("A"), []
    generate = engine.generate

    def refuse(prompts, sampling):  # type: ignore[no-untyped-def]
        tried.append(len(prompts[0]))
        if len(prompts[0]) >= 32:
            raise OutOfMemoryError("CUDA out of memory.")
        return generate(prompts, sampling)

    monkeypatch.setattr(engine, "generate", refuse)
    probe = make_probe("efficiency", {**SETTINGS, "contexts": [16, 32, 64]})
    records = ask(probe, engine, data)
    reason = "out of memory at 32 tokens: CUDA out of memory."
    assert [record.answer.get("not_evaluable", "") for record in records] == ["", reason, reason]
    assert tried == [16] * 4 + [32]


def test_a_batch_without_room_to_look_for_it_costs_nothing_else(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = subject("A")

    def refuse(context: int) -> LargestBatch:
        raise OutOfMemoryError

    monkeypatch.setattr(engine, "largest_batch", refuse)
    (record,) = ask(make_probe("efficiency", {**SETTINGS, "contexts": [16], "largest_batch": True}), engine, data)
    assert len(record.answer["runs"]) == 3
    assert "batch" not in record.answer


def test_memory_is_beside_what_weights_and_state_take(
    data: ProbeData, subject: Callable[..., NativeEngine], ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = subject("A")
    monkeypatch.setattr(engine, "peak_bytes", lambda: 2**30)
    engine.weight_bytes = 2**29
    probe = make_probe("efficiency", SETTINGS)
    seen = [{each.metric: each for each in probe.observe(record)} for record in ask(probe, engine, data)]
    assert [at["peak_memory"].numerator for at in seen] == [1.0, 1.0]
    held = [(2**29 + context * 2 * 16 * 4) / 2**30 for context in (16, 64)]
    assert [at["held"].numerator for at in seen] == pytest.approx(held)


@pytest.mark.parametrize("contexts", [[0], [16, 0], []])
def test_contexts_must_be_positive(contexts: list[int]) -> None:
    """Said before anything is trained; an empty list is no word for the default."""
    with pytest.raises(UserError, match="contexts"):
        make_probe("efficiency", {"contexts": contexts})


@pytest.mark.parametrize(("kind", "name"), [("pg19", "windows"), ("longbench_v2", "contexts"), ("ruler", "lengths")])
def test_no_other_empty_list_stands_for_the_default(kind: str, name: str) -> None:
    with pytest.raises(UserError, match=name):
        make_probe(kind, {name: []})
