"""Two realistic reports: three matched subjects with every section, and twelve arms of two crossed factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest

from longspan.foundation.randomness import numpy_generator
from longspan.records.observation import Metric, Observation, summarise
from longspan.report.data import (
    ItemAnswer,
    ItemRow,
    LedgerEntry,
    ParameterFacts,
    ProbeSection,
    ReportInput,
    Reproduce,
    SubjectFacts,
    TrainingCurve,
)

BPB = Metric("bits_per_byte", "Bits per byte", "bits/byte", "ratio", "lower")
PERPLEXITY = Metric("perplexity", "Perplexity", "per token", "ratio", "lower", transform="exp", compare=False)
NLL = Metric("nll", "NLL by position", "nats/token", "ratio", "lower", "position")
ACCURACY = Metric("accuracy", "Suffix accuracy", "", "proportion", "higher", "context", chance=0.25)
GAIN = Metric("long_range_gain", "Gain over 64 tokens", "", "difference", "higher", "context")
POSITIONS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]
CONTEXTS = [64.0, 128.0, 256.0, 512.0, 1024.0]
MIXERS = {"A": "attention", "M": "mamba2", "G": "gru"}
Level = Callable[[str], float]


def scalar_observations(labels: list[str], level: Level, documents: int, seeds: int = 1) -> Iterator[Observation]:
    """Bits per byte and NLL of every document: hard and easy documents are so for every subject."""
    rng = numpy_generator(0, "documents")
    hard, tokens = rng.normal(0, 0.12, documents), rng.integers(200, 900, documents)
    for label in labels:
        own = numpy_generator(1, label)
        for seed in range(seeds):
            shift = numpy_generator(2, label, seed).normal(0, 0.002)
            for d in range(documents):
                nll = (level(label) + hard[d] + shift + own.normal(0, 0.02)) * int(tokens[d])
                size = 4.3 * float(tokens[d])
                name = f"doc-{d}"
                yield Observation(label, seed, name, name, "bits_per_byte", None, nll / math.log(2), size)
                yield Observation(label, seed, name, name, "perplexity", None, nll, float(tokens[d]))


def curve_observations(labels: list[str], level: Level, reach: Level, documents: int) -> Iterator[Observation]:
    """NLL that falls with position, as far as a subject's reach goes."""
    hard = numpy_generator(0, "documents").normal(0, 0.12, documents)
    for label in labels:
        own = numpy_generator(3, label)
        for x in POSITIONS:
            mean = level(label) + 2.2 * math.exp(-math.log2(x + 1) / reach(label))
            for d in range(documents):
                name, count = f"doc-{d}", max(1.0, x / 2)
                nll = (mean + hard[d] + own.normal(0, 0.35 / math.sqrt(count))) * count
                yield Observation(label, 0, name, name, "nll", x, nll, count)


def suffix_observations(labels: list[str], skill: Level, documents: int) -> Iterator[Observation]:
    """Right or wrong among four suffixes, more often right with more context."""
    luck = numpy_generator(4, "luck").uniform(0, 1, documents)
    for label in labels:
        base = [float(u < 0.42) for u in luck]
        for x in CONTEXTS:
            own = numpy_generator(5, label, x).uniform(0, 1, documents)
            chance = min(0.95, 0.42 + skill(label) * math.log2(x / 64))
            for d in range(documents):
                right = float(0.7 * luck[d] + 0.3 * own[d] < chance)
                yield Observation(label, 0, f"doc-{d}", f"doc-{d}", "accuracy", x, right, 1.0)
                yield Observation(label, 0, f"doc-{d}", f"doc-{d}", "long_range_gain", x, right - base[d], 1.0)


def sections(
    labels: list[str], level: Level, reach: Level, skill: Level, documents: int, every: int = 1
) -> list[ProbeSection]:
    scalar = summarise(scalar_observations(labels, level, documents), [BPB, PERPLEXITY], resamples=2_000)
    seen = (o for o in curve_observations(labels, level, reach, documents) if POSITIONS.index(o.x or 1) % every == 0)
    curve = summarise(seen, [NLL], resamples=2_000)
    answered = (
        o for o in suffix_observations(labels, skill, documents) if CONTEXTS.index(o.x or 64) % min(every, 4) == 0
    )
    suffix = summarise(answered, [ACCURACY, GAIN], resamples=2_000)
    return [
        ProbeSection("perplexity", "Perplexity", "How well each subject predicts held-out documents; every document "
                     "is read from its start and no document sees another.", (BPB, PERPLEXITY), scalar),
        ProbeSection("position_curve", "Loss by position", "The same documents at growing distance from their start. "
                     "A curve that keeps falling says that more context still helps.", (NLL,), curve),
        ProbeSection("suffix_identification", "Suffix identification", "Which of four passages continues this "
                     "document? The documents are the same at every context.", (ACCURACY, GAIN), suffix),
        ProbeSection("efficiency", "Efficiency", "", (), summarise([], []), place="cost",
                     empty_because="Prefill and decode speed were not measured in this study."),
    ]  # fmt: skip


