"""LongBench-v2: 503 questions with four choices about documents of 8k to 2M words, at growing context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.engines.base import Engine, Generation, Sampling, Tokens, require_finite
from longspan.foundation.errors import UserError
from longspan.foundation.files import digest
from longspan.probes.base import Asked, Item, Probe, ProbeData, failure_of, register, share_of_best
from longspan.probes.benchmark_files import Rows, file_digest, hub_file, read_rows
from longspan.probes.longbench_v2.extraction import LETTERS, Scorer
from longspan.probes.longbench_v2.prompts import ANSWER_PREFIX, Variant, render, retrieved_document
from longspan.probes.longbench_v2.scores import COMPENSATION, groups_of, read_answer
from longspan.probes.longbench_v2.truncation import fit
from longspan.records.measures import Kind
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

DATASET = "THUDM/LongBench-v2"
FILE = "data.json"
FIELDS = ("_id", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer")
Better = Literal["higher", "lower"]
SLICES = ("easy", "hard", "short", "medium", "long")


@register("longbench_v2")
class LongBenchV2(Probe):
    """The official prompt, cut in the middle to fit each context; the official rule reads the reply, and others can.

    Beside the reply, from the same prompt, the likelihood of the four letters is measured (where the engine can): it
    has no nulls and works for models that follow no format. Each item says how much of its document was seen.

    Attributes:
        data: the data set's `data.json`, or JSON lines; None fetches it from the hub (extra `hub`).
        revision: branch, tag or commit on the hub.
        contexts: tokens of prompt and reply together; None: the context of the study.
        variant: `direct`; `cot`: reason first, then answer without the document; `no_context`: question and choices
            only; `rag`: the first `retrieved` chunks of each row's `retrieved_context`.
        retrieved: chunks of the variant `rag`.
        max_new_tokens: of the reply.
        reasoning_tokens: of the first reply of the variant `cot`.
        temperature: of the reply, as upstream has it; `sampling_seed` makes it repeatable.
        sampling_seed: of the draws.
        letters: measure the likelihood of the letters too.
        max_items: the first so many rows; None: all.
        scorer: which rule reads the reply: `official`, `robust`, or an earlier project's (`earlier`, `first_pass`).
    """

    title: ClassVar[str] = "LongBench-v2"
    explanation: ClassVar[str] = (
        "Questions with four choices about long documents, whose middle is cut out until they fit. Strict accuracy "
        "counts a reply without an answer as wrong; the share of such replies, the accuracy on the answered ones and "
        "the compensated accuracy (a quarter for each) stand beside it. Below the whole document's length a longer "
        "context shows more of the document: the axis is one of truncation. Chance is 25 %, always saying C 29.4 %."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"generate"})
    only_read: ClassVar[frozenset[str]] = frozenset({"scorer"})
    batch_tokens: ClassVar[int] = 131_072

    data: str | None = None
    revision: str | None = None
    contexts: tuple[int, ...] | None = None
    variant: Variant = "direct"
    retrieved: int = Field(5, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    reasoning_tokens: int = Field(1024, ge=1)
    temperature: float = Field(0.1, ge=0.0)
    sampling_seed: int = 0
    letters: bool = True
    max_items: int | None = Field(None, ge=1)
    scorer: Scorer = "official"

    @model_validator(mode="after")
    def _contexts_hold_a_reply(self) -> Self:
        least = self._reply_tokens() + 2
        for context in self.contexts or ():
            if context < least:
                raise UserError(f"contexts = [{context}]", f"{least} or more: prompt and reply together", "raise it")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance; slices and ledger are shown and not compared."""
        chance = 1 / len(LETTERS)

        def main(name: str, title: str, *, better: Better = "higher", chance: float | None = None) -> Metric:
            return Metric(name, title, "", "proportion", better, x_name="context", chance=chance)

        def detail(name: str, title: str, kind: Kind = "proportion") -> Metric:
            return Metric(name, title, "", kind, "higher", x_name="context", compare=False, detail=True)

        return (
            main("accuracy", "Accuracy (strict)", chance=chance),
            main("null_rate", "No answer", better="lower"),
            detail("answered", "Accuracy on answered"),
            detail("compensated", "Compensated accuracy"),
            main("letter_accuracy", "Accuracy by likelihood", chance=chance),
            main("letter_accuracy_calibrated", "Accuracy by likelihood over the prior", chance=chance),
            detail("fully_visible", "Whole document seen"),
            detail("kept_fraction", "Share of document seen", "ratio"),
            detail("accuracy_visible", "Accuracy, whole document seen"),
            *(detail(f"accuracy_{name}", f"Accuracy, {name}") for name in SLICES),
            *(detail(f"said_{letter}", f"Said {letter}") for letter in LETTERS),
            *(detail(f"right_{letter}", f"{letter} is right") for letter in LETTERS),
        )

    def protocol(self) -> dict[str, Any]:
        """The settings, with the data set's content in place of where it lies."""
        return {**super().protocol(), "data": self._identity()}

    def items(self, data: ProbeData) -> list[Item]:
        """Each row at each context, the contexts of a row one after the other."""
        contexts = self.contexts or (data.context,)
        return [
            Item(f"{row['_id']}@{context}", number, context, {"row": number, "context": context})
            for number, row in enumerate(self._rows())
            for context in contexts
        ]

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Replies, the likelihood of the letters, and what was seen; what cannot be asked says why."""
        contents = [self._about(item) for item in items]
        self._reply(engine, contents)
        if self.letters and "score" in engine.capabilities:
            self._letters(engine, contents)
        return [{key: value for key, value in content.items() if key != "row"} for content in contents]

    def observe(self, record: Record) -> Iterable[Observation]:
        """Right, null, answered, compensated, by slice; how much of the document was seen; which letter was said."""
        answer = record.answer
        if "response" not in answer:
            return
        x = None if answer.get("context") is None else float(answer["context"])
        copy = answer.get("copy", 1)
        item = answer["id"] if copy == 1 else f"{answer['id']}#{copy}"
        cluster = str(answer.get("document") or answer["id"])

        def seen(metric: str, numerator: float) -> Observation:
            return Observation(record.subject, record.seed, item, cluster, metric, x, numerator, 1.0)

        read = read_answer(answer, self.scorer)
        right, null = float(read.right), float(read.letter is None)
        yield seen("accuracy", right)
        yield seen("null_rate", null)
        yield seen("compensated", right + COMPENSATION * null)
        if not null:
            yield seen("answered", right)
        for group in groups_of(answer):
            if group in SLICES:
                yield seen(f"accuracy_{group}", right)
        for letter in LETTERS:
            yield seen(f"said_{letter}", float(read.letter == letter))
            yield seen(f"right_{letter}", float(answer["gold"] == letter))
        if "letters" in answer:
            letters_4, right_one = np.array(answer["letters"]), LETTERS.index(answer["gold"])
            yield seen("letter_accuracy", share_of_best(letters_4, right_one))
            if "letters_prior" in answer:
                over_4 = letters_4 - np.array(answer["letters_prior"])
                yield seen("letter_accuracy_calibrated", share_of_best(over_4, right_one))
        if "fully_visible" in (ledger := answer.get("truncation", {})):
            yield seen("fully_visible", float(ledger["fully_visible"]))
            yield seen("kept_fraction", ledger["kept_fraction"])
            if ledger["fully_visible"]:
                yield seen("accuracy_visible", right)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """Question, choices and the right letter."""
        row = self._rows()[item.details["row"]]
        choices = "  ".join(f"({letter}) {_short(str(row[f'choice_{letter}']), 80)}" for letter in LETTERS)
        return Asked(f"{_short(str(row['question']), 300)}  {choices}", str(row["answer"]))

    def _rows(self) -> Rows:
        path = Path(self.data) if self.data else hub_file(DATASET, FILE, self.revision)
        rows = read_rows(path, FIELDS, "LongBench-v2's items")
        return rows[: self.max_items]

    def _identity(self) -> str:
        if self.data:
            return file_digest(Path(self.data))
        return f"{DATASET}@{self.revision or 'main'}"

    def _reply_tokens(self) -> int:
        return max(self.max_new_tokens, self.reasoning_tokens if self.variant == "cot" else 0)

    def _about(self, item: Item) -> dict[str, Any]:
        """What a record says of its item; `row` is taken out again."""
        row = self._rows()[item.details["row"]]
        facts = {name: row[name] for name in ("domain", "sub_domain", "difficulty", "length") if name in row}
        context = str(row.get("context", ""))
        about = {"id": row["_id"], "gold": row["answer"], "context": item.details["context"], **facts, "row": row}
        # Rows about the same document are no independent trials.
        return {**about, "document": digest(context)[:16]} if context else about

    def _reply(self, engine: Engine, contents: Sequence[dict[str, Any]]) -> None:
        first = self.reasoning_tokens if self.variant == "cot" else self.max_new_tokens
        said = self._generate(engine, contents, self.variant, first)
        if self.variant == "cot":
            for content, written in zip(contents, said, strict=True):
                if written is not None:
                    content["reasoning"], content["reasoning_finish"] = written.text, written.finish_reason
            said = self._generate(engine, contents, "cot_answer", self.max_new_tokens)
        for content, written in zip(contents, said, strict=True):
            if written is not None:
                content |= {
                    "response": written.text,
                    "finish_reason": written.finish_reason,
                    "prompt_tokens": written.prompt_tokens,
                    "new_tokens": len(written.tokens),
                    "max_new_tokens": self.max_new_tokens,
                    **failure_of(written),
                }

    def _generate(
        self, engine: Engine, contents: Sequence[dict[str, Any]], template: str, new_tokens: int
    ) -> list[Generation | None]:
        """What the subject writes, None where the item cannot be asked; its content then says why."""
        prompts: list[Tokens | None] = []
        for content in contents:
            if "not_evaluable" in content:
                prompts.append(None)
                continue
            context, limit = content["context"], engine.context_limit
            if limit is not None and context > limit:
                content["not_evaluable"] = f"the subject takes {limit} tokens"
                prompts.append(None)
                continue
            row = content["row"]
            document = retrieved_document(row, self.retrieved) if template == "rag" else None
            rendered = render(template, row, document=document, reasoning=content.get("reasoning", ""))
            least = len(engine.encode_prompt(render(template, row, document="", reasoning="").text))
            fitted = fit(engine, rendered, context - new_tokens) if least <= context - new_tokens else None
            if fitted is None:
                content["not_evaluable"] = f"the question alone has {least} tokens"
                prompts.append(None)
                continue
            if template != "cot_answer":
                content["truncation"] = fitted.ledger
            if rendered.differs:
                content["substitution_differs"] = True
            prompts.append(fitted.ids)
        sampling = Sampling(max_new_tokens=new_tokens, temperature=self.temperature, seed=self.sampling_seed)
        asked = [prompt for prompt in prompts if prompt is not None]
        written = iter(engine.generate(asked, sampling) if asked else [])
        return [None if prompt is None else next(written) for prompt in prompts]

    def _letters(self, engine: Engine, contents: Sequence[dict[str, Any]]) -> None:
        """Nats of each letter after the same prompt (of `cot`, the direct one) and the beginning of an answer.

        `letters_prior` is the same without the document: what the subject expects of the question alone.
        """
        template = "direct" if self.variant == "cot" else self.variant
        wanted = (
            {"letters": template} if template == "no_context" else {"letters": template, "letters_prior": "no_context"}
        )
        asked, names, prefixes = [], [], []
        for content in contents:
            if "response" not in content:
                continue
            row = content["row"]
            for name, kind in wanted.items():
                document = retrieved_document(row, self.retrieved) if kind == "rag" else None
                fitted = fit(engine, render(kind, row, document=document), content["context"] - 1, ANSWER_PREFIX)
                if fitted is not None:
                    asked.append(content)
                    names.append(name)
                    prefixes.append(fitted.ids)
        letters = [engine.tokenizer.encode(letter) for letter in LETTERS]
        if not asked:
            return
        scores = engine.score_many(prefixes, [letters] * len(asked))
        for content, name, scored in zip(asked, names, scores, strict=True):
            sums = np.array([float(nll.sum()) for nll in scored])
            content[name] = require_finite(sums, engine.name, f"the letters of {content['id']}").tolist()


def _short(text: str, limit: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} … {line[-limit // 2 :]}"
