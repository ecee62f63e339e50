"""LongBench-v2: 503 questions with four choices about documents of 8k to 2M words, at growing context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from pydantic import Field, model_validator

from longspan.engines.base import Engine, Generation, Sampling, Tokens, require_finite
from longspan.foundation.errors import UserError
from longspan.foundation.files import digest
from longspan.probes.base import Asked, Item, Probe, ProbeData, Reply, failure_of, register
from longspan.probes.benchmark_files import Rows, file_digest, hub_file, read_rows
from longspan.probes.longbench_v2.extraction import LETTERS, Scorer
from longspan.probes.longbench_v2.prompts import ANSWER_PREFIX, RE_ASKED, Variant, render, retrieved_document
from longspan.probes.longbench_v2.reading import metrics_of, observations
from longspan.probes.longbench_v2.scores import read_answer
from longspan.probes.longbench_v2.truncation import Fitted, fit
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

DATASET = "THUDM/LongBench-v2"
FILE = "data.json"
FIELDS = ("_id", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer")


@register("longbench_v2")
class LongBenchV2(Probe):
    """The official prompt, cut in the middle to fit each context; the official rule reads the reply, and others can.

    Beside the reply, from the same prompt, the likelihood of the four letters is measured (where the engine can): it
    has no nulls and works for models that follow no format. Each item says how much of its document was seen.

    Attributes:
        data: the data set's `data.json`, or JSON lines; None fetches it from the hub (extra `hub`).
        revision: branch, tag or commit on the hub; a study stays at the commit of its first use.
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
        re_ask: ask once more where the first reply holds no answer under `scorer`: the document again, what was replied
            and a request for the letter alone. Another protocol, with numbers of its own beside those of the first
            replies.
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
    contexts: tuple[int, ...] | None = Field(None, min_length=1)
    variant: Variant = "direct"
    retrieved: int = Field(5, ge=1)
    max_new_tokens: int = Field(128, ge=1)
    reasoning_tokens: int = Field(1024, ge=1)
    temperature: float = Field(0.1, ge=0.0)
    sampling_seed: int = 0
    letters: bool = True
    max_items: int | None = Field(None, ge=1)
    scorer: Scorer = "official"
    re_ask: bool = False

    @model_validator(mode="after")
    def _contexts_hold_a_reply(self) -> Self:
        least = self._reply_tokens() + 2
        for context in self.contexts or ():
            if context < least:
                raise UserError(f"contexts = [{context}]", f"{least} or more: prompt and reply together", "raise it")
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See `metrics_of`."""
        return metrics_of(re_ask=self.re_ask)

    def hub_dataset(self) -> str | None:
        """See `Probe.hub_dataset`."""
        return None if self.data else DATASET

    def protocol(self) -> dict[str, Any]:
        """The settings, with the data set's content in place of where it lies."""
        protocol = {**super().protocol(), "data": self._identity()}
        if self.letters:
            protocol["letters_after"] = "the prompt of the reply"
        if self.re_ask:
            # Here the rule decides what is asked.
            return {**protocol, "re_asked_under": self.scorer}
        # Records of runs that knew of no second question stay valid.
        del protocol["re_ask"]
        return protocol

    def check_before(self, context: int) -> None:
        """Refuse a file that holds other things."""
        if self.data:
            self._rows()

    def items(self, data: ProbeData) -> list[Item]:
        """Each row at each context, the contexts of a row one after the other."""
        contexts = self.contexts or (data.context,)
        return [
            Item(f"{row['_id']}@{context}", number, context, {"row": number, "context": context})
            for number, row in enumerate(self._rows())
            for context in contexts
        ]

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """Whole rows: the contexts of a row begin alike, and engines compute a common beginning once."""
        batch: list[Item] = []
        for _, of_row in groupby(items, key=lambda item: item.details["row"]):
            row = list(of_row)
            if batch and sum(each.tokens for each in (*batch, *row)) > self.batch_tokens:
                yield batch
                batch = []
            batch += row
        if batch:
            yield batch

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Replies, the likelihood of the letters, and what was seen; what cannot be asked says why."""
        contents = [self._about(item) for item in items]
        self._reply(engine, contents)
        if self.re_ask:
            self._ask_again(engine, contents)
        return [{key: value for key, value in content.items() if key != "row"} for content in contents]

    def observe(self, record: Record) -> Iterable[Observation]:
        """Right, null, answered, compensated, by slice; how much of the document was seen; which letter was said."""
        return observations(record, self.scorer, re_ask=self.re_ask)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """Question, choices and the right letter."""
        row = self._rows()[item.details["row"]]
        choices = "  ".join(f"({letter}) {_short(str(row[f'choice_{letter}']), 80)}" for letter in LETTERS)
        return Asked(f"{_short(str(row['question']), 300)}  {choices}", str(row["answer"]))

    def reply(self, record: Record) -> Reply:
        """The reply, the second one too, and why it holds no letter."""
        answer = record.answer
        if "response" not in answer:
            return Reply()
        cause = read_answer(answer, self.scorer).cause
        again = answer.get("re_asked", {}).get("response")
        text = answer["response"] if again is None else f"{answer['response']} [asked again:] {again}"
        return Reply(text, cause.replace("_", " ") if cause else "")

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
        """Replies, and the likelihood of the letters after the same prompts.

        Of `cot` the letters stand after the direct question, since reasoning is no prompt.
        """
        scores = self.letters and "score" in engine.capabilities
        if self.variant != "cot":
            prompts = self._prompts(engine, contents, self.variant, self.max_new_tokens)
            self._written(engine, contents, prompts, self._letters(engine, contents, prompts) if scores else [])
            return
        reasoned = self._prompts(engine, contents, "cot", self.reasoning_tokens)
        for content, written in zip(contents, self._generate(engine, reasoned, self.reasoning_tokens), strict=True):
            if written is not None:
                content["reasoning"], content["reasoning_finish"] = written.text, written.finish_reason
        direct = self._prompts(engine, contents, "direct", self.max_new_tokens) if scores else []
        prompts = self._prompts(engine, contents, "cot_answer", self.max_new_tokens)
        self._written(engine, contents, prompts, self._letters(engine, contents, direct) if scores else [])

    def _written(
        self,
        engine: Engine,
        contents: Sequence[dict[str, Any]],
        prompts: Sequence[Fitted | None],
        letters: Sequence[_Letters],
    ) -> None:
        asked = [prompt.ids for prompt in prompts if prompt is not None]
        choices = [engine.tokenizer.encode(letter) for letter in LETTERS]
        written, scores = engine.generate_and_score(
            asked, self._sampling(self.max_new_tokens), [each.prefix for each in letters], [choices] * len(letters)
        )
        replies = iter(written)
        for content, prompt in zip(contents, prompts, strict=True):
            if prompt is not None:
                content |= self._said(next(replies))
        for each, scored in zip(letters, scores, strict=True):
            sums = np.array([float(nll.sum()) for nll in scored])
            require_finite(sums, engine.name, f"the letters of {each.content['id']}")
            each.content[each.name] = sums.tolist()

    def _said(self, written: Generation) -> dict[str, Any]:
        """What a record keeps of a reply."""
        return {
            "response": written.text,
            "finish_reason": written.finish_reason,
            "prompt_tokens": written.prompt_tokens,
            **({"shared_tokens": written.shared_tokens} if written.shared_tokens else {}),
            "new_tokens": len(written.tokens),
            "max_new_tokens": self.max_new_tokens,
            **failure_of(written),
        }

    def _generate(self, engine: Engine, prompts: Sequence[Fitted | None], new_tokens: int) -> list[Generation | None]:
        asked = [prompt.ids for prompt in prompts if prompt is not None]
        written = iter(engine.generate(asked, self._sampling(new_tokens)) if asked else [])
        return [None if prompt is None else next(written) for prompt in prompts]

    def _sampling(self, new_tokens: int) -> Sampling:
        return Sampling(max_new_tokens=new_tokens, temperature=self.temperature, seed=self.sampling_seed)

    def _prompts(
        self, engine: Engine, contents: Sequence[dict[str, Any]], template: str, new_tokens: int
    ) -> list[Fitted | None]:
        """The prompts, None where an item cannot be asked; its content then says why."""
        prompts: list[Fitted | None] = []
        for content in contents:
            fitted = None
            if "not_evaluable" not in content:
                limit = engine.context_limit
                if limit is not None and content["context"] > limit:
                    content["not_evaluable"] = f"the subject takes {limit} tokens"
                else:
                    fitted = self._fit(engine, content, template, new_tokens)
            prompts.append(fitted)
        return prompts

    def _fit(self, engine: Engine, content: dict[str, Any], template: str, new_tokens: int) -> Fitted | None:
        row, room = content["row"], content["context"] - new_tokens
        reasoning = content.get("reasoning", "")
        rendered = render(template, row, document=self._document(row, template), reasoning=reasoning)
        least = len(engine.encode_prompt(render(template, row, document="", reasoning="").text))
        fitted = fit(engine, rendered, room) if least <= room else None
        if fitted is None:
            content["not_evaluable"] = f"the question alone has {least} tokens"
            return None
        if template == self.variant:
            content["truncation"] = fitted.ledger
        if rendered.differs:
            content["substitution_differs"] = True
        return fitted

    def _document(self, row: dict[str, Any], template: str) -> str | None:
        return retrieved_document(row, self.retrieved) if template in ("rag", RE_ASKED["rag"]) else None

    def _letters(
        self, engine: Engine, contents: Sequence[dict[str, Any]], prompts: Sequence[Fitted | None]
    ) -> list[_Letters]:
        """Where the likelihood of the letters is asked: after each prompt with the beginning of an answer.

        `letters_prior` is the same without the document: what the subject expects of the question alone.
        """
        asked = []
        for content, prompt in zip(contents, prompts, strict=True):
            if prompt is None:
                continue
            row, room = content["row"], content["context"] - 1
            begun = engine.encode_prompt(prompt.text, ANSWER_PREFIX)
            prefix: Tokens | None = begun
            if len(begun) > room:
                # A reply shorter than the beginning of an answer leaves no room for it.
                template = "direct" if self.variant == "cot" else self.variant
                rendered = render(template, row, document=self._document(row, template))
                refitted = fit(engine, rendered, room, ANSWER_PREFIX)
                prefix = None if refitted is None else refitted.ids
            if prefix is not None:
                asked.append(_Letters(content, "letters", prefix))
            prior = fit(engine, render("no_context", row), room, ANSWER_PREFIX)
            if self.variant != "no_context" and prior is not None:
                asked.append(_Letters(content, "letters_prior", prior.ids))
        return asked

    def _ask_again(self, engine: Engine, contents: Sequence[dict[str, Any]]) -> None:
        """Once more, with the document and the first reply in one message, where that holds no answer."""
        template = RE_ASKED[self.variant]
        asked: list[tuple[dict[str, Any], Fitted]] = []
        for content in contents:
            if not self._unanswered(content):
                continue
            row, room = content["row"], content["context"] - self.max_new_tokens
            replied = "\n\n".join(part for part in (content.get("reasoning"), content["response"]) if part)
            again = {"document": "", "reasoning": replied or "(nothing)"}
            least = len(engine.encode_prompt(render(template, row, **again).text))
            again["document"] = self._document(row, template) or str(row.get("context", ""))
            fitted = fit(engine, render(template, row, **again), room) if least <= room else None
            if fitted is None:
                content["re_asked"] = {"not_evaluable": f"question and first reply have {least} tokens"}
            else:
                content["re_asked"] = {"truncation": fitted.ledger}
                asked.append((content["re_asked"], fitted))
        written = self._generate(engine, [fitted for _, fitted in asked], self.max_new_tokens)
        for (kept, _), each in zip(asked, written, strict=True):
            assert each is not None
            kept |= self._said(each)

    def _unanswered(self, content: dict[str, Any]) -> bool:
        """Whether there is a first reply that holds no answer; a request that failed is no reply."""
        if "response" not in content or content.get("failure") not in (None, "empty reply"):
            return False
        return read_answer(content, self.scorer).letter is None


@dataclass(frozen=True)
class _Letters:
    """A request for the likelihood of the letters: after `prefix`, for `name` of a content."""

    content: dict[str, Any]
    name: str
    prefix: Tokens


def _short(text: str, limit: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit // 2]} … {line[-limit // 2 :]}"