def facts(label: str, letters: str, factors: dict[str, str], level: float) -> SubjectFacts:
    attention, width = letters.count("A"), 192
    mixers = 4 * width * width * len(letters) + 9_000 * letters.count("M")
    parameters = ParameterFacts(1_990_000 + 700 * letters.count("M"), 786_432, 1_203_568, mixers, 610_000)
    state = {c: 4.0 * (2 * width * attention * c + 52_000 * (len(letters) - attention)) for c in (64, 512, 4096, 32768)}
    flops = {c: 2.0 * 1_990_000 + 2.0 * width * attention * c + 260_000.0 * letters.count("M") for c in state}
    return SubjectFacts(
        label=label, letters=letters, mixers=tuple(MIXERS[letter] for letter in letters), factors=factors,
        parameters=parameters, training_flops=9.6e12 + 4e11 * letters.count("M"), tokens_trained=1_310_720,
        tokens_per_second=14_300.0 - 2_100 * letters.count("M"), peak_memory_bytes=612_000_000 + 40_000_000 * attention,
        peak_memory_of="the resident memory of the training process", state_bytes=state, forward_flops=flops,
        match_target=1_203_568, match_residual=0.0011 * letters.count("M") / 4, seeds=(0,), device="CPU", dtype="fp32",
        best_loss=level, last_loss=level + 0.013, wall_seconds=91.0 + 16 * letters.count("M"),
    )  # fmt: skip


def training(label: str, level: float, seed: int = 0) -> TrainingCurve:
    rng = numpy_generator(seed, "training", label)
    steps = np.arange(1, 321)
    loss = level + 4.6 * np.exp(-steps / 42) + 0.05 * rng.normal(size=steps.size)
    rate = 3e-3 * np.minimum(steps / 20, 0.5 * (1 + np.cos(np.pi * np.minimum(1, steps / 320))) * 0.9 + 0.1)
    norm = 0.6 + 3 * np.exp(-steps / 15) + 0.08 * rng.random(steps.size)
    speed = 12_000 + 2_000 * rng.random(steps.size)
    rows: list[dict[str, float | None]] = [
        {"step": int(s), "tokens": int(s) * 4096, "loss": float(a), "lr": float(b), "grad_norm": float(c),
         "tokens_per_second": float(d), "seconds": 0.3 * int(s)}
        for s, a, b, c, d in zip(steps, loss, rate, norm, speed, strict=True)
    ]  # fmt: skip
    checks: list[dict[str, float | None]] = [
        {"step": int(s), "tokens": int(s) * 4096, "loss": float(level + 0.06 + 4.6 * math.exp(-s / 42))}
        for s in range(40, 321, 40)
    ]
    return TrainingCurve(label, seed, rows, checks, 320)


def items(labels: list[str]) -> list[ItemRow]:
    rng = numpy_generator(7, "items")
    asked = (
        "… and I have no doubt that the Congress will give to this subject the attention which its importance demands."
    )
    rows = []
    for i in range(60):
        answers = [
            ItemAnswer(label, 0, "passage B: the Treasury, under the law of last session" if right else
                       "passage D: our relations with the Republic of Mexico", float(right), "argmax of 4")
            for label, right in zip(labels, rng.random(len(labels)) < 0.6, strict=True)
        ]  # fmt: skip
        if i == 3:
            answers[0] = ItemAnswer(labels[0], 0, "", None, "", "context limit of 512 tokens")
        rows.append(ItemRow("suffix_identification", f"sotu-{1790 + i}/{i % 4}", asked, answers, CONTEXTS[i % 5],
                            "passage B: the Treasury, under the law of last session", True))  # fmt: skip
    hostile = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & <b>bold</b>"
    rows.append(
        ItemRow("suffix_identification", "hostile", hostile, [ItemAnswer(labels[0], 0, hostile, 0.0)], 64.0, hostile)
    )
    return rows


