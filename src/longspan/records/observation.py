"""From observations to a summary: every probe gets intervals, paired comparisons, Holm and ties without own code."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations

import numpy as np

from longspan.foundation.errors import DataError
from longspan.records import statistics
from longspan.records.measures import Comparison, Measurement, Metric, Observation, Summary, Ties
from longspan.records.statistics import Array, Bootstrap, SeedSpread
from longspan.records.ties import tie_groups

__all__ = ["Comparison", "Measurement", "Metric", "Observation", "Summary", "Ties", "summarise"]

# --- grouping ---------------------------------------------------------------------------------------------------------


@dataclass
class _Answers:
    """All observations of one subject at one (metric, x, y): per seed, item -> [numerator, denominator]."""

    seeds: dict[int, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(dict))
    clusters: dict[str, str] = field(default_factory=dict)

    def add(self, seen: Observation) -> None:
        sums = self.seeds[seen.seed].setdefault(seen.item, [0.0, 0.0])
        sums[0] += seen.numerator
        sums[1] += seen.denominator
        self.clusters[seen.item] = seen.cluster

    def items(self) -> list[str]:
        """Items that every seed has, in order of appearance."""
        if not self.seeds:
            return []
        first, *others = self.seeds.values()
        return [item for item in first if all(item in other for other in others)]

    def num_items_of_some_seed(self) -> int:
        return len(set().union(*self.seeds.values()))

    def by_cluster(self, items: Sequence[str]) -> tuple[Array, Array]:
        """Numerators and denominators (clusters, seeds) summed over items, clusters in order of appearance."""
        row_of: dict[str, int] = {}
        rows = [row_of.setdefault(self.clusters[item], len(row_of)) for item in items]
        sums = np.array([[seed[item] for seed in self.seeds.values()] for item in items], dtype=np.float64)
        out = np.zeros((len(row_of), len(self.seeds), 2))
        np.add.at(out, rows, sums)
        return out[..., 0], out[..., 1]


Place = tuple[float | None, float | None]
"""(x, y): y is None for all of an x together."""
Grouped = dict[Place, dict[str, _Answers]]


def _group(observations: Iterable[Observation], metrics: Mapping[str, Metric]) -> dict[str, Grouped]:
    """metric -> (x, y) -> subject -> answers; what has a y counts in its cell and in all of its x."""
    grouped: dict[str, Grouped] = {name: defaultdict(lambda: defaultdict(_Answers)) for name in metrics}
    for seen in observations:
        if seen.metric not in grouped:
            raise DataError(f"an observation of metric {seen.metric!r}", ", ".join(grouped), "declare it in the probe")
        if not (math.isfinite(seen.numerator) and 0 < seen.denominator < math.inf):
            raise DataError(
                f"{seen.metric} of {seen.subject} (seed {seen.seed}) on item {seen.item} is "
                f"{seen.numerator}/{seen.denominator}",
                "finite numbers and a positive denominator",
                "the subject's answer is not usable: look at its training for divergence",
            )
        if seen.y is not None and metrics[seen.metric].y_name is None:
            raise DataError(f"an observation of {seen.metric} at y = {seen.y:g}", "no y", "give the metric a `y_name`")
        for y in dict.fromkeys((None, seen.y)):
            grouped[seen.metric][seen.x, y][seen.subject].add(seen)
    return grouped


# --- main effects -----------------------------------------------------------------------------------------------------


def _main_effect_pairs(
    subjects: Mapping[str, _Answers], factors: Mapping[str, Mapping[str, str]]
) -> Iterator[dict[str, _Answers]]:
    """For every two levels of a factor: `factor=level` -> the average answer of the arms that both levels have."""
    known = {subject: dict(factors[subject]) for subject in subjects if subject in factors}
    names = list(dict.fromkeys(name for levels in known.values() for name in levels))
    varied = [name for name in names if len({levels.get(name) for levels in known.values()}) > 1]
    if len(varied) < 2:
        return
    for name in varied:
        # arms by level, keyed by all that is not this factor
        arms: dict[str, dict[tuple[tuple[str, str], ...], str]] = defaultdict(dict)
        for subject, levels in known.items():
            if name in levels:
                rest = tuple(sorted((k, v) for k, v in levels.items() if k != name))
                arms[levels[name]][rest] = subject
        for a, b in combinations(arms, 2):
            shared = [rest for rest in arms[a] if rest in arms[b]]
            if shared:
                yield {
                    f"{name}={level}": _average([subjects[arms[level][rest]] for rest in shared]) for level in (a, b)
                }


def _average(arms: Sequence[_Answers]) -> _Answers:
    """Mean over arms, item by item, on the seeds and items that all arms have."""
    averaged = _Answers()
    for seed in [seed for seed in arms[0].seeds if all(seed in arm.seeds for arm in arms)]:
        for item, cluster in arms[0].clusters.items():
            sums = [arm.seeds[seed].get(item) for arm in arms]
            present = [pair for pair in sums if pair is not None]
            if len(present) == len(arms):
                averaged.seeds[seed][item] = [sum(pair[k] for pair in present) / len(arms) for k in (0, 1)]
                averaged.clusters[item] = cluster
    return averaged


# --- summing up -------------------------------------------------------------------------------------------------------


def summarise(
    observations: Iterable[Observation],
    metrics: Sequence[Metric],
    *,
    seed: int = 0,
    resamples: int = statistics.RESAMPLES,
    factors: Mapping[str, Mapping[str, str]] | None = None,
) -> Summary:
    """Measurements, paired comparisons of all pairs of subjects, and ties; pure: needs no model.

    Args:
        observations: of any number of subjects and seeds. Several of one (subject, seed, item, metric, x)
            add up; those with a y make up its cell as well as their x.
        metrics: those that occur, in the order wanted.
        seed: of the resampling.
        resamples: of the bootstrap.
        factors: subject -> factor -> level. Where a study varies two or more factors, comparisons between
            `factor=level` pairs are added: main effects, averaged over the arms that exist at both levels.

    Raises:
        DataError: an observation is not finite, has no positive denominator, or its metric is not declared.
    """
    by_name = {metric.name: metric for metric in metrics}
    measurements: list[Measurement] = []
    comparisons: list[Comparison] = []
    ties: list[Ties] = []
    notes: dict[str, None] = {}
    for name, grouped in _group(observations, by_name).items():
        metric = by_name[name]
        ordered = sorted(grouped, key=lambda place: [(part is not None, part) for part in place])
        values: dict[tuple[float | None, str], float] = {}
        compared: list[Comparison] = []
        for x, y in ordered:
            subjects = grouped[x, y]
            for subject, answers in subjects.items():
                measured = _measure(metric, (x, y), subject, answers, seed, resamples)
                measurements.append(measured)
                if y is None:
                    values[x, subject] = measured.value
                if metric.kind not in ("median", "exact"):
                    notes.update(dict.fromkeys(_notes(subject, answers)))
            if y is None and metric.compare and metric.kind not in ("median", "exact"):
                compared += _compare(metric, x, subjects, seed, resamples)
                for levels in _main_effect_pairs(subjects, factors or {}):
                    compared += _compare(metric, x, levels, seed, resamples)
        compared = _adjusted(compared)
        comparisons += compared
        if compared:
            ties += [_ties(metric, x, list(grouped[x, y]), values, compared) for x, y in ordered if y is None]
    return Summary(tuple(measurements), tuple(comparisons), tuple(ties), tuple(notes))


def _notes(subject: str, answers: _Answers) -> list[str]:
    notes = []
    if len(answers.seeds) == 1:
        notes.append(
            f"{subject} has one training seed: its intervals hold the sampling of documents, not the luck of training"
        )
    lost = answers.num_items_of_some_seed() - len(answers.items())
    if lost:
        notes.append(f"{subject}: {lost} items are missing for some seeds and were left out")
    return notes


def _measure(metric: Metric, place: Place, subject: str, answers: _Answers, seed: int, resamples: int) -> Measurement:
    x, y = place
    items = answers.items()
    if not items:
        raise DataError(
            f"{metric.name} of {subject}: no item that all of its {len(answers.seeds)} seeds answered",
            "the same items for every seed",
            "run the probe again: it asks only what is missing",
        )
    numerator_CS, denominator_CS = answers.by_cluster(items)
    clusters, seeds = numerator_CS.shape

    def shown(end: float | None) -> float | None:
        return None if end is None or not math.isfinite(end) else metric.shown(end)

    def measured(value: float, low: float | None, high: float | None, note: str = "") -> Measurement:
        return Measurement(
            metric.name, subject, x, metric.shown(value), shown(low), shown(high), clusters, seeds, len(items), note, y
        )

    ratios_S = numerator_CS.sum(0) / denominator_CS.sum(0)
    value = float(ratios_S.mean())
    if metric.kind == "median":
        samples = np.array([n / d for per_seed in answers.seeds.values() for n, d in per_seed.values()])
        low, median, high = np.quantile(samples, [0.25, 0.5, 0.75])
        return measured(float(median), float(low), float(high), "median with quartiles over repeats")
    if metric.kind == "exact":
        return measured(value, value, value)
    spread = statistics.seed_spread(ratios_S.tolist())
    if metric.kind == "proportion":
        # With several seeds a trial's outcome is its mean over seeds; the seeds' own spread is added after.
        inner = statistics.proportion_interval(numerator_CS.mean(1), denominator_CS.mean(1))
        low_half, high_half = value - inner.low, inner.high - value
        extra = spread.half_width()
        return measured(
            value, max(0.0, value - math.hypot(low_half, extra)), min(1.0, value + math.hypot(high_half, extra))
        )
    if clusters < statistics.FEWEST_CLUSTERS:
        return measured(value, None, None, _too_few(clusters, metric.counted))
    (boot,) = statistics.cluster_bootstrap(
        numerator_CS.mean(1, keepdims=True), denominator_CS.mean(1, keepdims=True), seed=seed, resamples=resamples
    )
    low, high = _ends(metric, value, boot, spread, (numerator_CS / denominator_CS).mean(1))
    if metric.kind == "ratio" and metric.better == "lower" and (numerator_CS >= 0).all():
        # A loss cannot be negative; a gain that happens to be positive everywhere can.
        low = max(low, 0.0)
    return measured(value, low, high)


def _too_few(clusters: int, counted: str) -> str:
    return f"no interval: {clusters} {counted}, at least {statistics.FEWEST_CLUSTERS} are needed"


def _ends(
    metric: Metric, value: float, boot: Bootstrap, spread: SeedSpread, by_cluster_C: Array
) -> tuple[float, float]:
    """Both ends; `by_cluster_C` holds every cluster's own value, for differences of shares that the bootstrap fails."""
    half = statistics.combined_half_width(boot, spread)
    if metric.kind == "ratio":
        return value - half, value + half
    if not math.isfinite(half):
        inner, extra = statistics.few_discordant_interval(by_cluster_C), spread.half_width()
        return max(-1.0, inner.low - extra), min(1.0, inner.high + extra)
    if boot.error == 0:
        # All clusters agree: what n clusters that agree leave open, as for 0 of n.
        half = math.hypot(half, statistics.clopper_pearson(0, boot.clusters).high)
    return max(-1.0, value - half), min(1.0, value + half)


