"""The thirteen tasks of RULER: a text of any length, a question, the beginning of the answer, and what is right.

The wording of the prompts is part of the protocol and is RULER's (NVIDIA/RULER, `scripts/data/synthetic/constants.py`,
Apache-2.0); the generators are written from their description (Hsieh et al. 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from scipy.special import zeta

from longspan.foundation.errors import UserError
from longspan.probes.ruler.words import coded, joined, keys, numbers, uuids

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
DEPTHS = np.round(np.linspace(0, 100, 40)).astype(int)
_MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text is",
)
_VARIABLES = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, {count} variables are assigned the "
    "value {query}, they are: ",
)
_COMMON = (
    "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
    "appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
_FREQUENT = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. {context}\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
    "three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
_DOCUMENTS = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only give me "
    "the answer and do not output any other words.\n\nQuestion: {query}",
    " Answer:",
)
SHORT = 4096
"""Below so many tokens the lists of common words have fewer repetitions, as upstream has them."""


@dataclass(frozen=True)
class Question:
    """One of `qa_1` or `qa_2`: what is asked, what is right, and the documents that hold it."""

    query: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


@dataclass(frozen=True)
class Sources:
    """What texts are made of.

    Attributes:
        sentences: of essays, in order; repeated where a text needs more.
        words: different words of a language, for `cwe`.
        questions: task → questions, for `qa_1` and `qa_2`; others' documents are the distractors.
    """

    sentences: Sequence[str]
    words: Sequence[str]
    questions: Mapping[str, Sequence[Question]]


@dataclass(frozen=True)
class Example:
    """A text with its question.

    Attributes:
        prompt: the user's message.
        answer_prefix: how the answer begins.
        outputs: what is right.
    """

    prompt: str
    answer_prefix: str
    outputs: tuple[str, ...]


Build = Callable[[int, int, int, np.random.Generator, Sources], Example]
"""(units, length, number, generator, sources) → example: `units` of filling, `length` in tokens of the whole request,
`number` of the item."""


@dataclass(frozen=True)
class Task:
    """How a task's examples are made.

    Attributes:
        build: see `Build`.
        new_tokens: of the answer.
        least: units of filling of the smallest text.
        any_of: one of the right answers is enough (all are wanted elsewhere).
    """

    build: Build
    new_tokens: int
    least: int = 4
    any_of: bool = False


# --- needles ----------------------------------------------------------------------------------------------------------


def _needles(
    units: int,
    length: int,
    number: int,
    generator: np.random.Generator,
    sources: Sources,
    *,
    haystack: Literal["noise", "essay", "needle"],
    key: Literal["words", "uuids"] = "words",
    value: Literal["numbers", "uuids"] = "numbers",
    num_keys: int = 1,
    num_values: int = 1,
    num_queries: int = 1,
) -> Example:
    num_keys = max(num_keys, num_queries)
    make_keys = keys if key == "words" else uuids
    make_values = numbers if value == "numbers" else uuids
    filling = units if haystack == "needle" else 0
    all_keys = make_keys(num_keys + filling, generator)
    all_values = make_values(num_keys * num_values + filling, generator)
    values = [all_values[n * num_values : (n + 1) * num_values] for n in range(num_keys)]
    needles = [
        NEEDLE.format(kind=value, key=name, value=each)
        for name, some in zip(all_keys[:num_keys], values, strict=True)
        for each in some
    ]
    generator.shuffle(needles)
    if haystack == "essay":
        context = _at_depths([sources.sentences[n % len(sources.sentences)] for n in range(units)], needles, generator)
    else:
        lines = [NOISE] * units
        if haystack == "needle":
            pairs = zip(all_keys[num_keys:], all_values[num_keys * num_values :], strict=True)
            lines = [NEEDLE.format(kind=value, key=name, value=each) for name, each in pairs]
        context = "\n".join(_among(lines, needles, generator))
    asked = generator.permutation(num_keys)[:num_queries].tolist()
    outputs = tuple(each for n in asked for each in values[n])
    template, prefix = _MANY if len(outputs) > 1 else _ONE
    kind = value if len(outputs) > 1 else value[:-1]
    query = joined([all_keys[n] for n in asked])
    prompt = template.format(kind=kind, context=context, query=query)
    return Example(prompt, prefix.format(kind=kind, query=query), outputs)


def _at_depths(sentences: list[str], needles: Sequence[str], generator: np.random.Generator) -> str:
    """Needles between sentences, at depths drawn from 40 equally spaced ones."""
    depths = np.sort(generator.choice(DEPTHS, size=len(needles), replace=False))
    places = [int(len(sentences) * depth / 100) for depth in depths.tolist()]
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(place, needle)
    return " ".join(sentences)


def _among(lines: list[str], needles: Sequence[str], generator: np.random.Generator) -> list[str]:
    """Needles in order at random lines."""
    places = np.sort(generator.choice(len(lines) + 1, size=len(needles), replace=len(needles) > len(lines)))
    for place, needle in reversed(list(zip(places.tolist(), needles, strict=True))):
        lines.insert(place, needle)
    return lines


# --- variables --------------------------------------------------------------------------------------------------------

HOPS = 4
_EXAMPLE_LINES = 12
"""Of noise in the one example that is shown first; about 500 tokens with it, as upstream's."""


