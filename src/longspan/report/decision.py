"""The answer in one or two sentences, with its size and doubt; and an honest "cannot be decided" where that is so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from longspan.records.observation import Comparison, Measurement, Metric
from longspan.report import findings, numbers
from longspan.report.data import ProbeSection, ReportInput
from longspan.report.findings import Finding

NEGLIGIBLE = 0.01
"""A difference whose whole interval lies within this share of the best value is called a tie, not an open question."""

Verdict = Literal["winner", "provisional", "tie", "undecided", "single", "costs", "nothing"]


@dataclass(frozen=True)
class Decision:
    """What a report concludes.

    Attributes:
        answer: one or two sentences with effect size and interval.
        certainty: how far the answer carries: seeds, sample size, what it would take to decide.
        groups: subjects in groups that cannot be told apart, best group first.
        finding: the metric it rests on, None where nothing was measured.
        also: one sentence per further quality probe.
    """

    verdict: Verdict
    answer: str
    certainty: str
    groups: list[list[str]] = field(default_factory=list)
    finding: Finding | None = None
    also: list[str] = field(default_factory=list)


def decide(report: ReportInput) -> Decision:
    """The report's answer, from the primary metric's paired comparisons."""
    finding = findings.primary_finding(report)
    if finding is None and any(section.place == "cost" and section.summary.measurements for section in report.probes):
        answer = "No quality was asked: what each subject costs, and from which context on which costs less, is below."
        return Decision("costs", answer, "")
    if finding is None:
        return Decision("nothing", "There is no answer: no probe has results yet.", "")
    verdict, answer, doubt = _conclude(finding)
    if verdict == "winner" and _one_seed(report):
        # Documents decide between these weights; only further seeds decide between the architectures.
        verdict, answer = "provisional", f"In one training run each, {answer}"
    groups = findings.tie_groups(finding)
    answer = " ".join([answer, *_effect_sentences(finding)])
    also = [sentence for section in report.probes if (sentence := _also(section, finding))]
    certainty = " ".join(filter(None, [doubt, _basis(finding), _seeds(report, finding)]))
    return Decision(verdict, answer, certainty, groups, finding, also)


def quantity(finding: Finding) -> str:
    """The metric in running text, with the x it was taken at: `bits per byte`, `accuracy at 2,048 tokens`."""
    title = finding.metric.title
    name = title if title[1:2].isupper() else title[:1].lower() + title[1:]
    name = name.removesuffix(f" by {finding.metric.x_name}")
    if finding.x is None:
        return name
    unit = " tokens" if finding.metric.x_name == "context" else ""
    where = "at a context of" if finding.metric.x_name == "context" else f"at {finding.metric.x_name or 'x'}"
    return f"{name} {where} {numbers.count(finding.x)}{unit}"


def value_text(metric: Metric, measurement: Measurement, *, n: bool = False) -> str:
    """A measurement as text, by the kind of its metric."""
    if metric.kind == "exact":
        return numbers.scaled(measurement.value)
    if metric.kind == "derived" and metric.unit == "":
        low, high = measurement.low, measurement.high
        doubt = "" if low is None or high is None else f" [{numbers.count(low)}, {numbers.count(high)}]"
        return f"{numbers.count(measurement.value)}{doubt}"
    if metric.is_share:
        return numbers.percentage(measurement.value, measurement.low, measurement.high, measurement.n if n else None)
    if metric.kind == "median" and measurement.n == 1:
        # One run has no quartiles.
        value = measurement.value
        return numbers.count(value) if value == round(value) else numbers.significant(value, 4)
    text = numbers.estimate(measurement.value, measurement.low, measurement.high)
    return f"{text} n={measurement.n:,}" if n else text


def difference_text(metric: Metric, comparison: Comparison) -> str:
    """A comparison's difference as text, by the kind of its metric."""
    return numbers.difference(comparison.difference, comparison.low, comparison.high, proportion=metric.is_share)


def _conclude(finding: Finding) -> tuple[Verdict, str, str]:
    values = findings.measured(finding)
    ranked = findings.order(finding.metric, values.values())
    best = ranked[0]
    what, shown = quantity(finding), value_text(finding.metric, best)
    if len(ranked) == 1:
        return "single", f"{best.subject} reaches {what} {shown}; there is no other subject to compare with.", ""
    groups = findings.tie_groups(finding)
    if len(groups) > 1 and len(groups[0]) == 1:
        return "winner", _winner(finding, ranked), ""
    if len(groups) > 1 and findings.leads(finding, groups[0]):
        others = groups[0][1:]
        text = (
            f"{_names(groups[0])} lead on {what} ({best.subject}: {shown}) and cannot be told apart; "
            f"{_tail(finding, best.subject, [s for g in groups[1:] for s in g])}"
        )
        return "tie", text, _open_question(finding, best.subject, others)
    return _no_difference(finding, ranked, what)


