"""RULER: thirteen synthetic tasks at any length, measured in the subject's own tokens or in bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from longspan.engines.base import Engine, Sampling, Tokens
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import Asked, Item, Probe, ProbeData, Reply, failure_of, register
from longspan.probes.benchmark_files import file_digest, read_rows
from longspan.probes.ruler.questions import questions_of
from longspan.probes.ruler.tasks import TASKS, Example, Sources, effective_length, scored, weighted_average
from longspan.records.observation import Metric, Observation, Summary
from longspan.records.store import Record

WITHOUT_FILES = tuple(name for name in TASKS if not name.startswith("qa"))
TRIES = 12
LONGEST = 60
"""Words of a piece of a haystack."""
_WORD = re.compile(r"[a-z]{4,12}")


@register("ruler")
class Ruler(Probe):
    """Needles in haystacks, variables to be tracked, words to be counted, questions on many documents.

    A request (prompt, beginning of the answer and answer) has at most `lengths` tokens, in the tokens of the subject
    that is asked, so that texts differ between subjects; `unit: bytes` gives all the same text instead. The answer's
    beginning stands where the subject's answer stands; where an engine cannot do that, each record says so.

    Attributes:
        tasks: of the thirteen; None: all for which there are files.
        lengths: of requests; None: the context of the study.
        unit: of the lengths: `tokens` of the subject, or `bytes` of the prompt.
        samples: items of each task at each length.
        haystack: text, or JSON lines with `text`, for essays and words; None takes the study's test split.
        squad, hotpotqa: the files of `qa_1` and `qa_2`.
        temperature: 0 is greedy, as upstream has it.
    """

    title: ClassVar[str] = "RULER"
    explanation: ClassVar[str] = (
        "Synthetic tasks at growing length: needles, variables, word counts, questions. The score is the share of "
        "right strings that the answer contains (any one, for questions). Essays come from the text named in the "
        "study and not from upstream's, so numbers compare between subjects here, not with published ones."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"generate"})
    batch_tokens: ClassVar[int] = 131_072

    tasks: tuple[str, ...] | None = Field(None, min_length=1)
    lengths: tuple[int, ...] | None = Field(None, min_length=1)
    unit: Literal["tokens", "bytes"] = "tokens"
    samples: int = Field(20, ge=1)
    haystack: str | None = None
    squad: str | None = None
    hotpotqa: str | None = None
    temperature: float = Field(0.0, ge=0.0)

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for task in tasks or ():
            if task not in TASKS:
                raise UserError(f"tasks = [{task}]", ", ".join(TASKS), "name tasks of these")
        return tasks

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The mean over tasks, then each task."""
        return (
            Metric("score", "Score", "", "proportion", "higher", x_name="length"),
            Metric(
                "null_rate", "Empty answers", "", "proportion", "lower", x_name="length", compare=False, detail=True
            ),
            *(
                Metric(task, task, "", "proportion", "higher", x_name="length", compare=False, detail=True)
                for task in self._tasks()
            ),
        )

    def protocol(self) -> dict[str, Any]:
        """The settings, with the files' content in place of where they lie."""
        files = {"haystack": self.haystack, "squad": self.squad, "hotpotqa": self.hotpotqa}
        contents = {name: None if path is None else file_digest(Path(path)) for name, path in files.items()}
        return {**super().protocol(), **contents, "tasks": list(self._tasks())}

    def items(self, data: ProbeData) -> list[Item]:
        """`samples` of each task at each length."""
        self.check_before(data.context)
        self._sources(data)
        return [
            Item(f"{task}:{number}@{length}", 0, length, {"task": task, "number": number, "length": length})
            for length in self.lengths or (data.context,)
            for task in self._tasks()
            for number in range(self.samples)
        ]

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Answers; what does not fit the subject, or is shorter than the shortest text of its task, says so."""
        contents: list[dict[str, Any]] = []
        waiting: dict[int, list[tuple[dict[str, Any], Tokens]]] = {}
        for item in items:
            content: dict[str, Any] = {**item.details, "unit": self.unit}
            contents.append(content)
            fitted = self._fit(engine, item, data)
            if fitted is None:
                content["not_evaluable"] = f"no text of {item.details['task']} is short enough"
                continue
            example, prompt, units = fitted
            new_tokens = TASKS[item.details["task"]].new_tokens
            content |= {"outputs": list(example.outputs), "units": units, "prompt_tokens": len(prompt)}
            content["prompt_bytes"] = len(example.prompt.encode())
            if engine.context_limit is not None and len(prompt) + new_tokens > engine.context_limit:
                content["not_evaluable"] = f"the subject takes {engine.context_limit} tokens"
                continue
            waiting.setdefault(new_tokens, []).append((content, prompt))
        for new_tokens, some in waiting.items():
            sampling = Sampling(max_new_tokens=new_tokens, temperature=self.temperature)
            for (content, _), written in zip(some, engine.generate([p for _, p in some], sampling), strict=True):
                content["response"] = written.text
                content |= {"finish_reason": written.finish_reason, **failure_of(written)}
                content["answer_prefix_mode"] = engine.answer_prefix_mode
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """The score of an answer, in all and for its task."""
        answer = record.answer
        if "response" not in answer:
            return
        x = float(answer["length"])
        item = f"{answer['task']}:{answer['number']}"
        score = scored(answer["response"], answer["outputs"], answer["task"])
        for metric, value in (
            ("score", score),
            (answer["task"], score),
            ("null_rate", float(not answer["response"].strip())),
        ):
            yield Observation(record.subject, record.seed, item, item, metric, x, value, 1.0)

    def remarks(self, summary: Summary) -> list[str]:
        """Effective length and weighted averages of each subject, with how many of the thirteen tasks they are of."""
        by_subject: dict[str, dict[float, float]] = {}
        tasks: dict[str, set[str]] = {}
        for found in summary.measurements:
            if found.metric == "score" and found.x is not None:
                by_subject.setdefault(found.subject, {})[found.x] = found.value
            elif found.metric in TASKS:
                tasks.setdefault(found.subject, set()).add(found.metric)
        lines = []
        for subject, scores in by_subject.items():
            reached = effective_length(scores)
            up, down = (weighted_average(scores, increasing=increasing) for increasing in (True, False))
            effective = "none of these lengths" if reached is None else f"{reached:,.0f}"
            lines.append(
                f"{subject}: effective length (85.6 %) {effective}; weighted averages {100 * up:.1f} % (longer counts "
                f"more), {100 * down:.1f} % (shorter counts more); {_of_tasks(len(tasks.get(subject, ())))}"
            )
        return lines

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The smallest text of the task."""
        task = TASKS[item.details["task"]]
        example = self._example(item, task.least, data)
        line = " ".join(example.prompt.split())
        shown = line if len(line) <= 300 else f"{line[:150]} … {line[-150:]}"
        return Asked(f"{item.details['task']}: {shown}", ", ".join(example.outputs))

    def reply(self, record: Record) -> Reply:
        """The answer; an empty one is none."""
        text = record.answer.get("response", "")
        return Reply(text, "" if text.strip() or "response" not in record.answer else "empty")

    def _tasks(self) -> tuple[str, ...]:
        if self.tasks is not None:
            return self.tasks
        more = [name for name, path in (("qa_1", self.squad), ("qa_2", self.hotpotqa)) if path]
        return (*WITHOUT_FILES, *more)

    def check_before(self, context: int) -> None:
        """Refuse tasks without the questions that they ask, and files that cannot be read."""
        for task, name, path in (("qa_1", "squad", self.squad), ("qa_2", "hotpotqa", self.hotpotqa)):
            if task in self._tasks() and not path:
                raise UserError(
                    f"task {task} without `{name}`", f"`{name}: FILE`", f"name the file, or leave {task} out"
                )
        for path in filter(None, (self.squad, self.hotpotqa)):
            questions_of(Path(path))
        if self.haystack:
            _text(self.haystack)

    def _sources(self, data: ProbeData) -> Sources:
        return _read_sources(self.haystack, self.squad, self.hotpotqa, None if self.haystack else data)

    def _example(self, item: Item, units: int, data: ProbeData) -> Example:
        """The item's text with so much filling; everything else is the same whatever its size."""
        task, number, length = (item.details[name] for name in ("task", "number", "length"))
        generator = numpy_generator(data.seed, "ruler", task, length, number)
        return TASKS[task].build(units, length, number, generator, self._sources(data))

    def _fit(self, engine: Engine, item: Item, data: ProbeData) -> tuple[Example, Tokens, int] | None:
        """The largest text that fits, found along the line through two sizes; None where the smallest does not."""
        task = TASKS[item.details["task"]]
        room = item.details["length"] - (task.new_tokens if self.unit == "tokens" else 0)

        def made(units: int) -> tuple[Example, Tokens, int]:
            example = self._example(item, units, data)
            prompt = engine.encode_prompt(example.prompt, example.answer_prefix)
            return example, prompt, len(prompt) if self.unit == "tokens" else len(example.prompt.encode())

        low, best = task.least, made(task.least)
        if best[2] > room:
            return None
        size_of_one = max(0.05, (made(2 * low + 16)[2] - best[2]) / (low + 16))
        high: int | None = None
        for _ in range(TRIES):
            step = int((room - best[2]) / size_of_one)
            guess = low + max(1, step) if high is None else low + min(max(1, step), max(1, (high - low) // 2))
            if step < 1 or (high is not None and guess >= high):
                break
            tried = made(guess)
            if tried[2] > room:
                high = guess
                size_of_one = max(size_of_one, (tried[2] - best[2]) / (guess - low))
            else:
                low, best = guess, tried
        return best[0], best[1], low


def _of_tasks(count: int) -> str:
    """How many tasks a number is of, and what that means for it."""
    if count == len(TASKS):
        return f"{count} of {count} tasks"
    return f"only {count} of {len(TASKS)} tasks were asked, and the threshold is for all"


@lru_cache(maxsize=2)
def _read_sources(haystack: str | None, squad: str | None, hotpotqa: str | None, data: ProbeData | None) -> Sources:
    text = _text(haystack) if haystack else _of_corpus(data)
    sentences = [piece for each in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) for piece in _pieces(each)]
    # Names and places keep their capitals; what is left are words of the language.
    words = sorted({word for word in re.findall(r"\b[A-Za-z]+\b", text) if _WORD.fullmatch(word)})
    files = {"qa_1": squad, "qa_2": hotpotqa}
    return Sources(sentences, words, {task: questions_of(Path(path)) for task, path in files.items() if path})


def _pieces(sentence: str) -> list[str]:
    """A sentence, in parts where it is very long (text without full stops): needles go between them."""
    words = sentence.split()
    return [" ".join(words[start : start + LONGEST]) for start in range(0, len(words), LONGEST)]


def _text(haystack: str) -> str:
    path = Path(haystack).expanduser()
    if ".json" in path.name:
        return "\n".join(str(row["text"]) for row in read_rows(path, ("text",), "texts"))
    if not path.is_file():
        raise UserError(f"{path} is not there", "a text file, or JSON lines with `text`", "check the path")
    return path.read_text(encoding="utf-8")


def _of_corpus(data: ProbeData | None) -> str:
    assert data is not None
    documents = range(data.shards.num_documents)
    return "\n".join(data.tokenizer.decode(np.asarray(data.shards.document(n))) for n in documents)
