"""Copying text: a passage is shown twice and begun a third time; is it written out once more?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from longspan.engines.base import Engine, Sampling
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes.asking import Way, ways_of
from longspan.probes.base import Asked, Item, Probe, ProbeData, failure_of, register, shown
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record


@register("text_copy")
class TextCopy(Probe):
    """Passages of the test documents, given twice and begun again, as "Repeat After Me" (2024) asked of text.

    By likelihood: NLL of the rest of the passage after two copies, and what the copies save against the same words
    after the beginning alone (the floor). By generation: the share of tokens written rightly, place by place, and
    whether all are. A shuffled passage takes away what can be known of language: copying alone is left.

    Attributes:
        lengths: tokens of a passage.
        per_length: passages of each length, spread evenly over documents; a shorter one begins the longer one.
        given: tokens of the third copy that are shown.
        order: of the tokens of a passage, as in the document or shuffled.
        ways: how to ask; None: all that the subject can.
    """

    title: ClassVar[str] = "Copying text"
    explanation: ClassVar[str] = (
        "A passage stands there twice and is begun a third time. Does the subject write it again, and how much more "
        "likely is it than after its beginning alone?"
    )
    requires: ClassVar[frozenset[str]] = frozenset()

    lengths: tuple[int, ...] = (16, 32, 64, 128)
    per_length: int = Field(60, ge=1)
    given: int = Field(2, ge=1)
    order: Literal["standard", "shuffled"] = "standard"
    ways: tuple[Way, ...] | None = Field(None, min_length=1)

    @model_validator(mode="after")
    def _something_is_left_to_write(self) -> Self:
        if min(self.lengths, default=0) <= self.given:
            raise UserError(
                f"lengths = {list(self.lengths)}",
                f"one or more, each longer than the {self.given} tokens that are given",
                "mend `lengths`, or lower `given`",
            )
        return self

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        return (
            Metric("saved", "Saved by two copies", "nats/token", "ratio", "higher", "length", chance=0.0),
            Metric("nll", "NLL after two copies", "nats/token", "ratio", "lower", "length", compare=False),
            Metric("exact_match", "Copied as a whole", "", "proportion", "higher", "length", chance=0.0),
            Metric("token_accuracy", "Tokens in their place", "", "proportion", "higher", "length", chance=0.0),
        )

    def check(self, engine: Engine) -> None:
        """Refuse an engine that can ask in none of the ways wanted."""
        ways_of(self.ways, engine)

    def items(self, data: ProbeData) -> list[Item]:
        """Passages at random places, the same documents and places at every length."""
        lengths = sorted(set(self.lengths))
        fitting = np.flatnonzero(data.shards.lengths >= lengths[-1])
        if not len(fitting):
            longest = int(data.shards.lengths.max(initial=0))
            raise UserError(
                f"no test document has {lengths[-1]} tokens", f"at most {longest}", "ask for shorter `lengths`"
            )
        generator = numpy_generator(data.seed, "text_copy", lengths[-1], self.per_length)
        order = generator.permutation(fitting)
        items = []
        places = []
        for number in range(self.per_length):
            document = int(order[number % len(order)])
            places.append((document, int(generator.integers(int(data.shards.lengths[document]) - lengths[-1] + 1))))
        for length in lengths:
            for number, (document, start) in enumerate(places):
                details = {"start": start, "length": length, "number": number}
                name = f"{data.shards.ids[document]}:{number}@{length}"
                items.append(Item(name, document, 4 * length, details))
        return items

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Sums of NLL with and without the copies, and how many tokens were written rightly."""
        ways, limit = ways_of(self.ways, engine), engine.context_limit
        prompts = [np.concatenate([engine.document_prefix, self.prompt(item, data)]) for item in items]
        rests = [self.passage(item, data)[self.given :] for item in items]
        contents: list[dict[str, Any]] = [
            {"document": data.shards.ids[item.document], "length": item.details["length"], "tokens": len(rest)}
            for item, rest in zip(items, rests, strict=True)
        ]
        able = [
            row
            for row, (prompt, rest) in enumerate(zip(prompts, rests, strict=True))
            if limit is None or len(prompt) + len(rest) <= limit
        ]
        if "likelihood" in ways and able:
            begun = [
                np.concatenate([engine.document_prefix, self.passage(items[row], data)[: self.given]]) for row in able
            ]
            choices = [[rests[row]] for row in able]
            after = engine.score_many([prompts[row] for row in able], choices)
            without = engine.score_many(begun, choices)
            for row, (kept,), (lost,) in zip(able, after, without, strict=True):
                contents[row] |= {"nll": float(kept.sum()), "floor": float(lost.sum())}
        if "generation" in ways and able:
            most = max(len(rests[row]) for row in able)
            for row, wrote in zip(
                able, engine.generate([prompts[row] for row in able], Sampling(max_new_tokens=most)), strict=True
            ):
                rest, tokens = rests[row], wrote.tokens[: len(rests[row])]
                contents[row] |= {"right": int((tokens == rest[: len(tokens)]).sum()), **failure_of(wrote)}
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """x is the length of the passage."""
        answer = record.answer
        tokens, place = float(answer["tokens"]), {"cluster": answer["document"], "x": float(answer["length"])}
        if "nll" in answer:
            yield self.observation(record, "saved", answer["floor"] - answer["nll"], tokens, **place)
            yield self.observation(record, "nll", answer["nll"], tokens, **place)
        if "right" in answer:
            yield self.observation(record, "exact_match", float(answer["right"] == answer["tokens"]), 1.0, **place)
            yield self.observation(record, "token_accuracy", float(answer["right"]), tokens, **place)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The end of the prompt and what should follow."""
        rest = self.passage(item, data)[self.given :]
        return Asked(f"{shown(data, self.prompt(item, data))} ⟶", shown(data, rest))

    def passage(self, item: Item, data: ProbeData) -> NDArray[np.int64]:
        """The tokens to copy."""
        start, length = item.details["start"], item.details["length"]
        tokens = data.shards.document(item.document)[start : start + length].astype(np.int64)
        if self.order == "shuffled":
            generator = numpy_generator(data.seed, "text_copy", "order", item.details["number"], length)
            tokens = generator.permutation(tokens)
        return tokens

    def prompt(self, item: Item, data: ProbeData) -> NDArray[np.int64]:
        """Two copies, each on lines of its own, and the first tokens of the third."""
        passage, gap = self.passage(item, data), data.tokenizer.encode("\n\n").astype(np.int64)
        return np.concatenate([passage, gap, passage, gap, passage[: self.given]])