def _winner(finding: Finding, ranked: list[Measurement]) -> str:
    best, runner = ranked[0], ranked[1]
    comparison = findings.between(finding, best.subject, runner.subject)
    superlative = "lowest" if finding.metric.better == "lower" else "highest"
    text = f"{best.subject} has the {superlative} {quantity(finding)}, {value_text(finding.metric, best)}"
    if comparison is None:
        return f"{text}; the others were not compared with it item by item."
    size = difference_text(finding.metric, comparison)
    share = abs(comparison.difference / runner.value) if runner.value else 0.0
    plain = finding.metric.kind == "ratio" and finding.metric.transform == "identity"
    percent = f", {numbers.significant(100 * share, 2)} %" if plain and share else ""
    adjusted = f"; Holm-adjusted p {_equals(comparison.p_holm)}" if comparison.p_holm is not None else ""
    return f"{text}: {size} against the next best, {runner.subject} (paired difference{percent}{adjusted})."


def _no_difference(finding: Finding, ranked: list[Measurement], what: str) -> tuple[Verdict, str, str]:
    best = ranked[0]
    compared = [c for r in ranked[1:] if (c := findings.between(finding, best.subject, r.subject)) is not None]
    names = _names([r.subject for r in ranked]) if len(ranked) <= 4 else f"The {len(ranked)} subjects"
    if not compared:
        return "undecided", f"{names} were measured on {what}, but not compared item by item.", ""
    widest = max(compared, key=lambda c: abs(c.difference))
    size = difference_text(finding.metric, widest)
    bound = max(_reach(c) for c in compared)
    if finding.metric.transform == "identity" and best.value and bound <= NEGLIGIBLE * abs(best.value):
        share = numbers.significant(100 * bound / abs(best.value), 2)
        text = f"A tie: {names} agree on {what} to within {share} % (largest difference {size})."
        return "tie", text, ""
    text = (
        f"Which of {names if len(ranked) <= 4 else names.lower()} is better on {what} cannot be decided with this data"
    )
    shown = value_text(finding.metric, best)
    if all(other.value == best.value for other in ranked):
        text += f": {'both' if len(ranked) == 2 else 'all'} have {shown}."
        return "undecided", text, _open_question(finding, best.subject, [r.subject for r in ranked[1:]])
    text += f": {best.subject} looks best at {shown}, "
    beaten = [c.b for c in compared if c.decided]
    standing = [r.subject for r in ranked[1:] if r.subject not in beaten]
    if widest.decided:
        which = f"{widest.b}: " if len(beaten) > 1 else ""
        text += (
            f"and is told apart from {_names(beaten)} ({which}{size}, Holm-adjusted p {_equals(widest.p_holm)}), "
            f"but not from {_names(standing)}"
        )
    else:
        text += f"but its difference to {widest.b} is {size}"
        if widest.p_holm is not None and (widest.low or 0.0) * (widest.high or 0.0) > 0:
            text += f", which is not beyond doubt among so many (Holm-adjusted p {_equals(widest.p_holm)})"
    text += "."
    return "undecided", text, _open_question(finding, best.subject, standing)


def _open_question(finding: Finding, best: str, others: list[str]) -> str:
    """What it would take to tell `best` from the nearest of `others`."""
    compared = [c for other in dict.fromkeys(others) if (c := findings.between(finding, best, other)) is not None]
    sized = [c for c in compared if c.mde and c.difference]
    if not sized:
        return _no_size_known(finding, best, compared)
    comparison = max(sized, key=lambda c: abs(c.difference) / (c.mde or math.inf))
    mde = comparison.mde or math.nan
    text = f"{_invisible(finding.metric, mde)}; confirming one of the observed size ({best} against {comparison.b}) "
    factor = (mde / abs(comparison.difference)) ** 2
    counted = finding.metric.counted
    if factor > 100:
        return text + f"would need more than a hundred times the {numbers.count(comparison.n)} {counted} of this study."
    if comparison.needed is not None:
        n = numbers.count(_rounded(max(comparison.needed, comparison.n + 1)))
        return text + f"would need about {n} {counted}; this study had {numbers.count(comparison.n)}."
    seeds = math.ceil(factor * comparison.seeds)
    return (
        text
        + f"would need about {max(seeds, comparison.seeds + 1)} seeds per subject; this study had {comparison.seeds}."
    )


def _no_size_known(finding: Finding, best: str, compared: Sequence[Comparison]) -> str:
    """What stands in the way where nothing tells how many more it would take."""
    notes = dict.fromkeys(c.note for c in compared if c.note)
    if notes or not compared:
        return " ".join(f"{note[:1].upper()}{note[1:]}." for note in notes)
    if limits := [c.mde for c in compared if c.mde]:
        return f"{_invisible(finding.metric, max(limits))}."
    n, counted = numbers.count(max(c.n for c in compared)), finding.metric.counted
    others = _names(list(dict.fromkeys(c.b for c in compared)))
    return f"Too few of the {n} {counted} differ between {best} and {others} to say how many more would decide."


def _invisible(metric: Metric, mde: float) -> str:
    unit = f" {metric.unit}" if metric.unit and metric.transform == "identity" else ""
    proportion = metric.is_share
    if proportion and mde >= 1:
        return (
            "What was measured spreads so far that no difference of shares, however large, would be sure to show here"
        )
    limit = f"{numbers.significant(100 * mde, 2)} pp" if proportion else f"{numbers.significant(mde, 2)}{unit}"
    return f"Differences below about {limit} are invisible here"