def _compare(
    metric: Metric, x: float | None, subjects: Mapping[str, _Answers], seed: int, resamples: int
) -> list[Comparison]:
    """All pairs at one x; pairs on the same clusters and of the same kind share one pass over the resamples."""
    shared: dict[tuple[tuple[str, ...], bool], list[tuple[str, str]]] = defaultdict(list)
    for a, b in combinations(subjects, 2):
        in_b = set(subjects[b].items())
        items = tuple(item for item in subjects[a].items() if item in in_b)
        if items:
            same = np.array_equal(subjects[a].by_cluster(items)[1].mean(1), subjects[b].by_cluster(items)[1].mean(1))
            shared[items, same].append((a, b))
    found: dict[tuple[str, str], Comparison] = {}
    for (items, _), pairs in shared.items():
        sides = {s: subjects[s].by_cluster(items) for pair in pairs for s in pair}
        columns = [
            np.stack([sides[pair[side]][part].mean(1) for pair in pairs], axis=1) for side in (0, 1) for part in (0, 1)
        ]
        clusters = columns[0].shape[0]
        boots: list[Bootstrap | None] = [None] * len(pairs)
        if clusters >= statistics.FEWEST_CLUSTERS:
            boots = list(statistics.paired_bootstrap(*columns, seed=seed, resamples=resamples))
        for pair, boot in zip(pairs, boots, strict=True):
            exact = _mcnemar(metric, subjects[pair[0]], subjects[pair[1]], items)
            found[pair] = _comparison(metric, x, pair, [sides[s] for s in pair], boot, exact)
    return [found[pair] for pair in combinations(subjects, 2) if pair in found]


