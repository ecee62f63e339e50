from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.foundation.errors import DataError
from longspan.report.data import ReportInput, from_json, load, save, to_json


def test_a_report_survives_json_unchanged(quickstart_report: ReportInput, tmp_path: Path) -> None:
    save(quickstart_report, tmp_path / "facts.json")
    assert load(tmp_path / "facts.json") == quickstart_report


def test_numbers_that_are_not_finite_become_null_and_come_back_as_nan(quickstart_report: ReportInput) -> None:
    section = quickstart_report.probes[0]
    first = replace(section.summary.measurements[0], value=math.nan, low=None, high=math.inf)
    summary = replace(section.summary, measurements=(first,))
    report = replace(quickstart_report, probes=[replace(section, summary=summary)])
    text = json.dumps(to_json(report), allow_nan=False)
    back = from_json(json.loads(text)).probes[0].summary.measurements[0]
    assert math.isnan(back.value)
    assert back.low is None
    assert back.high is None


def test_damaged_facts_are_refused(quickstart_report: ReportInput) -> None:
    data = to_json(quickstart_report)
    data["subjects"][0]["unknown"] = 1
    with pytest.raises(DataError, match="SubjectFacts has no unknown"):
        from_json(data)
    with pytest.raises(DataError):
        from_json({"study": "x"})
