"""`longspan generate` as a person uses it: text on stdout, its cost on stderr, an end that is always in order."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longspan.engines.loading import load
from longspan.engines.native import NativeEngine

Longspan = Callable[..., int]
Capture = pytest.CaptureFixture[str]


def test_what_is_written_equals_recomputing_everything_for_every_token(
    study: Path, longspan: Longspan, capsys: Capture
) -> None:
    for pattern in ("AMG", "MM"):
        run = load(study, select={"pattern": pattern})
        assert (
            longspan("generate", str(study), f"pattern={pattern}", "-p", "The senate", "--max-tokens", "25", "--json")
            == 0
        )
        answer = json.loads(capsys.readouterr().out)
        assert answer["tokens"] == recomputed(run, [*run.document_prefix, *run.tokenizer.encode("The senate")], 25)
        assert answer["text"] == run.tokenizer.decode(answer["tokens"])
        assert answer["subject"] == f"{pattern} seed 0"
        assert answer["fingerprint"] == run.fingerprint
        assert answer["state_bytes"] == run.state_bytes(answer["prompt_tokens"] + 24)


def recomputed(engine: NativeEngine, tokens: list[int], count: int) -> list[int]:
    written: list[int] = []
    for _ in range(count):
        with torch.no_grad():
            hidden, _ = engine._model(torch.tensor([*tokens, *written])[None])
            written.append(int(engine._model.logits(hidden[0, -1]).argmax()))
    return written


def test_text_goes_to_stdout_and_its_cost_to_stderr(study: Path, longspan: Longspan, capsys: Capture) -> None:
    words = ("generate", str(study), "pattern=AMG", "--prompt", "The", "--temperature", "1", "--seed", "3")
    assert longspan(*words, "--json") == 0
    text = json.loads(capsys.readouterr().out)["text"]
    assert longspan(*words) == 0
    shown = capsys.readouterr()
    assert shown.out == text + "\n"
    assert "tok/s" in shown.err
    assert "B of state" in shown.err
    assert longspan(*words[:-1], "4", "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] != text


def test_narrow_draws_are_greedy(study: Path, longspan: Longspan, capsys: Capture) -> None:
    words = ("generate", str(study), "pattern=MM", "--prompt", "The", "--max-tokens", "20")
    texts = set()
    for more in ((), ("--temperature", "9", "--top-k", "1"), ("--temperature", "9", "--top-p", "0.0001")):
        assert longspan(*words, *more) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1


def test_a_prompt_from_a_file_or_from_stdin_is_the_same(
    study: Path, longspan: Longspan, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("The house 🙂\n", encoding="utf-8")
    texts = set()
    for more in (("-p", "The house 🙂"), ("--prompt-file", str(file)), ("-p", "-"), ("--prompt-file", "-")):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(file.read_bytes())))
        assert longspan("generate", str(study), "pattern=AMG", *more, "--json") == 0
        texts.add(capsys.readouterr().out.partition('"first_token_seconds"')[0])
    assert len(texts) == 1
    file.write_bytes(b"\xff\xfe")
    assert longspan("generate", str(study), "pattern=AMG", "--prompt-file", str(file)) == 1
    assert "not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("pattern=AMG",), "no prompt"),
        (("pattern=AMG", "-p", "a", "--prompt-file", "b"), "--prompt and --prompt-file"),
        (("pattern=AMG", "--prompt-file", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("-p", "a"), "pattern=MM seed=0"),
        (("pattern=XX", "-p", "a"), "0 of 3"),
        (("XX", "-p", "a"), "KEY=VALUE"),
        (("pattern=MM", "-p", ""), "trained without markers"),
        (("pattern=A", "-p", "The senate asks " * 20), "at most 48"),
        (("pattern=MM", "-p", "a", "--max-tokens", "0"), "--max-tokens"),
        (("pattern=MM", "-p", "a", "--temperature", "-1"), "--temperature"),
        (("pattern=MM", "-p", "a", "--top-p", "0"), "top_p"),
        (("pattern=MM", "-p", "a", "--dtype", "fp8"), "fp8"),
        (("pattern=MM", "-p", "a", "--weights", "first"), "first"),
    ],
)
def test_wrong_use_is_answered_with_what_is_allowed(
    study: Path, longspan: Longspan, capsys: Capture, arguments: tuple[str, ...], said: str
) -> None:
    assert longspan("generate", str(study), *arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""


def test_an_empty_prompt_begins_a_document(study: Path, longspan: Longspan, capsys: Capture) -> None:
    assert longspan("generate", str(study), "pattern=AMG", "-p", "", "--max-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 1


def test_learned_positions_end_at_their_last_one(study: Path, longspan: Longspan, capsys: Capture) -> None:
    assert longspan("generate", str(study), "pattern=A", "-p", "The", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["finish_reason"] == "context"
    assert answer["prompt_tokens"] + len(answer["tokens"]) == 49


def test_ctrl_c_ends_in_order(study: Path) -> None:
    command = [sys.executable, "-m", "longspan.cli", "generate", str(study), "pattern=MM", "-p", "The senate"]
    command += ["--max-tokens", "1000000"]  # the likeliest token each time never ends this text
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    text, said = process.communicate(timeout=60)
    assert process.returncode == 3
    assert text.endswith(b"\n")
    assert b"ended by: interrupted" in said
    assert b"stopped after" in said
    assert b"Traceback" not in said


def test_a_reader_who_leaves_is_no_error(study: Path) -> None:
    command = [sys.executable, "-m", "longspan.cli", "generate", str(study), "pattern=MM", "-p", "The senate"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "2000", "--temperature", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0
