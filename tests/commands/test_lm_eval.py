"""`longspan lm-eval` as a person uses it: the harness's own command line, with the model `longspan` in it."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from longspan.foundation.errors import UserError

Longspan = Callable[..., int]
Capture = pytest.CaptureFixture[str]

TASK = """
task: pages
dataset_path: json
dataset_kwargs: {data_files: {test: PAGES}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: bits_per_byte}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    # Reading the thousands of tasks that come with the harness takes longer than all else here.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    # Its log goes to the stderr of the first test for ever otherwise.
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)
    monkeypatch.setattr(logging.getLogger("lm_eval"), "handlers", [])
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"page": f"The senate asks the other house {n} times. " * 5} for n in range(4)]
    (folder / "pages.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pages.yaml").write_text(TASK.replace("PAGES", str(folder / "pages.jsonl")))
    return folder


def test_a_subject_of_a_study_goes_through_the_harness(
    study: Path, tasks: Path, longspan: Longspan, capsys: Capture, tmp_path: Path
) -> None:
    subject = f"pretrained={study},pattern=AMG,seed=0,max_length=40"
    words = ("--model", "longspan", "--model_args", subject, "--tasks", "pages", "--include_path", str(tasks))
    assert longspan("lm-eval", *words, "--output_path", str(tmp_path / "out"), "-s") == 0
    assert "|bits_per_byte" in capsys.readouterr().out
    (results,) = (tmp_path / "out").rglob("results_*.json")
    written = json.loads(results.read_text())
    assert 4 < written["results"]["pages"]["bits_per_byte,none"] < 6
    assert written["config"]["max_length"] == 40
    assert written["config"]["model_mixers"] == "1 attention, 1 mamba2, 1 gru"
    # The samples that it logged are records from then on.
    (samples,) = (tmp_path / "out").rglob("samples_pages_*.jsonl")
    run = str(tmp_path / "imported")
    assert longspan("import", str(samples), "--format", "lm-eval", "--to", run, "--subject", "AMG") == 0
    capsys.readouterr()
    assert longspan("rescore", run, "--json") == 0
    ((measured,),) = [result["measurements"] for result in json.loads(capsys.readouterr().out)["results"]]
    assert measured["metric"] == "bits_per_byte"
    assert measured["items"] == 4
    assert measured["value"] / math.log(2) == pytest.approx(written["results"]["pages"]["bits_per_byte,none"])


def test_wrong_model_arguments_are_answered_in_our_words(
    study: Path, tasks: Path, longspan: Longspan, capsys: Capture
) -> None:
    subject = f"pretrained={study},pattern=AMG,max_lenght=9"
    words = ("--model", "longspan", "--model_args", subject, "--tasks", "pages", "--include_path", str(tasks))
    assert longspan("lm-eval", *words) == 2
    shown = capsys.readouterr().err
    assert "did you mean `max_length`?" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("pretrained=STUDY", "pattern=MM seed=0"),
        ("pretrained=STUDY,pattern=AMG,sed=0", "selector `sed`"),
        ("pretrained=STUDY,pattern=A,max_length=49", "1 to 48"),
        ("pretrained=nowhere", "nowhere is not there"),
    ],
)
def test_what_model_arguments_name_must_be_there(study: Path, arguments: str, said: str) -> None:
    pytest.importorskip("lm_eval")
    from longspan.engines.lm_eval import LongspanLM

    with pytest.raises(UserError, match=said):
        LongspanLM.create_from_arg_string(arguments.replace("STUDY", str(study)))


def test_what_the_harness_says_itself_stays_its_own(tasks: Path, longspan: Longspan, capsys: Capture) -> None:
    assert longspan("lm-eval", "run", "--help") == 0
    assert "--include_path" in capsys.readouterr().out
    assert longspan("lm-eval", "run", "--no-such-option") == 2
    assert longspan("lm-eval", "--model", "longspan", "--tasks", "no_such_task", "--include_path", str(tasks)) == 1
    assert "ValueError: Tasks not found" in capsys.readouterr().err


def test_without_the_harness_the_extra_is_named(
    longspan: Longspan, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval" or name == "longspan.engines.lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert longspan("lm-eval", "--model", "longspan") == 2
    assert "pip install 'longspan[lm-eval]'" in capsys.readouterr().err