def _comparison(
    metric: Metric,
    x: float | None,
    pair: tuple[str, str],
    sides: Sequence[tuple[Array, Array]],
    boot: Bootstrap | None,
    exact: tuple[float, float] | None,
) -> Comparison:
    ratios = [numerator.sum(0) / denominator.sum(0) for numerator, denominator in sides]
    seeds = min(len(side) for side in ratios)
    difference = float(ratios[0].mean() - ratios[1].mean())
    clusters = len(sides[0][0])
    low = high = p = mde = None
    needed, method, note = None, "none", ""
    if boot is None:
        note = _too_few(clusters, metric.counted)
    else:
        spread = statistics.seed_spread(*(side.tolist() for side in ratios))
        by_cluster = [(numerator / denominator).mean(1) for numerator, denominator in sides]
        ends = _ends(metric, difference, boot, spread, by_cluster[0] - by_cluster[1])
        low, high = (end if math.isfinite(end) else None for end in ends)
        p, method = statistics.combined_p(boot, spread), "paired cluster bootstrap"
        if spread.freedom > 0:
            method += " with Student's t over seeds"
        detectable = statistics.minimum_detectable_effect(statistics.combined_half_width(boot, spread))
        mde = detectable if math.isfinite(detectable) and detectable > 0 else None
        if mde is not None and spread.freedom == 0:
            needed = statistics.clusters_needed(clusters, difference, mde)
    if exact is not None:
        # Each item is a cluster of its own here, so the detectable difference is that of the test that is made.
        (p, discordance), method = exact, "exact McNemar"
        connor = statistics.paired_proportion_mde(clusters, discordance) if discordance else math.inf
        mde = connor if math.isfinite(connor) else None
        needed = None if mde is None else statistics.clusters_needed(clusters, difference, mde)
    return Comparison(metric.name, x, *pair, difference, low, high, p, None, mde, clusters, seeds, needed, method, note)


