"""Claims about loading: a run's folder alone gives the subject back, and what is named wrongly is answered by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Sampling
from longspan.engines.loading import load
from longspan.engines.native import NativeEngine
from longspan.engines.run_index import ListedRun, list_runs, parse_selectors
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import write_json
from longspan.models.interchange import write_folder
from longspan.models.language_model import LanguageModel

MakeModel = Callable[..., LanguageModel]
MakeEngine = Callable[..., NativeEngine]
WriteRun = Callable[..., Path]
TOKENS = np.arange(40) * 7 % 250


def test_a_run_answers_as_the_model_that_was_trained(
    tmp_path: Path, tiny_model: MakeModel, tiny_engine: MakeEngine, write_run: WriteRun
) -> None:
    best, last = tiny_model("AM"), tiny_model("AM", seed=1)
    folder = write_run(tmp_path / "run", best, last, markers=False, isolation="state")
    for weights, model in (("best", best), ("last", last)):
        engine = load(folder, weights=weights)  # type: ignore[arg-type]
        np.testing.assert_array_equal(engine.nll([TOKENS])[0], tiny_engine(model).nll([TOKENS])[0])
        assert engine.document_prefix.tolist() == []
        assert engine.isolation == "state"
        assert engine.trained_context == 48
        assert engine.context_limit is None
        assert engine.name == "AM seed 0"
    assert load(folder).fingerprint != load(folder, weights="last").fingerprint


def test_a_run_can_be_taken_elsewhere(tmp_path: Path, tiny_model: MakeModel, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "here" / "run", tiny_model("G"))
    before = load(folder)
    shutil.move(folder, tmp_path / "there")
    after = load(tmp_path / "there")
    assert after.fingerprint == before.fingerprint
    np.testing.assert_array_equal(after.nll([TOKENS])[0], before.nll([TOKENS])[0])
    with pytest.raises(UserError, match="is not there"):
        load(folder)


def test_a_mixer_of_the_users_own_comes_with_the_run(
    tmp_path: Path, tiny_model: MakeModel, write_run: WriteRun
) -> None:
    plugin = tmp_path / "own.py"
    plugin.write_text("LOADED = []\n")
    folder = write_run(tmp_path / "run", tiny_model("A"), plugins=[plugin])
    plugin.write_text("raise RuntimeError('changed since')\n")
    load(folder)
    (copied,) = (folder / "plugins").iterdir()
    assert copied.read_text() == "LOADED = []\n"


def test_a_study_names_its_runs_by_what_it_varies(tmp_path: Path, tiny_model: MakeModel, write_run: WriteRun) -> None:
    study = tmp_path / "runs" / "mine"
    listed = []
    for pattern in ("AM", "MM"):
        for seed in (0, 1):
            folder = write_run(tmp_path / "runs" / "jobs" / f"train-{pattern}{seed}", tiny_model(pattern, seed=seed))
            listed.append(ListedRun(pattern, {"pattern": pattern, "markers": "no markers"}, seed, folder))
    list_runs(study, listed)
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    study = tmp_path / "moved" / "mine"
    wanted = load(tmp_path / "moved" / "jobs" / "train-MM1").fingerprint
    assert load(study, select={"pattern": "MM", "seed": 1}).fingerprint == wanted
    assert load(study, select=parse_selectors(["model.pattern=MM", "seed=1", "markers=false"])).fingerprint == wanted
    for select, problem in (
        ({"pattern": "MM"}, r"2 of 4 subjects .* \(pattern=MM\)\n.*pattern=MM markers=no markers seed=0; "),
        ({}, r"4 of 4 subjects .* \(nothing selected\)"),
        ({"pattern": "AA"}, "0 of 4 subjects"),
        ({"markers": True}, "0 of 4 subjects"),
        ({"patern": "AM"}, "selector `patern`"),
    ):
        with pytest.raises(UserError, match=problem):
            load(study, select=select)
    with pytest.raises(UserError, match="KEY=VALUE"):
        parse_selectors(["pattern"])
    # As the overrides of a study need it, quotes and all, and as it is shown.
    for word in ('pattern="[AM]2"', "pattern='[AM]2'", "pattern=[AM]2"):
        assert parse_selectors([word]) == {"pattern": "[AM]2"}


def test_best_weights_are_known_at_the_end_only(tmp_path: Path, tiny_model: MakeModel, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", tiny_model("A"))
    (folder / "training" / "result.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        load(folder)
    assert load(folder, weights="last").name == "A seed 0"
    shutil.rmtree(folder / "training" / "checkpoints")
    with pytest.raises(UserError, match="holds no model"):
        load(folder, weights="last")


def test_what_has_no_meaning_is_refused(tmp_path: Path, tiny_model: MakeModel, write_run: WriteRun) -> None:
    folder = write_run(tmp_path / "run", tiny_model("A"))
    with pytest.raises(UserError, match="revision"):
        load(folder, revision="main")
    with pytest.raises(UserError, match="selectors pattern=A"):
        load(folder, select={"pattern": "A"})
    with pytest.raises(UserError, match="weights = 'middle'"):
        load(folder, weights="middle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fp16"):
        load(folder, dtype="fp16")  # type: ignore[arg-type]
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="tokenizer"):
        load(folder)


@pytest.mark.parametrize(
    ("pattern", "settings"), [("AM", {"mlp": "swiglu"}), ("A", {"mlp": "swiglu"}), ("MM", {}), ("mm", {})]
)
@pytest.mark.parametrize("markers", [True, False])
def test_hugging_face_weights_answer_as_the_model_that_was_written(
    pattern: str,
    settings: dict[str, str],
    markers: bool,
    tmp_path: Path,
    tiny_model: MakeModel,
    tiny_engine: MakeEngine,
    tokenizer: Tokenizer,
) -> None:
    model = tiny_model(pattern, **settings)
    write_folder(model, tmp_path / "weights", context=96, tokenizer=tokenizer, markers=markers)
    engine, ours = load(tmp_path / "weights"), tiny_engine(model, markers=markers)
    np.testing.assert_allclose(engine.nll([TOKENS])[0], ours.nll([TOKENS])[0], atol=1e-5)
    text = "The senate asks, in one <|endoftext|> word: ünï 🙂"
    assert engine.tokenizer.encode(text).tolist() == tokenizer.encode(text).tolist()
    assert engine.document_prefix.tolist() == ours.document_prefix.tolist()
    assert engine.tokenizer.special.boundary == tokenizer.special.boundary
    assert engine.end_tokens == {tokenizer.special.boundary}
    assert engine.trained_context == 96
    wanted = Sampling(max_new_tokens=9)
    (written,), (expected,) = engine.generate([TOKENS], wanted), ours.generate([TOKENS], wanted)
    assert written.tokens.tolist() == expected.tokens.tolist()
    assert load(tmp_path / "weights", dtype="bf16").fingerprint != engine.fingerprint


def test_generation_ends_where_a_foreign_model_ends_a_text(
    tmp_path: Path, tiny_model: MakeModel, tokenizer: Tokenizer
) -> None:
    write_folder(tiny_model("MM"), tmp_path / "weights", context=96, tokenizer=tokenizer)
    (whole,) = load(tmp_path / "weights").generate([TOKENS], Sampling(max_new_tokens=9))
    end = int(whole.tokens[4])
    write_json(tmp_path / "weights" / "generation_config.json", {"eos_token_id": [268, end]})
    (ended,) = load(tmp_path / "weights").generate([TOKENS], Sampling(max_new_tokens=9))
    assert ended.finish_reason == "stop"
    assert ended.tokens.tolist() == whole.tokens[: whole.tokens.tolist().index(end)].tolist()
    (timed,) = load(tmp_path / "weights").generate([TOKENS], Sampling(max_new_tokens=9, stop_at_boundary=False))
    assert timed.tokens.tolist() == whole.tokens.tolist()


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(("content", "words"), [("{", "is not readable JSON"), ("[]", "holds list")])
def test_a_damaged_file_of_others_is_to_be_fetched_again_not_removed_with_its_folder(
    name: str, content: str, words: str, tmp_path: Path, tiny_model: MakeModel, tokenizer: Tokenizer
) -> None:
    write_folder(tiny_model("MM"), tmp_path / "weights", context=96, tokenizer=tokenizer)
    (tmp_path / "weights" / name).write_text(content)
    with pytest.raises(DataError, match=rf"{name} {words}") as refused:
        load(tmp_path / "weights")
    assert refused.value.fix == "fetch it again"


def test_what_is_not_there_is_answered_with_the_nearest_name(
    tmp_path: Path, tiny_model: MakeModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tiny_model("MM"), tmp_path / "weights", context=96, tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"did you mean `.*/weights`"):
        load(tmp_path / "weihgts")
    with pytest.raises(UserError, match=r"holds no subject\.json, subjects\.json or config\.json"):
        load(tmp_path)
    with pytest.raises(UserError, match="weights 'last'"):
        load(tmp_path / "weights", weights="last")
    with pytest.raises(UserError, match="fp16"):
        load(tmp_path / "weights", dtype="fp16")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="device = 'tpu'"):
        load(tmp_path / "weights", device="tpu")
    with pytest.raises(UserError, match="cannot be fetched from the hub"):
        load("nobody/nothing-of-this-name")
