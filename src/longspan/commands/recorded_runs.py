"""Where the records of a run lie: a file, a folder that `longspan import` wrote, a probe's job, or a whole study."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from longspan.engines.run_index import SUBJECTS
from longspan.foundation.errors import UserError
from longspan.foundation.files import read_json
from longspan.records.store import RECORDS, Record, read_records
from longspan.study.jobs import DONE, SPECIFICATION

DUPLICATES: Mapping[str, str] = {
    "all": "every row counts, as LongBench's result.py does",
    "first": "the first row of each item counts",
    "drop": "items that occur more than once are left out",
}
"""Policies for items that were answered more than once."""
ALLOWED = "a records file, a folder that `longspan import` wrote, or a study's folder (runs/STUDY)"


@dataclass(frozen=True)
class Recorded:
    """Records of one run, and what a person should know about them."""

    run: Path
    records: Sequence[Record]
    notes: tuple[str, ...] = ()


def open_run(run: str, duplicates: str = "all") -> Recorded:
    """The records of a run under a policy for items that were answered more than once.

    Args:
        run: a path, see `ALLOWED`.
        duplicates: a key of `DUPLICATES`.

    Raises:
        UserError: no records there, or an unknown policy.
        DataError: a damaged file.
    """
    if duplicates not in DUPLICATES:
        raise UserError(f"--duplicates {duplicates}", ", ".join(DUPLICATES), "name one of these")
    path = Path(run).expanduser()
    records = [record for file, asked in _files(path) for record in _asked(file, asked)]
    if not records:
        raise UserError(f"{run} holds no records", ALLOWED, "run the study's probes first, or import answers")
    kept = keep(records, duplicates)
    notes = []
    copies = {_about(record) for record in records if record.answer.get("copy", 1) > 1}
    if copies:
        lost = len(records) - len(kept)
        notes.append(
            f"{len(copies)} items were answered more than once; policy `{duplicates}` ({DUPLICATES[duplicates]}): "
            f"{len(kept):,} of {len(records):,} rows count, {lost:,} do not"
        )
    return Recorded(path, kept, tuple(notes))


def keep(records: Sequence[Record], duplicates: str) -> list[Record]:
    """The records that a policy keeps; copies of an item are told by their answers' `copy`."""
    if duplicates == "all":
        return list(records)
    if duplicates == "first":
        return [record for record in records if record.answer.get("copy", 1) == 1]
    counts = Counter(map(_about, records))
    return [record for record in records if counts[_about(record)] == 1]


def _about(record: Record) -> tuple[object, ...]:
    """What two copies of an answer share; a copy's item is named `ITEM#N`."""
    copy = record.answer.get("copy", 1)
    item = record.item if copy == 1 else record.item.removesuffix(f"#{copy}")
    return record.subject, record.seed, record.probe, item, repr(record.protocol)


def _asked(file: Path, fingerprint: str | None) -> Iterator[Record]:
    """Records of a file; of those that a job asked, without those of weights that were trained again since."""
    for record in read_records(file):
        if fingerprint is None or record.fingerprint == fingerprint:
            yield record


def _files(path: Path) -> Iterable[tuple[Path, str | None]]:
    """Files with records, and of a job's the fingerprint of what was asked last."""
    if path.is_file():
        return [(path, None)]
    if (path / RECORDS).is_file():
        return [(path / RECORDS, _fingerprint(path))]
    if not (path / SUBJECTS).is_file():
        raise UserError(f"{path} holds no records", ALLOWED, "check the path")
    runs = [(path / row["run"]).resolve() for row in read_json(path / SUBJECTS)["subjects"]]
    found = []
    for folder in sorted({run.parent for run in runs}):
        keys = {run.name.rpartition("-")[2] for run in runs}
        for job in sorted(folder.glob("probe-*")):
            needs = read_json(job / SPECIFICATION)["needs"] if (job / SPECIFICATION).is_file() else []
            if any(key[:16] in keys for key in needs) and (job / RECORDS).is_file():
                found.append((job / RECORDS, _fingerprint(job)))
    return found


def _fingerprint(job: Path) -> str | None:
    return str(read_json(job / DONE)["result"]["fingerprint"]) if (job / DONE).is_file() else None