def _mcnemar(metric: Metric, a: _Answers, b: _Answers, items: Sequence[str]) -> tuple[float, float] | None:
    """p and the share of items that one side alone got right, where the exact test is valid.

    That is with one seed a side, one item per cluster, and answers right or wrong.
    """
    if metric.kind != "proportion" or len(a.seeds) > 1 or len(b.seeds) > 1:
        return None
    if len({a.clusters[item] for item in items}) < len(items):
        return None
    (of_a,), (of_b,) = a.seeds.values(), b.seeds.values()
    answers = [(*of_a[item], *of_b[item]) for item in items]
    if any(na not in (0.0, 1.0) or nb not in (0.0, 1.0) or da != 1.0 or db != 1.0 for na, da, nb, db in answers):
        return None
    only_a, only_b = (sum(sign * (na - nb) > 0 for na, _, nb, _ in answers) for sign in (1, -1))
    return statistics.mcnemar(only_a, only_b), (only_a + only_b) / len(answers)


def _adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    tested = [c for c in comparisons if c.p is not None]
    adjusted = iter(statistics.holm([c.p for c in tested if c.p is not None]))
    return [c if c.p is None else replace(c, p_holm=next(adjusted)) for c in comparisons]


def _ties(
    metric: Metric,
    x: float | None,
    subjects: Sequence[str],
    values: Mapping[tuple[float | None, str], float],
    comparisons: Sequence[Comparison],
) -> Ties:
    """The groups that cannot be told apart at one x; see `tie_groups`."""
    decided = {frozenset((c.a, c.b)) for c in comparisons if c.x == x and c.decided}
    order = sorted(subjects, key=lambda s: values[x, s], reverse=metric.better == "higher")
    groups = tie_groups(order, lambda a, b: frozenset((a, b)) in decided)
    return Ties(metric.name, x, tuple(groups))