def _variables(units: int, length: int, number: int, generator: np.random.Generator, sources: Sources) -> Example:
    shown = _chain(_EXAMPLE_LINES, 3, generator)
    asked = _chain(units, 5, generator)
    prompt = f"{shown.prompt}{shown.answer_prefix}{' '.join(shown.outputs)}\n\n{asked.prompt}"
    return Example(prompt, asked.answer_prefix, asked.outputs)


def _chain(units: int, letters: int, generator: np.random.Generator) -> Example:
    names = [word.upper() for word in coded(HOPS + 1, letters, generator)]
    value = str(int(generator.integers(10_000, 100_000)))
    chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]
    context = "\n".join(_among([NOISE] * units, chain, generator))
    prefix = _VARIABLES[1].format(count=len(names), query=value)
    return Example(_VARIABLES[0].format(context=context, query=value), prefix, tuple(names))


# --- words ------------------------------------------------------------------------------------------------------------

COMMON_WORDS = 10


def _common(units: int, length: int, number: int, generator: np.random.Generator, sources: Sources) -> Example:
    often, seldom = (30, 3) if length >= SHORT else (6, 1)
    shown_words, shown_often, shown_seldom = (40, 10, 3) if length >= SHORT else (20, 3, 1)
    wanted = units + shown_words + COMMON_WORDS
    if wanted > len(sources.words):
        raise UserError(
            f"cwe at {length} tokens needs {wanted} different words, and the haystack has {len(sources.words)}",
            "a haystack with more of them",
            "name a longer text with `haystack: FILE`, or leave `cwe` out of `tasks`",
        )
    drawn = [sources.words[n] for n in generator.permutation(len(sources.words))[:wanted].tolist()]
    shown = _numbered(drawn[:shown_words], shown_often, shown_seldom, generator)
    asked = _numbered(drawn[shown_words:], often, seldom, generator)
    listed = " ".join(f"{n}. {word}" for n, word in enumerate(shown.outputs, start=1))
    return Example(f"{shown.prompt}{shown.answer_prefix} {listed}\n{asked.prompt}", asked.answer_prefix, asked.outputs)


def _numbered(words: Sequence[str], often: int, seldom: int, generator: np.random.Generator) -> Example:
    common, others = words[:COMMON_WORDS], words[COMMON_WORDS:]
    listed = [*(word for word in common for _ in range(often)), *(word for word in others for _ in range(seldom))]
    order = generator.permutation(len(listed)).tolist()
    context = " ".join(f"{n}. {listed[place]}" for n, place in enumerate(order, start=1))
    return Example(_COMMON[0].format(context=context), _COMMON[1], tuple(common))


ALPHA = 2.0
DOTS = "..."


