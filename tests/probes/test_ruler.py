"""RULER: thirteen tasks whose texts hold what is asked, as long as asked, scored as published."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.foundation.errors import DataError, UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import Probe, ProbeData, make_probe
from longspan.probes.ruler.questions import questions_of
from longspan.probes.ruler.tasks import NOISE, TASKS, Question, Sources, effective_length, scored, weighted_average
from longspan.probes.ruler.words import ADJECTIVES, NOUNS, joined, keys, numbers, uuids

Ask = Callable[..., list[Any]]
ESSAY = [
    f"The {a} thing near the {n} was seen on day {day}."
    for day, (a, n) in enumerate(zip(ADJECTIVES, NOUNS, strict=False))
]
WORDS = sorted({*ADJECTIVES, *NOUNS})
QUESTIONS = [
    Question(f"Who wrote book {n}?", (f"Writer {n}", f"W. {n}"), (f"Book {n} was written by Writer {n}.",))
    for n in range(30)
]
SOURCES = Sources(ESSAY, WORDS, {"qa_1": QUESTIONS, "qa_2": QUESTIONS})


def example(task: str, units: int = 60, length: int = 2000, number: int = 0) -> Any:
    return TASKS[task].build(units, length, number, numpy_generator(0, task, number), SOURCES)


# --- the texts --------------------------------------------------------------------------------------------------------


def test_there_are_thirteen_tasks_with_the_published_budgets() -> None:
    assert len(TASKS) == 13
    budgets = {name: task.new_tokens for name, task in TASKS.items()}
    assert [budgets[name] for name in ("niah_single_1", "vt", "cwe", "fwe", "qa_1")] == [128, 30, 120, 50, 32]


@pytest.mark.parametrize(
    ("task", "outputs", "pattern"),
    [
        ("niah_single_1", 1, r"\d{7}"),
        ("niah_single_2", 1, r"\d{7}"),
        ("niah_single_3", 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multikey_1", 1, r"\d{7}"),
        ("niah_multikey_2", 1, r"\d{7}"),
        ("niah_multikey_3", 1, r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"),
        ("niah_multivalue", 4, r"\d{7}"),
        ("niah_multiquery", 4, r"\d{7}"),
    ],
)
def test_needles_are_in_the_text_once_and_are_what_is_asked(task: str, outputs: int, pattern: str) -> None:
    made = example(task)
    assert len(set(made.outputs)) == outputs
    for value in made.outputs:
        assert re.fullmatch(pattern, value)
        (needle,) = re.findall(rf"One of the special magic (?:numbers|uuids) for (\S+) is: {value}\.", made.prompt)
        assert needle in made.prompt.rsplit("\nWhat ", 1)[1]
        assert needle in made.answer_prefix
        assert value not in made.answer_prefix


def test_the_wording_is_singular_for_one_value_and_plural_for_several() -> None:
    one, many = example("niah_single_2"), example("niah_multivalue")
    assert one.prompt.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it."
    )
    assert re.search(r"\nWhat is the special magic number for \S+ mentioned in the provided text\?$", one.prompt)
    assert re.fullmatch(r" The special magic number for \S+ mentioned in the provided text is", one.answer_prefix)
    assert many.prompt.startswith("Some special magic numbers are hidden within the following text.")
    assert many.answer_prefix.endswith(" mentioned in the provided text are")
    assert joined(["a", "b", "c"]) == "a, b, and c"


def test_other_keys_are_there_to_mislead() -> None:
    assert len(set(re.findall(r"for (\S+) is:", example("niah_multikey_1").prompt))) == 4
    haystack = re.findall(r"for (\S+) is:", example("niah_multikey_2", units=50).prompt)
    assert len(haystack) == len(set(haystack)) == 51
    assert NOISE not in example("niah_multikey_2").prompt
    assert example("niah_single_1", units=50).prompt.count(NOISE) == 50


def test_needles_stand_at_the_same_depth_whatever_the_size() -> None:
    depths = []
    for units in (100, 1000):
        prompt = example("niah_single_2", units).prompt
        depths.append(prompt.index("One of the special magic") / len(prompt))
    assert depths[0] == pytest.approx(depths[1], abs=0.05)


def test_variables_form_one_chain_of_four_hops_after_an_example() -> None:
    made = example("vt")
    shown, asked = made.prompt.split("\n\nMemorize", 1)
    assert "they are: " in shown
    chain = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\S+)", asked)
    assert [name for name, _ in chain] == list(made.outputs)
    assert [value for _, value in chain][1:] == list(made.outputs)[:-1]
    assert f"assigned the value {chain[0][1]} in the text" in asked
    assert "5 variables are assigned the value" in made.answer_prefix


@pytest.mark.parametrize(("length", "often", "seldom"), [(2000, 6, 1), (8192, 30, 3)])
def test_common_words_are_ten_and_as_common_as_published(length: int, often: int, seldom: int) -> None:
    made = example("cwe", 80, length)
    asked = made.prompt.rsplit("most often.\n", 1)[1].split("\nQuestion")[0]
    counts = Counter(re.findall(r"\d+\. (\S+)", asked))
    assert {counts[word] for word in made.outputs} == {often}
    assert {count for word, count in counts.items() if word not in made.outputs} == {seldom}
    assert len(counts) == 90
    # The example before it shows other words.
    shown = set(re.findall(r"\d+\. (\S+)", made.prompt.rsplit("most often.\n", 1)[0]))
    assert not shown & set(counts)


def test_a_haystack_with_too_few_words_is_refused() -> None:
    with pytest.raises(UserError, match="different words"):
        example("cwe", len(WORDS))


def test_frequent_words_follow_the_zeta_law_and_dots_come_first() -> None:
    made = example("fwe", 2000, 2000)
    text = made.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0].split()
    counts = Counter(text)
    ranked = [word for word, _ in counts.most_common(4)]
    assert ranked == ["...", *made.outputs]
    assert counts["..."] / counts[made.outputs[0]] == pytest.approx(4, rel=0.05)
    assert all(re.fullmatch("[a-z]{6}", word) for word in made.outputs)


def test_a_question_has_its_document_among_others() -> None:
    made = example("qa_1", 12, number=7)
    assert made.prompt.endswith("Question: Who wrote book 7?")
    assert made.outputs == ("Writer 7", "W. 7")
    assert made.prompt.count("Book 7 was written by") == 1
    assert re.findall(r"Document (\d+):", made.prompt) == [str(n) for n in range(1, 13)]


def test_keys_and_values_are_different_and_the_same_for_the_same_seed() -> None:
    assert len(set(ADJECTIVES)) == len(ADJECTIVES)
    assert len(set(NOUNS)) == len(NOUNS)
    assert len(set(keys(20_000, np.random.default_rng(0)))) == 20_000
    assert len(set(numbers(500, np.random.default_rng(0)))) == 500
    assert len(set(uuids(500, np.random.default_rng(0)))) == 500
    assert example("niah_multiquery") == example("niah_multiquery")
    assert example("niah_multiquery") != example("niah_multiquery", number=1)


# --- scores -----------------------------------------------------------------------------------------------------------


def test_all_strings_count_in_shares_and_any_is_enough_for_questions() -> None:
    assert scored("1234567 and 7654321", ("1234567", "7654321", "1111111", "2222222"), "niah_multivalue") == 0.5
    assert scored("it was WRITER 7", ("writer 7", "W. 7"), "qa_1") == 1.0
    assert scored("", ("1",), "niah_single_1") == 0.0


def test_the_published_row_gives_the_published_summary() -> None:
    llama = dict(
        zip((4096, 8192, 16384, 32768, 65536, 131072), (0.955, 0.938, 0.916, 0.874, 0.847, 0.770), strict=True)
    )
    assert effective_length({float(k): v for k, v in llama.items()}) == 32768
    assert np.mean(list(llama.values())) == pytest.approx(0.883, abs=5e-4)
    assert weighted_average({1.0: 1.0, 2.0: 0.0}, increasing=True) == pytest.approx(1 / 3)
    assert weighted_average({1.0: 1.0, 2.0: 0.0}, increasing=False) == pytest.approx(2 / 3)
    assert effective_length({1.0: 0.5, 2.0: 0.9}) is None


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("ruler")
    (folder / "essay.txt").write_text("\n".join(ESSAY), encoding="utf-8")
    squad = [
        {
            "paragraphs": [
                {"context": q.documents[0], "qas": [{"question": q.query, "answers": [{"text": a} for a in q.answers]}]}
            ]
        }
        for q in QUESTIONS
    ]
    (folder / "squad.json").write_text(json.dumps({"data": squad}), encoding="utf-8")
    hotpot = [
        {"question": q.query, "answer": q.answers[0], "context": [[f"Book {n}", [q.documents[0], " It is long."]]]}
        for n, q in enumerate(QUESTIONS)
    ]
    (folder / "hotpot.json").write_text(json.dumps(hotpot), encoding="utf-8")
    return {
        "haystack": str(folder / "essay.txt"),
        "squad": str(folder / "squad.json"),
        "hotpotqa": str(folder / "hotpot.json"),
    }


@pytest.fixture
def probe(files: dict[str, str]) -> Callable[..., Probe]:
    return lambda **settings: make_probe("ruler", {**files, "samples": 1, **settings})


@pytest.mark.parametrize("length", [2500, 5000])
def test_every_request_is_as_long_as_asked_and_never_longer(
    length: int, probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    tasks = [name for name in TASKS if name not in ("cwe", "qa_1", "qa_2")]
    records = ask(probe(lengths=[length], tasks=tasks), writing(lambda prompt: ""), data)
    for record in records:
        answer = record.answer
        used = answer["prompt_tokens"] + TASKS[answer["task"]].new_tokens
        # One more sentence, needle or line would be too long; a line is at most 110 tokens of this tokenizer.
        assert length - 115 <= used <= length, answer["task"]


def test_all_thirteen_tasks_are_asked_and_a_subject_that_repeats_its_prompt_gets_needles_right(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(lengths=[4000])
    records = ask(asked, writing(lambda prompt: prompt), data)
    assert {record.answer["task"] for record in records} == set(TASKS)
    assert all(record.answer["answer_prefix_mode"] == "prefill" for record in records)
    _, summary = read(asked, records)
    assert {found.metric: found.value for found in summary.measurements}["score"] == 1.0
    assert "13 of 13 tasks" in asked.remarks(summary)[0]
    assert "effective length (85.6 %) 4,000" in asked.remarks(summary)[0]
    assert asked.reply(records[0]).null == ""


def test_a_number_of_some_tasks_says_so_and_counts_only_those_that_could_be_asked(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    # The shortest text of `cwe` is longer than this.
    asked = probe(lengths=[1500], tasks=["niah_single_1", "fwe", "cwe"])
    records = ask(asked, writing(lambda prompt: " "), data)
    assert {record.answer["task"] for record in records if "not_evaluable" in record.answer} == {"cwe"}
    (remark,) = asked.remarks(read(asked, records)[1])
    assert "effective length (85.6 %) none of these lengths" in remark
    assert "only 2 of 13 tasks were asked, and the threshold is for all" in remark
    assert {asked.reply(record).null for record in records} == {"", "empty"}


def test_byte_matched_texts_are_the_same_for_every_subject(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    asked = probe(lengths=[6000], unit="bytes", tasks=["niah_single_2", "vt"])
    first, second = writing(lambda prompt: ""), writing(lambda prompt: "")
    second.encode_prompt = lambda text, answer_prefix="": np.arange(len(text) // 7) % 200
    one, two = (ask(asked, engine, data) for engine in (first, second))
    for a, b in zip(one, two, strict=True):
        assert a.answer["prompt_bytes"] == b.answer["prompt_bytes"]
        assert 5800 < a.answer["prompt_bytes"] <= 6000
        assert a.answer["outputs"] == b.answer["outputs"]
        assert a.answer["prompt_tokens"] != b.answer["prompt_tokens"]


def test_what_does_not_fit_is_left_out(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask, read: Callable[..., Any]
) -> None:
    asked = probe(lengths=[150, 2000], tasks=["niah_single_1"])
    records = ask(asked, writing(lambda prompt: "", limit=1000), data)
    assert [record.answer["not_evaluable"] for record in records] == [
        "no text of niah_single_1 is short enough",
        "the subject takes 1000 tokens",
    ]
    assert read(asked, records)[0] == []


def test_an_engine_that_cannot_begin_an_answer_is_told_apart_in_every_record(
    probe: Callable[..., Probe], data: ProbeData, writing: Callable[..., Any], ask: Ask
) -> None:
    engine = writing(lambda prompt: "")
    engine.answer_prefix_mode = "in prompt"
    records = ask(probe(lengths=[2000], tasks=["niah_single_1"]), engine, data)
    assert records[0].answer["answer_prefix_mode"] == "in prompt"


def test_without_a_haystack_the_test_split_is_one(data: ProbeData, writing: Callable[..., Any], ask: Ask) -> None:
    asked = make_probe("ruler", {"lengths": [1500], "tasks": ["niah_single_2"], "samples": 1})
    engine = writing(lambda prompt: "")
    ask(asked, engine, data)
    assert "senate" in engine.tokenizer.decode(engine.prompts[0])


def test_questions_without_their_file_and_unknown_tasks_are_refused(data: ProbeData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="task qa_1 without `squad`"):
        make_probe("ruler", {"tasks": ["qa_1"]}).items(data)
    with pytest.raises(UserError, match=r"tasks = \[niah\]"):
        make_probe("ruler", {"tasks": ["niah"]})
    (tmp_path / "none.json").write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match="holds no questions"):
        questions_of(tmp_path / "none.json")


def test_questions_are_read_in_the_published_forms(files: dict[str, str]) -> None:
    squad, hotpot = questions_of(Path(files["squad"])), questions_of(Path(files["hotpotqa"]))
    assert squad[3] == QUESTIONS[3]
    assert hotpot[3].documents == ("Book 3\nBook 3 was written by Writer 3. It is long.",)