def _tail(finding: Finding, best: str, behind: list[str]) -> str:
    comparison = findings.between(finding, best, behind[0])
    if comparison is None:
        return f"behind them: {_names(behind)}."
    who = behind[0] if len(behind) == 1 else f"the best of the other {len(behind)}, {behind[0]},"
    return f"{who} is behind {best} by {_unsigned(finding.metric, comparison)}."


def _unsigned(metric: Metric, comparison: Comparison) -> str:
    turned = comparison if comparison.difference >= 0 else findings.turned(comparison)
    return difference_text(metric, turned).replace("+", "")


def _effect_sentences(finding: Finding) -> list[str]:
    """The factor whose levels differ most beyond doubt, where the study varies several."""
    found = [c for c in findings.effects(finding.section, finding.metric.name) if c.x == finding.x]
    if not found:
        return []
    clear = [c for c in found if findings.decided(c)]
    if not clear:
        return ["No factor has a main effect beyond doubt."]
    top = max(clear, key=lambda c: abs(c.difference))
    sign = 1 if finding.metric.better == "lower" else -1
    better = top if sign * top.difference < 0 else findings.turned(top)
    factor, _, level = better.a.partition("=")
    moved = "lower" if finding.metric.better == "lower" else "higher"
    size = _unsigned(finding.metric, better)
    return [
        f"Over all arms the clearest factor is {factor}: with {level} it is {size} {moved} than with "
        f"{better.b.partition('=')[2]}."
    ]


def _also(section: ProbeSection, primary: Finding) -> str:
    """One sentence on another quality probe's first metric, at its largest x."""
    finding = findings.main_finding(section)
    if finding is None or section is primary.section or section.place != "quality":
        return ""
    ranked = findings.order(finding.metric, findings.measured(finding).values())
    if len(ranked) < 2:
        return ""
    groups, best = findings.tie_groups(finding), ranked[0]
    head = f"{section.title}: {quantity(finding)} is "
    shown = value_text(finding.metric, best)
    if len(groups) == 1:
        low, high = sorted((best, ranked[-1]), key=lambda m: m.value)
        if low.value == high.value:
            return f"{head}{shown} for {'both' if len(ranked) == 2 else 'all'}."
        ends = [f"{value_text(finding.metric, end)} ({end.subject})" for end in (low, high)]
        return f"{head}{' to '.join(ends)}; no difference is beyond doubt."
    if len(groups[0]) == 1:
        runner = value_text(finding.metric, ranked[1])
        return f"{head}best for {best.subject}, {shown}, beyond doubt; next {ranked[1].subject}, {runner}."
    return f"{head}best for {_names(groups[0])} (tied; {best.subject} {shown}), then {_names(groups[1])}."


def _basis(finding: Finding) -> str:
    sizes = sorted({m.n for m in findings.measured(finding).values()})
    if not sizes:
        return ""
    n = numbers.count(sizes[0]) if len(sizes) == 1 else f"{numbers.count(sizes[0])} to {numbers.count(sizes[-1])}"
    if len(findings.measured(finding)) == 1:
        return f"The interval is 95 %, from {n} {finding.metric.counted}."
    counted = finding.metric.counted
    return f"Intervals are 95 %, from {n} {counted}; differences are paired on the same {counted} and Holm-adjusted."


def _seeds(report: ReportInput, finding: Finding) -> str:
    trained = [s for s in report.subjects if s.kind == "trained"]
    if not trained:
        return ""
    counted = finding.metric.counted
    if _one_seed(report) and len(report.subjects) == 1:
        return (
            "One seed was trained, so the variation from seed to seed is unmeasured: the interval says how the result "
            f"would change with other {counted}, not with another training run. It takes at least 3 seeds: "
            "seed=[0,1,2]."
        )
    if _one_seed(report):
        return (
            "One seed was trained per subject, so the variation from seed to seed is unmeasured: the intervals say how "
            f"the result would change with other {counted}, not with another training run. Deciding between the "
            "architectures takes at least 3 seeds: seed=[0,1,2]."
        )
    counts = sorted({len(s.seeds) for s in trained})
    text = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{text} seeds were trained per subject."


def _one_seed(report: ReportInput) -> bool:
    seeds = [len(s.seeds) for s in report.subjects if s.kind == "trained"]
    return bool(seeds) and max(seeds) <= 1


def _reach(comparison: Comparison) -> float:
    """The largest difference that the interval leaves open."""
    if comparison.low is None or comparison.high is None:
        return math.inf
    return max(abs(comparison.low), abs(comparison.high))


def _rounded(n: int) -> int:
    """Two significant digits: more would pretend to know the spread of documents not yet seen."""
    step = 10 ** max(0, len(str(n)) - 2)
    return int(-(-n // step) * step)


def _equals(p: float | None) -> str:
    text = numbers.p_value(p)
    return text if text.startswith("<") else f"= {text}"


def _names(labels: list[str]) -> str:
    if len(labels) > 4:
        return f"{', '.join(labels[:3])} and {len(labels) - 3} more"
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"
