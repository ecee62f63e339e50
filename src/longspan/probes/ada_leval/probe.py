"""Ada-LEval: choose the best of many answers, or order four pieces of a book, at any length and never truncated."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.engines.base import Engine, Sampling, Tokens, require_finite
from longspan.foundation.errors import UserError
from longspan.probes.ada_leval.extraction import (
    ORDERS,
    SAMPLE_CANDIDATE,
    SAMPLE_ORDER,
    Scorer,
    follows_instruction,
    order_is_right,
    read_candidate,
    read_order,
)
from longspan.probes.ada_leval.items import AdaItem, Task, read_items
from longspan.probes.base import Asked, Item, Probe, ProbeData, Reply, credit, failure_of, register
from longspan.probes.benchmark_files import file_digest
from longspan.records.measures import Kind
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

ORDER_PREFIX = "Answer: "
CANDIDATE_PREFIX = ""


@register("ada_leval")
class AdaLEval(Probe):
    """BestAnswer or TSort, as replies and by likelihood; an item that does not fit is not evaluable, not wrong.

    Attributes:
        task: `best_answer` (a question and many answers) or `tsort` (four pieces of a book to be ordered).
        files: length in tokens as upstream counts it → file, e.g. `{2000: stackselect_2k.json}`.
        max_items: the first so many of each file; None: 1,000 below 32,000 tokens, 200 from there on, as upstream
            takes them.
        max_new_tokens: of the reply.
        generate: ask for replies.
        likelihood: score all 24 orders, or every candidate's name, by likelihood, where the engine can.
        scorer: which rule reads a reply: `official` (with its defects), `official_lengths` (the same, but an order
            that is too short is wrong) or `strict`.
    """

    title: ClassVar[str] = "Ada-LEval"
    explanation: ClassVar[str] = (
        "The most helpful of many answers to a question, or the right order of four pieces of a book. Items that do "
        "not fit a subject's context are left out for it. Beside the accuracy of replies: how many replies hold an "
        "answer at all, how many repeat the sample of the instruction, how often that sample is right, and the "
        "accuracy when all answers are scored by likelihood instead."
    )
    requires: ClassVar[frozenset[str]] = frozenset()
    only_read: ClassVar[frozenset[str]] = frozenset({"scorer"})
    batch_tokens: ClassVar[int] = 131_072

    task: Task = "best_answer"
    files: dict[int, str] = Field(default_factory=dict)
    max_items: int | None = Field(None, ge=1)
    max_new_tokens: int = Field(64, ge=1)
    generate: bool = True
    likelihood: bool = True
    scorer: Scorer = "official"

    @model_validator(mode="after")
    def _asks_something(self) -> Self:
        if not self.generate and not self.likelihood:
            raise UserError("neither `generate` nor `likelihood`", "at least one of them", "leave one on")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        at = "length"
        chance = 1 / len(ORDERS) if self.task == "tsort" else None

        def shown(
            name: str, title: str, kind: Kind = "proportion", better: Literal["higher", "lower"] = "higher"
        ) -> Metric:
            return Metric(name, title, "", kind, better, x_name=at, compare=False, detail=True)

        return (
            Metric("accuracy", "Accuracy", "", "proportion", "higher", x_name=at, chance=chance),
            Metric(
                "likelihood_accuracy", "Accuracy by likelihood", "", "proportion", "higher", x_name=at, chance=chance
            ),
            Metric("null_rate", "No answer", "", "proportion", "lower", x_name=at),
            shown("chance", "Chance", "ratio"),
            shown("instruction_rate", "Instruction followed"),
            shown("copy_rate", "Sample of the instruction copied", better="lower"),
            shown("copy_rate_valid", "Sample copied, of valid replies", better="lower"),
            shown("expectation", "Sample is right"),
            shown("evaluable", "Fits the subject"),
        )

    def check(self, engine: Engine) -> None:
        """Refuse an engine that can give neither replies nor likelihoods, of those that are wanted."""
        wanted = {"generate": self.generate, "score": self.likelihood}
        if not any(on and capability in engine.capabilities for capability, on in wanted.items()):
            raise engine.refuse("generate" if self.generate else "score")

    def protocol(self) -> dict[str, Any]:
        """The settings, with the files' content in place of where they lie."""
        contents = {str(length): file_digest(Path(path)) for length, path in sorted(self.files.items())}
        return {**super().protocol(), "files": contents}

    def check_before(self, context: int) -> None:
        """Refuse to ask nothing, and files that hold other things."""
        if not self.files:
            raise UserError(
                "no files", "`files: {2000: stackselect_2k.json, …}`", "get Ada-LEval's data (docs/benchmarks.md)"
            )
        for length in self.files:
            self._read(length)

    def items(self, data: ProbeData) -> list[Item]:
        """The first items of every file, shortest length first."""
        self.check_before(data.context)
        return [
            Item(f"{each.id}@{length}", 0, length, {"length": length, "number": number})
            for length in sorted(self.files)
            for number, each in enumerate(self._read(length))
        ]

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Replies and likelihoods; what does not fit is not asked."""
        asked = [self._read(item.details["length"])[item.details["number"]] for item in items]
        contents = [_about(each, item.details["length"]) for each, item in zip(asked, items, strict=True)]
        replies = self._prompts(engine, asked, contents) if self.generate and "generate" in engine.capabilities else []
        scored = self._choices(engine, asked, contents) if self.likelihood and "score" in engine.capabilities else []
        written, scores = engine.generate_and_score(
            [prompt for _, prompt in replies],
            Sampling(max_new_tokens=self.max_new_tokens),
            [prefix for _, prefix, _ in scored],
            [choices for _, _, choices in scored],
        )
        for (content, _), each in zip(replies, written, strict=True):
            content |= {"response": each.text, "finish_reason": each.finish_reason, **failure_of(each)}
        for (content, _, _), nll in zip(scored, scores, strict=True):
            sums = np.array([float(values.sum()) for values in nll])
            content["nll"] = require_finite(sums, engine.name, f"the answers to {content['id']}").tolist()
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """Of replies under the chosen rule, and of likelihoods."""
        answer = record.answer
        x = float(answer["length"])

        def seen(metric: str, numerator: float) -> Observation:
            item, cluster = str(answer["id"]), str(answer["document"])
            return Observation(record.subject, record.seed, item, cluster, metric, x, float(numerator), 1.0)

        yield seen("evaluable", "response" in answer or "nll" in answer)
        yield seen("chance", 1 / answer.get("candidates", len(ORDERS)))
        sample = list(SAMPLE_ORDER) if "candidates" not in answer else SAMPLE_CANDIDATE
        yield seen("expectation", answer["gold"] == sample)
        if "response" in answer:
            yield from self._of_reply(answer, sample, seen)
        if "nll" in answer:
            yield seen("likelihood_accuracy", credit(np.array(answer["nll"]), answer["right"]))

    def _of_reply(self, answer: dict[str, Any], sample: Any, seen: Any) -> Iterable[Observation]:
        text, candidates = answer["response"], answer.get("candidates")
        read: Any
        if candidates is None:
            read = read_order(text, self.scorer)
            right = order_is_right(read, answer["gold"], self.scorer)
        else:
            read = read_candidate(text, candidates, self.scorer)
            right = read == answer["gold"]
        yield seen("accuracy", right)
        yield seen("null_rate", read is None)
        yield seen("instruction_rate", follows_instruction(text, candidates))
        yield seen("copy_rate", read == sample)
        if read is not None:
            yield seen("copy_rate_valid", read == sample)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """Beginning and end of the message, and what is right."""
        each = self._read(item.details["length"])[item.details["number"]]
        line = " ".join(each.prompt.split())
        return Asked(line if len(line) <= 300 else f"{line[:150]} … {line[-150:]}", str(each.gold))

    def reply(self, record: Record) -> Reply:
        """The reply, and whether it holds an answer under the chosen rule."""
        text, candidates = record.answer.get("response", ""), record.answer.get("candidates")
        if "response" not in record.answer:
            return Reply()
        read = read_order(text, self.scorer) if candidates is None else read_candidate(text, candidates, self.scorer)
        return Reply(text, "no answer in it" if read is None else "")

    def _read(self, length: int) -> list[AdaItem]:
        most = self.max_items or (1000 if length < 32_000 else 200)
        return read_items(Path(self.files[length]), self.task)[:most]

    def _prompts(
        self, engine: Engine, asked: Sequence[AdaItem], contents: Sequence[dict[str, Any]]
    ) -> list[tuple[dict[str, Any], Tokens]]:
        """The contents that fit with a reply, and their prompts."""
        fitting = []
        for each, content in zip(asked, contents, strict=True):
            ids = engine.encode_prompt(each.prompt)
            content["prompt_tokens"] = len(ids)
            if engine.context_limit is None or len(ids) + self.max_new_tokens <= engine.context_limit:
                fitting.append((content, ids))
        return fitting

    def _choices(
        self, engine: Engine, asked: Sequence[AdaItem], contents: Sequence[dict[str, Any]]
    ) -> list[tuple[dict[str, Any], Tokens, list[Tokens]]]:
        """The contents that fit with every answer, their prompts with its beginning, and the answers."""
        fitting = []
        for each, content in zip(asked, contents, strict=True):
            beginning = CANDIDATE_PREFIX if each.candidates else ORDER_PREFIX
            ids = engine.encode_prompt(each.prompt, beginning)
            continuations: list[Tokens] = [engine.tokenizer.encode(name) for name in _names(each)]
            content.setdefault("prompt_tokens", len(ids))
            longest = max(map(len, continuations))
            if engine.context_limit is None or len(ids) + longest - 1 <= engine.context_limit:
                fitting.append((content, ids, continuations))
        return fitting


def _about(each: AdaItem, length: int) -> dict[str, Any]:
    about: dict[str, Any] = {"id": each.id, "document": each.document, "gold": each.gold, "length": length}
    if each.candidates:
        return {**about, "candidates": each.candidates, "right": int(str(each.gold)[1:]) - 1}
    assert isinstance(each.gold, list)
    return {**about, "right": ORDERS.index(tuple(each.gold))}


def _names(each: AdaItem) -> list[str]:
    """What is scored, each with the end of a line, so that A1 is not the beginning of A12."""
    if each.candidates:
        return [f"A{number}\n" for number in range(1, each.candidates + 1)]
    return [f"{list(order)}\n" for order in ORDERS]