def _frequent(units: int, length: int, number: int, generator: np.random.Generator, sources: Sources) -> Example:
    words = [DOTS, *coded(max(4, length // 50) - 1, 6, generator)]
    ranks = np.arange(1, len(words) + 1)
    counts = (units * ranks**-ALPHA / zeta(ALPHA)).astype(int)
    # The three that are asked for must be told apart even in a short text.
    counts[1:4] = np.maximum(counts[1:4], (4, 3, 2))
    text = [word for word, count in zip(words, counts.tolist(), strict=True) for _ in range(count)]
    context = " ".join(text[place] for place in generator.permutation(len(text)).tolist())
    return Example(_FREQUENT[0].format(context=context), _FREQUENT[1], tuple(words[1:4]))


# --- documents --------------------------------------------------------------------------------------------------------


def _documents(
    units: int, length: int, number: int, generator: np.random.Generator, sources: Sources, *, task: str
) -> Example:
    questions = sources.questions[task]
    asked = questions[number % len(questions)]
    kept = list(asked.documents)
    own = set(kept)
    others = list(dict.fromkeys(text for each in questions for text in each.documents if text not in own))
    wanted = max(0, units - len(kept))
    # A text longer than all documents together repeats them, as upstream's does.
    rounds = [generator.permutation(len(others)).tolist() for _ in range(-(-wanted // max(1, len(others))))]
    kept += [others[place] for each in rounds for place in each][:wanted]
    order = generator.permutation(len(kept)).tolist()
    context = "\n\n".join(f"Document {n}:\n{kept[place]}" for n, place in enumerate(order, start=1))
    prompt = _DOCUMENTS[0].format(context=context, query=asked.query)
    return Example(prompt, _DOCUMENTS[1], asked.answers)


TASKS: Mapping[str, Task] = {
    "niah_single_1": Task(partial(_needles, haystack="noise"), 128),
    "niah_single_2": Task(partial(_needles, haystack="essay"), 128),
    "niah_single_3": Task(partial(_needles, haystack="essay", value="uuids"), 128),
    "niah_multikey_1": Task(partial(_needles, haystack="essay", num_keys=4), 128),
    "niah_multikey_2": Task(partial(_needles, haystack="needle"), 128),
    "niah_multikey_3": Task(partial(_needles, haystack="needle", key="uuids", value="uuids"), 128),
    "niah_multivalue": Task(partial(_needles, haystack="essay", num_values=4), 128),
    "niah_multiquery": Task(partial(_needles, haystack="essay", num_queries=4), 128),
    "vt": Task(_variables, 30),
    "cwe": Task(_common, 120, least=1),
    "fwe": Task(_frequent, 50, least=40),
    "qa_1": Task(partial(_documents, task="qa_1"), 32, least=1, any_of=True),
    "qa_2": Task(partial(_documents, task="qa_2"), 32, least=1, any_of=True),
}


def scored(response: str, outputs: Sequence[str], task: str) -> float:
    """Share of what is right that the answer contains (any of it, for questions), small and capital letters alike."""
    said = response.lower()
    found = [output.lower() in said for output in outputs]
    return float(any(found)) if TASKS[task].any_of else sum(found) / len(found)


def effective_length(scores: Mapping[float, float], threshold: float = 0.856) -> float | None:
    """The largest length whose score, and that of every shorter one, reaches the threshold (Llama-2-7B's at 4k)."""
    reached = None
    for length in sorted(scores):
        if scores[length] < threshold:
            break
        reached = length
    return reached


def weighted_average(scores: Mapping[float, float], *, increasing: bool) -> float:
    """Mean over lengths with weights 1, 2, 3, ... from the shortest (or from the longest) on."""
    ordered = [scores[length] for length in sorted(scores, reverse=not increasing)]
    weights = np.arange(1, len(ordered) + 1)
    return float((weights * np.array(ordered)).sum() / weights.sum())


def read_questions(rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Questions of rows `{question, answers, documents}`."""
    return [
        Question(str(row["question"]), tuple(map(str, row["answers"])), tuple(map(str, row["documents"])))
        for row in rows
        if row["answers"]
    ]
