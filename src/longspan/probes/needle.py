"""Needles: a fact that nobody can guess lies in a long text; can it be told at the end, from any depth?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines.base import Engine
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes import made_up
from longspan.probes.asking import (
    Question,
    Way,
    alone,
    by_generation,
    by_likelihood,
    floor_by_likelihood,
    ways_of,
)
from longspan.probes.base import Asked, Item, Probe, ProbeData, credit, register, shown
from longspan.probes.gapped_sentences import FEWEST_WORDS, NEAR, Fact, facts_of, sentence_end
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

SHORTEST = 64
READ_FOR_NEEDLES = 20_000
"""Tokens at the beginning of each document in which needles are sought."""
NEEDLES_PER_DOCUMENT = 6


@register("needle")
class Needle(Probe):
    """A value that was put into a sentence, and the sentence into a text; the sentence is begun again at the end.

    A needle is a sentence of a real document in which a number or a name is replaced by one that a seed draws, put
    between two sentences of another document. All candidates are drawn alike, so a subject that has not read the needle
    can only guess: the same questions without the text are asked too and are the floor. The values of the other needles
    of the same text are among the candidates, so it is not enough to know what stood anywhere.

    Every depth has equally many questions at every context, and the needles, their values and the text they lie in are
    the same at every context and for every subject.

    Attributes:
        contexts: all that a subject sees, answer included, in tokens; None: doublings from 256 up to twice the training
            context, as far as `min_documents` documents reach.
        depths: so many places from the beginning (0) to the end (1) of the text.
        per_cell: questions at each context and depth; more where that evens out the depths.
        needles: in one text, at different depths.
        questions: ask for `all` needles of a text or for `one`, the others are then there to mislead.
        candidates: at least as many as needles.
        haystack, needle: `documents` takes text and sentences of the test split, `made_up` plain sentences of common
            words and "The number of NAME is NUMBER."
        values: what replaces what the sentences say.
        digits: of a number.
        longest_needle: most tokens of a sentence that becomes a needle, its value not counted.
        ways: how to ask; None: all that the subject can. `likelihood` compares the candidates, `generation` wants the
            value written out exactly.
        min_documents: fewest documents for the haystacks.
    """

    title: ClassVar[str] = "Needles"
    explanation: ClassVar[str] = (
        "Sentences with a made-up number or name are hidden at several depths of a text and begun again at its end: "
        "which value was it? Without the text only guessing is left; that floor is asked of the same subject."
    )
    requires: ClassVar[frozenset[str]] = frozenset()

    contexts: tuple[int, ...] | None = None
    depths: int = Field(5, ge=1, le=20)
    per_cell: int = Field(20, ge=1)
    needles: int = Field(4, ge=1, le=20)
    questions: Literal["all", "one"] = "all"
    candidates: int = Field(8, ge=2, le=64)
    haystack: Literal["documents", "made_up"] = "documents"
    needle: Literal["documents", "made_up"] = "documents"
    values: tuple[Literal["number", "name"], ...] = ("number", "name")
    digits: int = Field(5, ge=3, le=12)
    longest_needle: int = Field(40, ge=8)
    ways: tuple[Way, ...] | None = Field(None, min_length=1)
    min_documents: int = Field(5, ge=1)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        guess = 1 / self.candidates
        found = [
            Metric("accuracy", "Accuracy", "", "proportion", "higher", "context", guess, y_name="depth", y_unit="%",
                   floor="no_context"),
            Metric("exact_match", "Written exactly", "", "proportion", "higher", "context", 0.0, y_name="depth",
                   y_unit="%", floor="no_context_exact"),
            Metric("gain", "Gain over no text", "", "difference", "higher", "context", 0.0),
        ]  # fmt: skip
        if self.needles > 1:
            swap = (self.needles - 1) / self.candidates
            title = "Value of another needle"
            found.append(Metric("swapped", title, "", "proportion", "lower", "context", swap, compare=False))
        return (
            *found,
            Metric("no_context", "Accuracy without the text", "", "proportion", "higher", chance=guess, compare=False),
            Metric(
                "no_context_exact", "Written exactly without it", "", "proportion", "higher", chance=0.0, compare=False
            ),
        )

    def check(self, engine: Engine) -> None:
        """Refuse an engine that can ask in none of the ways wanted."""
        ways_of(self.ways, engine)

    def items(self, data: ProbeData) -> list[Item]:
        """One text with its needles per item; the same texts at every context."""
        contexts, generator = self._contexts(data), numpy_generator(data.seed, "needle", *self._drawn_by())
        facts = self._facts(data, generator)
        documents = self._haystacks(data, contexts[-1])
        order = generator.permutation(documents) if len(documents) else np.zeros(1, dtype=np.int64)
        texts = [
            self._text(data, number, int(order[number % len(order)]), contexts[-1], facts)
            for number in range(self._num_texts())
        ]
        reserve = max(_question_room(data.tokenizer, text) for text in texts)
        hidden = max(sum(len(each) for each in _needles(data.tokenizer, text)) for text in texts)
        if contexts[0] < hidden + reserve + NEAR:
            raise UserError(
                f"a context of {contexts[0]} tokens for {self.needles} needles and a question",
                f"at least {hidden + reserve + NEAR}: the needles take {hidden}, question and answer {reserve}",
                "raise `contexts`, or use fewer `needles` or `needle: made_up`",
            )
        items = []
        for context in contexts:
            for number, text in enumerate(texts):
                where = "made_up" if self.haystack == "made_up" else data.shards.ids[text["haystack"]]
                details = {**text, "context": context, "room": context - reserve, "first": context == contexts[0]}
                # Texts of one document are not independent; made-up ones are.
                details["cluster"] = f"{where}:{number}" if self.haystack == "made_up" else where
                tokens = context + len(text["asked"]) * self.candidates * reserve
                items.append(Item(f"{where}:{number}@{context}", max(0, text["haystack"]), tokens, details))
        return items

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Sums of NLL of every candidate and what was written, with and without the text."""
        ways = ways_of(self.ways, engine)
        limit = engine.context_limit
        contents: list[dict[str, Any]] = []
        for item in items:
            d = item.details
            contents.append({"cluster": d["cluster"], "context": d["context"], "first": d["first"], "questions": []})
        able = [row for row, item in enumerate(items) if limit is None or item.details["context"] <= limit]
        texts = [np.concatenate([engine.document_prefix, self.text(items[row], data)]) for row in able]
        asked = [self.asked(items[row], data) for row in able]
        flat = [question for questions in asked for question in questions]
        for row, questions in zip(able, asked, strict=True):
            for place, question in zip(items[row].details["asked"], questions, strict=True):
                depth = items[row].details["depths"][place]
                others = [i for i in items[row].details["orders"][place] if i < self.needles and i != place]
                where = [items[row].details["orders"][place].index(i) for i in others]
                contents[row]["questions"].append({"depth": depth, "truth": question.truth, "others": where})
        out = [entry for row in able for entry in contents[row]["questions"]]
        if "likelihood" in ways:
            scores = [each for row in by_likelihood(engine, texts, asked) for each in row]
            floors = floor_by_likelihood(engine, flat) if flat else []
            for entry, score, floor in zip(out, scores, floors, strict=True):
                entry.update(scores=score, floor=floor)
        if "generation" in ways:
            prompts = [np.concatenate([text, q.cue]) for text, own in zip(texts, asked, strict=True) for q in own]
            written = by_generation(engine, prompts, flat)
            without = by_generation(engine, [alone(engine, question) for question in flat], flat)
            for entry, wrote, guessed in zip(out, written, without, strict=True):
                entry.update(wrote, guessed=guessed["exact"])
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """x is the context, y the depth; the floor is read once, at the shortest context."""
        answer = record.answer
        x, cluster = float(answer["context"]), answer["cluster"]
        for entry in answer["questions"]:
            y = entry["depth"]
            if "scores" in entry:
                scores = np.array(entry["scores"])
                right, guessed = (credit(np.array(entry[name]), entry["truth"]) for name in ("scores", "floor"))
                yield self.observation(record, "accuracy", right, 1.0, cluster=cluster, x=x, y=y)
                yield self.observation(record, "gain", right - guessed, 1.0, cluster=cluster, x=x)
                if self.needles > 1:
                    swapped = sum(credit(scores, other) for other in entry["others"])
                    yield self.observation(record, "swapped", min(1.0, swapped), 1.0, cluster=cluster, x=x)
                if answer["first"]:
                    yield self.observation(record, "no_context", guessed, 1.0, cluster=cluster)
            if "exact" in entry:
                yield self.observation(record, "exact_match", float(entry["exact"]), 1.0, cluster=cluster, x=x, y=y)
                if answer["first"]:
                    yield self.observation(record, "no_context_exact", float(entry["guessed"]), 1.0, cluster=cluster)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """Each needle that is asked for with its depth, its question and the candidates."""
        details, needles = item.details, _needles(data.tokenizer, item.details)
        told, answers = [], []
        for place, question in zip(details["asked"], self.asked(item, data), strict=True):
            listed = "  ".join(f"[{i + 1}] {shown(data, each, 40)}" for i, each in enumerate(question.candidates))
            depth = f"at {100 * details['depths'][place]:.0f} %"
            told.append(f"({depth}) … {shown(data, needles[place])} … ⟶ {shown(data, question.cue)} {listed}")
            answers.append(f"[{question.truth + 1}] {question.answer}")
        return Asked(f"({details['context']:,} tokens) {' '.join(told)}", "  ".join(answers))

    def text(self, item: Item, data: ProbeData) -> NDArray[np.int64]:
        """The haystack with its needles: `room` tokens."""
        details = item.details
        hidden = _needles(data.tokenizer, details)
        length = details["room"] - sum(map(len, hidden))
        hay = self._hay(data, details, length)
        parts, last = [], 0
        for depth, tokens in sorted(zip(details["depths"], hidden, strict=True), key=lambda pair: pair[0]):
            cut = max(last, sentence_end(data.tokenizer, hay, round(depth * length)))
            parts += [hay[last:cut], tokens]
            last = cut
        return np.concatenate([*parts, hay[last:]])

    def asked(self, item: Item, data: ProbeData) -> list[Question]:
        """The questions of an item."""
        details, tokenizer = item.details, data.tokenizer
        values = [_encode(tokenizer, f" {value}") for value in details["values"]]
        questions = []
        for place in details["asked"]:
            order = details["orders"][place]
            cue = np.concatenate([_encode(tokenizer, "\n"), _encode(tokenizer, f" {details['facts'][place][0]}")])
            choices = tuple(values[i] for i in order)
            questions.append(Question(cue, choices, order.index(place), details["values"][place]))
        return questions

    def _text(self, data: ProbeData, number: int, haystack: int, longest: int, facts: Sequence[Fact]) -> dict[str, Any]:
        """What lies where in text `number`: a function of its own random stream, so that texts do not hang together."""
        generator = numpy_generator(data.seed, "needle", *self._drawn_by(), "text", number)
        made_up_hay = self.haystack == "made_up"
        start = 0 if made_up_hay else int(generator.integers(int(data.shards.lengths[haystack]) - longest + 1))
        details: dict[str, Any] = {"haystack": -1 if made_up_hay else haystack, "start": start, "number": number}
        hay = "" if made_up_hay else data.tokenizer.decode(data.shards.document(haystack)[start : start + longest])
        kind = self.values[(number // self.depths) % len(self.values)]
        if self.needle == "made_up":
            kind = "number"
        chosen = self._choose([fact for fact in facts if fact.kind == kind], haystack, hay, generator)

        def draw() -> str:
            return made_up.number(generator, self.digits) if kind == "number" else made_up.name(generator)

        said = "\n".join([hay, *(fact.cue + fact.rest for fact in chosen)])
        try:
            values = made_up.equally_long(draw, self.candidates, data.tokenizer, said)
        except ValueError as error:
            raise UserError(
                f"{error}, for the needles in document {data.shards.ids[haystack]}",
                f"{self.candidates} values that the text does not hold",
                "raise `digits`, or use fewer `candidates`",
            ) from None
        # The depths take turns: over all texts every depth holds equally many needles, and equally many are asked for.
        places = [(number * (self.needles if self.questions == "all" else 1) + i) % self.depths
                  for i in range(self.needles)]  # fmt: skip
        return {
            **details,
            "facts": [(fact.cue, fact.rest) for fact in chosen],
            "values": values,
            "depths": [round(place / max(1, self.depths - 1), 4) for place in places],
            "asked": list(range(self.needles)) if self.questions == "all" else [0],
            "orders": [generator.permutation(self.candidates).tolist() for _ in range(self.needles)],
        }

    def _choose(self, facts: Sequence[Fact], haystack: int, hay: str, generator: np.random.Generator) -> list[Fact]:
        """`needles` facts with different cues, of other documents than the haystack, whose cues it does not hold."""
        chosen: dict[str, Fact] = {}
        if self.needle == "made_up":
            names = made_up.distinct(lambda: made_up.name(generator), self.needles, ())
            return [Fact("number", f"The number of {name} is", ".", -1) for name in names]
        for index in generator.permutation(len(facts)):
            fact = facts[int(index)]
            if len(chosen) == self.needles:
                break
            if fact.document != haystack and fact.cue not in hay:
                chosen.setdefault(fact.cue, fact)
        if len(chosen) < self.needles:
            raise self._few_facts(" or ".join(self.values), len(chosen))
        return list(chosen.values())

    def _facts(self, data: ProbeData, generator: np.random.Generator) -> list[Fact]:
        """Sentences with a value, a few of each document in random order, until there are plenty."""
        if self.needle == "made_up":
            return []
        found: list[Fact] = []
        plenty = 2 * self.needles * self._num_texts()
        for document in generator.permutation(len(data.shards)).tolist():
            if all(sum(fact.kind == kind for fact in found) >= plenty for kind in self.values):
                break
            text = data.tokenizer.decode(data.shards.document(document)[:READ_FOR_NEEDLES])
            own = facts_of(text, document, self.values)
            fitting = [
                fact for fact in own if len(data.tokenizer.encode(f" {fact.cue} {fact.rest}")) <= self.longest_needle
            ]
            drawn = generator.permutation(len(fitting))[:NEEDLES_PER_DOCUMENT]
            found += [fitting[int(i)] for i in drawn]
        for kind in self.values:
            cues = {fact.cue for fact in found if fact.kind == kind}
            if len(cues) < 2 * self.needles:
                raise self._few_facts(kind, len(cues))
        return found

    def _hay(self, data: ProbeData, details: dict[str, Any] | Any, length: int) -> NDArray[np.int64]:
        if details["haystack"] >= 0:
            start = details["start"]
            return data.shards.document(details["haystack"])[start : start + length].astype(np.int64)
        generator = numpy_generator(data.seed, "needle", "hay", details["number"])
        parts: list[NDArray[np.int64]] = []
        while sum(map(len, parts)) < length:
            parts.append(_encode(data.tokenizer, " ".join(["", *(made_up.sentence(generator) for _ in range(20))])))
        return np.concatenate(parts)[:length]

    def _contexts(self, data: ProbeData) -> tuple[int, ...]:
        if self.contexts is not None:
            return tuple(sorted(set(self.contexts)))
        found = [256]
        while found[-1] * 2 <= 2 * data.context:
            reach = int((data.shards.lengths >= found[-1] * 2).sum())
            if self.haystack == "documents" and reach < self.min_documents:
                break
            found.append(found[-1] * 2)
        return tuple(found)

    def _haystacks(self, data: ProbeData, longest: int) -> NDArray[np.int64]:
        if self.haystack == "made_up":
            return np.zeros(0, dtype=np.int64)
        documents = np.flatnonzero(data.shards.lengths >= longest)
        if len(documents) < self.min_documents:
            lengths = np.sort(data.shards.lengths)[::-1]
            reach = int(lengths[self.min_documents - 1]) if len(lengths) >= self.min_documents else 0
            fix = f"ask for contexts up to {reach}" if reach >= SHORTEST else "use more or longer test documents"
            raise UserError(
                f"{len(documents)} of {len(lengths)} test documents have {longest} tokens or more",
                f"at least {self.min_documents}",
                f"{fix}, lower `min_documents`, or write `haystack: made_up`",
            )
        return documents

    def _num_texts(self) -> int:
        """Fewest texts with `per_cell` questions at every depth, equally many at each."""
        each = self.needles if self.questions == "all" else 1
        turn = self.depths // math.gcd(self.depths, each)
        return math.ceil(self.per_cell * self.depths / each / turn) * turn

    def _drawn_by(self) -> list[object]:
        """The settings on which what is drawn depends."""
        return [self.depths, self.per_cell, self.needles, self.questions, self.candidates, self.haystack, self.needle]

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.contexts is not None and min(self.contexts, default=0) < SHORTEST:
            raise UserError(
                f"contexts {list(self.contexts)}",
                f"one or more lengths from {SHORTEST} on",
                f"raise or leave out those below {SHORTEST}; without `contexts`, they follow from training's",
            )
        if self.needles > self.depths:
            raise UserError(
                f"{self.needles} needles at {self.depths} depths", "one needle a depth at most", "raise `depths`"
            )
        if self.needles > self.candidates:
            raise UserError(
                f"{self.needles} needles and {self.candidates} candidates",
                "at least as many candidates as needles: every needle's value is one",
                "raise `candidates`",
            )
        if not self.values:
            raise UserError("values = []", "number, name", "name one or both in `values`")
        return self

    def _few_facts(self, kind: str, found: int) -> UserError:
        return UserError(
            f"{found} short sentences of the test documents hold a {kind} behind {FEWEST_WORDS} words",
            f"at least {2 * self.needles} in several documents",
            "name another kind in `values`, write `needle: made_up`, use fewer `needles`, or more test documents",
        )


def _needles(tokenizer: Tokenizer, text: Any) -> list[NDArray[np.int64]]:
    """Ids of each needle: cue, value and rest, so that the value has the same ids here and in the question."""
    return [
        np.concatenate([_encode(tokenizer, part) for part in (f" {cue}", f" {value}", rest)])
        for (cue, rest), value in zip(text["facts"], text["values"], strict=False)
    ]


def _question_room(tokenizer: Tokenizer, text: Any) -> int:
    """Tokens of the longest question with its answer, a document prefix included."""
    longest = max(len(_encode(tokenizer, f" {cue}")) for cue, _ in text["facts"])
    return longest + len(_encode(tokenizer, "\n")) + len(_encode(tokenizer, f" {text['values'][0]}")) + 1


def _encode(tokenizer: Tokenizer, text: str) -> NDArray[np.int64]:
    return tokenizer.encode(text).astype(np.int64)
