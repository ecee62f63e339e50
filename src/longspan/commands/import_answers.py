"""`longspan import`: answers that were recorded elsewhere become records, to be scored and compared like our own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from longspan.commands.recorded_runs import DUPLICATES, keep
from longspan.foundation.errors import DataError, UserError
from longspan.probes import lm_eval_answers
from longspan.probes.longbench_v2.recorded import Imported, duplicates_line, origin_of, read_longbench, refused
from longspan.records.store import RECORDS, RecordStore
from longspan.terminal import print_json, print_table

FORMATS = {
    "longbench": "LongBench-v2's pred.py output, one .jsonl a model",
    "lm-eval": "samples_*.jsonl of lm_eval --log_samples",
    "ssm-experiment": "results/*.jsonl of the earlier project, whole or compact",
}


def import_answers(
    files: Sequence[Path],
    form: str,
    to: Path,
    *,
    subject: str | None,
    context: int | None,
    duplicates: str,
    json: bool,
) -> None:
    """Append the records made of the files to `to/records.jsonl`; what is there already is passed over.

    Raises:
        UserError: no such file, an unknown format or policy.
        DataError: a row that is not of the format, or an answer that contradicts one imported before.
    """
    if form not in FORMATS:
        shown = "; ".join(f"{name} ({what})" for name, what in FORMATS.items())
        raise UserError(f"--format {form}", shown, "name one of these")
    if duplicates not in DUPLICATES:
        raise UserError(f"--duplicates {duplicates}", ", ".join(DUPLICATES), "name one of these")
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    with RecordStore(to / RECORDS) as store:
        for file in files:
            found, who = _read(file.expanduser(), form, subject, context)
            kept = keep(found.records, duplicates)
            contradicted = refused(kept, {record.key: record for record in store})
            if contradicted is not None:
                raise DataError(
                    f"{file}: the answer to {contradicted.item} differs from the one imported before",
                    "one answer to an item of a subject and context in a run",
                    "give it another name with --subject, or import it into another folder",
                )
            added = store.append(kept)
            rows.append(
                {
                    "file": str(file),
                    "subject": who,
                    "rows": found.rows,
                    "duplicated_ids": len(found.duplicated),
                    "copies": sum(found.duplicated.values()) - len(found.duplicated),
                    "left_out": len(found.records) - len(kept),
                    "added": added,
                    "known": len(kept) - added,
                }
            )
            if line := duplicates_line(found.duplicated, found.rows):
                notes.append(f"{file.name}: {line}; policy `{duplicates}`: {DUPLICATES[duplicates]}")
            if found.reprompted:
                notes.append(f"{file.name}: {found.reprompted} replies include one to a second question")
            if found.disagreeing:
                notes.append(f"{file.name}: {found.disagreeing} stored predictions are not what their rule reads")
    if json:
        print_json({"run": str(to), "format": form, "duplicates": duplicates, "files": rows, "notes": notes})
        return
    columns = ("<file", "<subject", "rows", "duplicated ids", "left out", "added", "known before")
    names = ("file", "subject", "rows", "duplicated_ids", "left_out", "added", "known")
    print_table(columns, [[str(row[name]) for name in names] for row in rows])
    for note in notes:
        print(f"note: {note}")
    print(f"records: {to / RECORDS}")


def _read(file: Path, form: str, subject: str | None, context: int | None) -> tuple[Imported, str]:
    if file.is_dir():
        raise UserError(f"{file} is a folder", FORMATS[form], f"name the files in it, e.g. {file}/*.jsonl")
    if not file.is_file():
        raise UserError(f"{file} is not there", FORMATS[form], "check the path")
    if form == "lm-eval":
        who = subject or file.resolve().parent.name
        records, rows, duplicated = lm_eval_answers.read_samples(file, who)
        return Imported(records, rows, duplicated), who
    origin = origin_of(file)
    origin = replace(origin, subject=subject or origin.subject, context=context or origin.context)
    return read_longbench(file, form, origin), origin.subject  # type: ignore[arg-type]
