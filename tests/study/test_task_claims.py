"""What copying and recall show, from one command each with its seeds fixed, at the shipped CPU settings.

Only the subjects, lengths and numbers of pairs that a claim is about: some 15 minutes of CPU time, two at once.
"""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from longspan.records.measures import Measurement
from longspan.records.statistics import wilson
from longspan.records.store import RecordStore
from longspan.report.data import ReportInput, load
from longspan.study.run import run_study
from longspan.terminal import Terminal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
def two_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `--jobs 2` on a machine without a GPU: the numbers are those of one thread a training."""
    monkeypatch.setattr("longspan.study.run.devices", lambda side_by_side=1: ["cpu"] * side_by_side)


def run(study: str, overrides: list[str], runs: Path) -> ReportInput:
    outcome = run_study(study, overrides, runs, until="report", terminal=Terminal(quiet=True), side_by_side=2)
    return load(Path(outcome.data["report"]).with_name("report.json"))


@pytest.mark.usefixtures("no_page", "two_at_a_time")
def test_transformers_learn_to_copy_from_fewer_samples_and_hard_alibi_copies_farthest(tmp_path: Path) -> None:
    facts = run(
        "copying",
        [
            "variant=cpu",
            "pattern=[RoPE, hard ALiBi, Mamba-2]",
            "seed=[0]",
            "probes=[{copying: {kind: task, sizes: [20, 40]}}]",
        ],
        tmp_path,
    )
    learning = {curve.subject: curve.validation for curve in facts.training}

    def samples_to(share: float, subject: str) -> float:
        return next(line["samples"] or 0.0 for line in learning[subject] if (line["string_accuracy"] or 0.0) >= share)

    # In range: 1,024 strings of 5 to 20 letters.
    assert max(line["string_accuracy"] or 0.0 for line in learning["RoPE"]) >= 0.99
    assert samples_to(0.5, "Mamba-2") >= 3 * samples_to(0.5, "RoPE")
    assert samples_to(0.9, "Mamba-2") > samples_to(0.9, "RoPE")
    # Twice the longest string of training: hard ALiBi still copies, and no interval of another reaches its own.
    (section,) = facts.probes
    at_40: dict[str, Measurement] = {
        found.subject: found for found in section.summary.measurements if found.metric == "string" and found.x == 40
    }
    assert {found.n for found in at_40.values()} == {256}
    assert at_40["hard ALiBi"].value >= 0.5
    for other in ("RoPE", "Mamba-2"):
        assert (at_40[other].high or 0.0) < (at_40["hard ALiBi"].low or 0.0)


@pytest.mark.usefixtures("no_page", "two_at_a_time")
def test_recall_falls_with_the_state_of_an_ssm_and_not_with_attention(tmp_path: Path) -> None:
    run(
        "recall",
        [
            "variant=cpu",
            'pattern=[attention, "Mamba-2, state 8", "Mamba-2, state 2"]',
            "seed=[0, 1, 2]",
            "probes=[{recall: {kind: mqar, sizes: [8, 12, 16], lengths: [64]}}]",
        ],
        tmp_path,
    )
    answers: dict[tuple[str, int], dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for path in tmp_path.glob("jobs/probe-*/records.jsonl"):
        for record in RecordStore(path):
            answers[record.subject, record.seed][record.answer["size"]] += record.answer["forced"]

    def right(subject: str, pairs: int) -> list[float]:
        """Share of right answers by seed."""
        return [statistics.mean(answers[subject, seed][pairs]) for seed in (0, 1, 2)]

    # As many pairs as in training; of fewer one seed of attention misses a few.
    for pairs in (8, 12, 16):
        assert min(right("attention", pairs)) >= 0.99
    large, small = right("Mamba-2, state 8", 16), right("Mamba-2, state 2", 16)
    assert statistics.median(large) >= statistics.median(small) + 0.5
    assert min(large) > max(small)


@pytest.mark.usefixtures("no_page", "two_at_a_time")
def test_recall_falls_where_the_answers_ask_for_the_bits_of_the_state_and_not_with_attention(tmp_path: Path) -> None:
    """States of 128, 256 and 512 bits, and 1 to 64 answers of 6.02 bits: loads of 1 to 301 %."""
    fixed = {f"Mamba-2 {bits} x 1 bit": bits for bits in (128, 256, 512)}
    run("recall-bits", [f"vary.variant=[attention x 8 bits, {', '.join(fixed)}]"], tmp_path)
    cells: dict[tuple[str, int, float], list[int]] = defaultdict(list)
    most: dict[float, float] = {}
    for path in tmp_path.glob("jobs/probe-*/records.jsonl"):
        for record in RecordStore(path):
            answer = record.answer
            assert answer["free"] == answer["forced"]
            load = answer["bits"] / answer["state_bits"]
            cells[record.subject, record.seed, load] += answer["forced"]
            most[load] = answer["ceiling"]
    curves: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for (subject, seed, load), answers in sorted(cells.items()):
        right = statistics.mean(answers)
        curves[subject, seed].append((load, right))
        assert wilson(sum(answers), len(answers)).low <= most[load], (subject, seed, load)
        if subject not in fixed:
            assert right >= 0.99, (subject, seed, load)
        elif load <= 0.1:
            assert right >= 0.8, (subject, seed, load)
        elif load > 1:
            assert right < 0.35 < most[load], (subject, seed, load)
    assert set(curves) == {(subject, seed) for subject in ("attention x 8 bits", *fixed) for seed in (0, 1, 2)}
    # Where half of the answers are right, in bits asked for: twice the state, nearly twice the bits.
    half = [
        statistics.median(bits * half_right_at(curves[subject, seed]) for seed in (0, 1, 2))
        for subject, bits in fixed.items()
    ]
    assert half[1] >= 1.4 * half[0]
    assert half[2] >= 1.4 * half[1]


def half_right_at(curve: list[tuple[float, float]]) -> float:
    """The load at which half of the answers are right, linear between the loads that were asked."""
    for (before, right), (after, fewer) in itertools.pairwise(curve):
        if right >= 0.5 > fewer:
            return before + (after - before) * (right - 0.5) / (right - fewer)
    pytest.fail(f"half of the answers are right nowhere between two loads of {curve}")
