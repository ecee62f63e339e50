"""Answers that lm-evaluation-harness recorded (`--log_samples`), read here for paired comparisons."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from longspan.corpus.sources.compressed import read_lines
from longspan.corpus.sources.jsonl import parse_object
from longspan.engines.base import Engine
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import digest
from longspan.probes.base import Item, Probe, ProbeData, register
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

KIND = "lm_eval"
_LOWER = ("perplexity", "bits_per_byte", "loss", "wer", "ter")
_NAME = re.compile(r"samples_(?P<task>.+?)_\d{4}-\d{2}-\d{2}T.+")


@register(KIND)
class LmEvalAnswers(Probe):
    """What lm-evaluation-harness recorded of one task; imported with `longspan import`, never asked here.

    Attributes:
        task: the harness's name of it.
        shares: metrics that are 0 or 1 for every sample.
        means: other metrics with one number a sample.
        sums: metrics with a sum of log-likelihoods and a count a sample (perplexities).
    """

    title: ClassVar[str] = "lm-evaluation-harness"
    explanation: ClassVar[str] = "Samples that lm-evaluation-harness scored, each metric as it scored it."
    requires: ClassVar[frozenset[str]] = frozenset()

    task: str = ""
    shares: tuple[str, ...] = ()
    means: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that the samples hold."""
        return (
            *(Metric(name, name, "", "proportion", _better(name)) for name in self.shares),
            *(Metric(name, name, "", "ratio", _better(name)) for name in self.means),
            *(Metric(name, f"log loss of {name}", "nats/unit", "ratio", "lower") for name in self.sums),
        )

    def check_before(self, context: int) -> None:
        """Refused: these answers come from elsewhere."""
        raise UserError(
            f"a study asks the probe `{KIND}`",
            "probes that Longspan asks itself",
            "run the harness's tasks with `longspan lm-eval --log_samples`, then `longspan import`",
        )

    def items(self, data: ProbeData) -> list[Item]:
        """Refused as before."""
        self.check_before(data.context)
        return []

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Never called: there are no items."""
        raise NotImplementedError

    def observe(self, record: Record) -> Iterable[Observation]:
        """Each metric of a sample."""
        cluster = str(record.answer["document"])
        for metric in self.metrics:
            value = record.answer["metrics"].get(metric.name)
            if isinstance(value, list):
                yield self.observation(record, metric.name, -value[0], value[1], cluster=cluster)
            elif value is not None:
                yield self.observation(record, metric.name, value, 1.0, cluster=cluster)


def read_samples(path: Path, subject: str) -> tuple[list[Record], int, dict[str, int]]:
    """The samples of one task as records, the number of rows, and the samples that occur more than once.

    Raises:
        DataError: a line that is no sample; names it.
    """
    task = found["task"] if (found := _NAME.fullmatch(path.name.split(".jsonl")[0])) else path.name.split(".jsonl")[0]
    rows = [
        _sample(line, f"{path}:{number}") for number, line in enumerate(read_lines(path), start=1) if not line.isspace()
    ]
    if not rows:
        raise DataError(f"{path} holds no samples", "a file that `lm_eval --log_samples` wrote", "name the right file")
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    sums = [name for name in names if any(isinstance(row["metrics"].get(name), list) for row in rows)]
    shares = [
        name for name in names if name not in sums and all(row["metrics"].get(name) in (0.0, 1.0, None) for row in rows)
    ]
    means = [name for name in names if name not in sums and name not in shares]
    protocol = {"kind": KIND, "task": task, "shares": shares, "means": means, "sums": sums}
    fingerprint = digest({"recorded": KIND, "subject": subject})
    copies: Counter[str] = Counter()
    records = []
    for row in rows:
        name = row.pop("item")
        copies[name] += 1
        item = name if copies[name] == 1 else f"{name}#{copies[name]}"
        answer = {**row, "id": name, "copy": copies[name]}
        records.append(
            Record.make(
                probe=f"{KIND}:{task}",
                protocol=protocol,
                item=item,
                subject=subject,
                seed=0,
                fingerprint=fingerprint,
                answer=answer,
            )
        )
    return records, len(rows), {name: count for name, count in copies.items() if count > 1}


def _sample(line: str, where: str) -> dict[str, Any]:
    row = parse_object(line, where)
    if "doc_id" not in row or "target" not in row:
        raise DataError(
            f"{where}: no `doc_id` and `target`", "a sample as `lm_eval --log_samples` writes it", "check --format"
        )
    metrics = {}
    for name in row.get("metrics") or [key for key in row if isinstance(row[key], int | float) and key != "doc_id"]:
        value = _number(row.get(name))
        if value is not None:
            metrics[name] = value
    if not metrics:
        raise DataError(f"{where}: no metric with a number", "samples with e.g. `acc` or `exact_match`", "check it")
    kept = row.get("filter", "none")
    return {
        "item": f"{row['doc_id']}:{kept}",
        "document": row.get("doc_hash") or str(row["doc_id"]),
        "target": str(row["target"])[:200],
        "response": _text(row.get("filtered_resps", row.get("resps"))),
        "metrics": metrics,
    }


def _number(value: Any) -> float | list[float] | None:
    """A finite number, or a sum with its count; None where it is neither (metrics that need all samples at once)."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list) and len(value) == 2 and all(isinstance(v, int | float) for v in value) and value[1] > 0:
        return [float(value[0]), float(value[1])]
    return None


def _text(responses: Any) -> str:
    while isinstance(responses, list) and responses:
        responses = responses[0]
    return str(responses)[:500] if responses else ""


def _better(name: str) -> Any:
    return "lower" if any(word in name for word in _LOWER) else "higher"
