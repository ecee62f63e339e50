"""Answers that others recorded become records: LongBench's own output, and an earlier project's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longspan.corpus.sources.compressed import read_lines
from longspan.corpus.sources.jsonl import parse_object
from longspan.foundation.errors import DataError
from longspan.foundation.files import digest
from longspan.probes.longbench_v2.extraction import ASKED_AGAIN, LETTERS, earlier, official
from longspan.records.store import Record

Format = Literal["longbench", "ssm-experiment"]
KIND = "longbench_v2"
FACTS = ("domain", "sub_domain", "difficulty", "length")
_NAME = re.compile(r"(?P<subject>.+?)__ctx(?P<context>\d+)__rep(?P<repeat>\d+)")
_VARIANT = re.compile(r"(?P<subject>.+?)_(?P<variant>cot|no_context|rag_\d+)")


@dataclass(frozen=True)
class Origin:
    """Where answers come from, and how they were asked.

    Attributes:
        subject: whose they are.
        context: tokens of prompt and reply, None where nobody recorded it.
        repeat: which run of several.
        variant: `direct`, `cot`, `no_context` or `rag_N`.
    """

    subject: str
    context: int | None = None
    repeat: int = 1
    variant: str = "direct"


def origin_of(path: Path) -> Origin:
    """What a file's name says: `{subject}__ctx{tokens}__rep{n}.jsonl`, or LongBench's `{subject}[_cot|...].jsonl`."""
    stem = path.name.split(".jsonl")[0]
    if found := _NAME.fullmatch(stem):
        return Origin(found["subject"], int(found["context"]), int(found["repeat"]))
    if found := _VARIANT.fullmatch(stem):
        return Origin(found["subject"], variant=found["variant"])
    return Origin(stem)


@dataclass(frozen=True)
class Imported:
    """Records made of a file, and what is to be said about it.

    Attributes:
        records: in the order of the rows.
        rows: of the file.
        duplicated: ids that occur more than once, with how often.
        reprompted: rows with the reply to a second question.
        disagreeing: rows whose stored prediction is not what the rule they were made with reads now.
    """

    records: list[Record]
    rows: int
    duplicated: Mapping[str, int]
    reprompted: int = 0
    disagreeing: int = 0


def read_longbench(path: Path, form: Format, origin: Origin) -> Imported:
    """The rows of a result file as records; a second and later row of an id is kept as a copy of its own.

    Raises:
        DataError: a row without `_id`, `answer` or `response`; names file and line.
    """
    rows = list(_rows(path))
    counts = Counter(str(row["_id"]) for row in rows)
    copies: Counter[str] = Counter()
    rule = official if form == "longbench" else earlier
    protocol = {
        "kind": KIND,
        "recorded": form,
        "variant": origin.variant,
        "context": origin.context,
        "repeat": origin.repeat,
    }
    fingerprint = digest({"recorded": form, "subject": origin.subject})
    records = []
    for row in rows:
        name = str(row["_id"])
        copies[name] += 1
        copy = copies[name]
        records.append(
            Record.make(
                probe=KIND,
                protocol=protocol,
                item=name if copy == 1 else f"{name}#{copy}",
                subject=origin.subject,
                seed=0,
                fingerprint=fingerprint,
                answer=_answer(row, origin, copy),
            )
        )
    disagreeing = sum("pred" in row and (row["pred"] or None) != rule(str(row["response"])) for row in rows)
    return Imported(
        records,
        len(rows),
        {name: count for name, count in counts.items() if count > 1},
        sum(ASKED_AGAIN in str(row["response"]) for row in rows),
        disagreeing,
    )


def _answer(row: Mapping[str, Any], origin: Origin, copy: int) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "id": str(row["_id"]),
        "gold": row["answer"],
        "response": row["response"],
        **{name: row[name] for name in FACTS if row.get(name)},
        "copy": copy,
    }
    if origin.context is not None:
        answer["context"] = origin.context
    if row.get("response_cot"):
        answer["reasoning"] = row["response_cot"]
    if text := row.get("context"):
        # Both formats keep the first 1,000 characters: enough to tell documents apart.
        answer["document"] = digest(str(text)[:1000])[:16]
    return answer


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.isspace():
            continue
        where = f"{path}:{number}"
        row = parse_object(line, where)
        for field in ("_id", "answer", "response"):
            if not isinstance(row.get(field), str):
                raise DataError(
                    f"{where}: field `{field}` is {row.get(field)!r:.40}",
                    "rows with `_id`, `answer` and `response`, each a string",
                    "name a file of this format with --format",
                )
        if row["answer"] not in LETTERS:
            raise DataError(f"{where}: answer {row['answer']!r}", ", ".join(LETTERS), "mend the line")
        yield row


def duplicates_line(duplicated: Mapping[str, int], rows: int) -> str:
    """What a person should know about rows of the same id; empty where there are none."""
    if not duplicated:
        return ""
    extra = sum(duplicated.values()) - len(duplicated)
    names = ", ".join(f"{name} ({count}x)" for name, count in list(duplicated.items())[:3])
    more = f" and {len(duplicated) - 3} more" if len(duplicated) > 3 else ""
    return f"{len(duplicated)} ids occur more than once ({extra} of {rows} rows are copies): {names}{more}"


def refused(records: Iterable[Record], known: Mapping[str, Record]) -> Record | None:
    """The first record whose key is known with another answer, None where there is none."""
    for record in records:
        if record.key in known and known[record.key].answer != record.answer:
            return record
    return None