LEDGER = [
    LedgerEntry("info", "corpus", "249 addresses, 12 of them near-duplicates (Jaccard ≥ 0.8) and left out of training.",
                [{"split": "train", "documents": 187, "tokens": 1_604_221, "left out": 12},
                 {"split": "validation", "documents": 25, "tokens": 203_118, "left out": 0},
                 {"split": "test", "documents": 25, "tokens": 211_450, "left out": 0}]),
    LedgerEntry("warning", "suffix_identification", "7 documents are shorter than 1,024 + 64 tokens and were left out "
                "at every context, so that all contexts use the same documents."),
    LedgerEntry("info", "packing", "concat with markers: no token dropped, 812 positions of the last row padded."),
]  # fmt: skip
REPRODUCE = Reproduce(
    "longspan run quickstart",
    "study: quickstart\nquestion: …\nmodel: {width: 192, heads: 6}\nvary:\n  pattern: [AAAA, MMMM, AMAM]\n",
    {"longspan": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "altair": "6.3.0"},
    {"processor": "AMD EPYC, 2 cores", "memory": "24 GiB", "accelerator": "none"},
    {"commit": "80a1000d3b5e", "state": "clean"},
    {"corpus": "9b1f4c02ad77", "tokenizer": "byte_bpe-4096-1c9e22f0"},
)


def build_quickstart(documents: int = 60) -> ReportInput:
    levels = {"AAAA": 3.62, "MMMM": 3.56, "AMAM": 3.552}
    reach = {"AAAA": 3.4, "MMMM": 3.1, "AMAM": 3.0}
    skill = {"AAAA": 0.07, "MMMM": 0.055, "AMAM": 0.085}
    labels = list(levels)
    return ReportInput(
        study="quickstart",
        question="With two million parameters and five minutes, which mixer reads presidents best: attention, an SSM, "
        "or a hybrid of the two?",
        created="2026-11-22 03:00 UTC",
        subjects=[facts(s, s, {"pattern": s}, levels[s]) for s in labels],
        probes=sections(labels, levels.__getitem__, reach.__getitem__, skill.__getitem__, documents),
        reproduce=REPRODUCE,
        context=512,
        tokenizer="byte_bpe-4096-1c9e22f0",
        training=[training(s, levels[s]) for s in labels],
        ledger=LEDGER,
        items=items(labels),
    )


def build_leakage(documents: int = 40, every: int = 1) -> ReportInput:
    arms = {
        f"{pattern}/{isolation}": {"pattern": pattern, "packing.isolation": isolation}
        for pattern in ("AAAA", "MMMM", "GGGG")
        for isolation in ("full", "attention", "state", "none")
    }
    base = {"AAAA": 3.62, "MMMM": 3.56, "GGGG": 3.78}
    cost = {"full": 0.0, "attention": 0.012, "state": 0.02, "none": 0.045}

    def level(label: str) -> float:
        pattern, _, isolation = label.partition("/")
        return base[pattern] + cost[isolation]

    def reach(label: str) -> float:
        return {"A": 3.4, "M": 3.1, "G": 2.4}[label[0]]

    def skill(label: str) -> float:
        return {"A": 0.07, "M": 0.055, "G": 0.01}[label[0]] * (1 - 4 * cost[label.partition("/")[2]])

    labels = list(arms)
    found = sections(labels, level, reach, skill, documents, every)
    by_level = [
        replace(o, subject=f"isolation={o.subject.partition('/')[2]}", item=f"{o.subject[0]}/{o.item}")
        for o in scalar_observations(labels, level, documents)
        if o.metric == "bits_per_byte"
    ]
    effects = summarise(by_level, [BPB], resamples=2_000).comparisons
    first = replace(found[0], summary=replace(found[0].summary, comparisons=found[0].summary.comparisons + effects))
    return ReportInput(
        study="wiki-leakage",
        variant="small",
        question="How do packing, boundary markers and state resets change perplexity and the use of long context, per "
        "mixer?",
        created="2026-11-22 03:00 UTC",
        subjects=[facts(s, f["pattern"], f, level(s)) for s, f in arms.items()],
        probes=[first, *found[1:]],
        reproduce=REPRODUCE,
        context=512,
        tokenizer="byte_bpe-4096-1c9e22f0",
        training=[training(s, level(s)) for s in labels],
        ledger=LEDGER,
    )


@pytest.fixture(scope="session")
def quickstart_report() -> ReportInput:
    return build_quickstart()


@pytest.fixture(scope="session")
def leakage_report() -> ReportInput:
    return build_leakage(10, every=9)
