"""Suffix identification: does more context help to tell the true continuation from those of other documents?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from longspan.engines.base import Engine
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import Asked, Item, Probe, ProbeData, credit, register, shown
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

BASE_CONTEXT = 64
"""The context that long-range gain is measured against."""

SPANS_FOR_EDGES = 2_000
"""Random spans from which the edges of the bins are read."""

TRIES_PER_CANDIDATE = 40
"""Random spans tried for each wrong candidate and bin before the corpus counts as too uniform."""


@register("suffix_identification")
class SuffixIdentification(Probe):
    """Which of `candidates` spans continues the text? The likeliest is the answer; chance is 1 / candidates.

    Documents, target positions and candidates are the same at every context and for every subject; only the number of
    tokens before the target changes. Wrong candidates come from other documents and from the same of `bins` equally
    filled bins of unigram NLL as the truth, so that plain word frequency neither gives it away nor hides it (the spans
    nearest to the truth would lie on both sides of it, and a subject that knows word frequencies alone would score
    below chance). All candidates have the same number of tokens.

    Attributes:
        contexts: tokens before the target; None: 64 and its doublings up to twice the training context, as far as
            `min_documents` documents reach. 64 is always among them.
        suffix: tokens of each candidate.
        candidates: the true one and so many less one wrong ones.
        num_items: questions, spread evenly over the documents; fewer where their targets would overlap.
        min_documents: fewest documents.
        bins: bins of unigram NLL; 1 leaves word frequency unmatched.
        score: compare `sum` of NLL, or NLL `per_token`; the same here, since candidates are equally long. Records hold
            sums and lengths, so either can be read from them.
    """

    title: ClassVar[str] = "Suffix identification"
    explanation: ClassVar[str] = (
        "The subject sees some text and picks its true continuation among spans of other documents with equally common "
        "words. The gain is what a longer context adds to the accuracy with 64 tokens, on the same questions."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"score"})
    only_read: ClassVar[frozenset[str]] = frozenset({"score"})

    contexts: tuple[int, ...] | None = None
    suffix: int = Field(16, ge=1)
    candidates: int = Field(4, ge=2, le=64)
    num_items: int = Field(200, ge=1)
    min_documents: int = Field(5, ge=2)
    bins: int = Field(16, ge=1, le=64)
    score: Literal["sum", "per_token"] = "sum"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        return (
            Metric("accuracy", "Accuracy", "", "proportion", "higher", x_name="context", chance=1 / self.candidates),
            Metric("long_range_gain", "Gain over 64 tokens", "", "difference", "higher", x_name="context", chance=0.0),
            Metric("margin", "Margin of the truth", "nats/token", "ratio", "higher", x_name="context"),
        )

    def items(self, data: ProbeData) -> list[Item]:
        """Targets evenly over the documents that are long enough for the longest context."""
        contexts = self._contexts(data)
        reach = contexts[-1]
        documents = np.flatnonzero(data.shards.lengths >= reach + self.suffix)
        if len(documents) < self.min_documents:
            raise self._too_few(data, reach, len(documents))
        generator = numpy_generator(data.seed, "suffix_identification", self.suffix, self.candidates, *contexts)
        surprise_V = unigram_nll(data)
        edges = self._edges(data, surprise_V, generator)
        lasts = data.shards.lengths[documents] - self.suffix
        # Targets of one document never overlap: one per slot of `suffix` tokens.
        slots = ((lasts - reach) // self.suffix + 1).tolist()
        items = []
        for document, room, count in zip(documents.tolist(), slots, spread(self.num_items, slots), strict=True):
            chosen = np.sort(generator.choice(room, size=count, replace=False))
            for number, slot in enumerate(chosen.tolist()):
                position = reach + slot * self.suffix
                truth = data.shards.document(document)[position : position + self.suffix]
                wrong = self._distractors(data, document, truth, surprise_V, edges, generator)
                details = {
                    "position": position,
                    "contexts": list(contexts),
                    "wrong": wrong,
                    "place": int(generator.integers(self.candidates)),
                }
                name = f"{data.shards.ids[document]}:{number}"
                tokens = sum(contexts) + len(contexts) * self.candidates * self.suffix
                items.append(Item(name, document, tokens, details))
        return items

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Sums of NLL of every candidate at every context that the subject can take."""
        choices = [self.choices(item, data) for item in items]
        scores: list[dict[str, list[float]]] = [{} for _ in items]
        for context in items[0].details["contexts"]:
            if engine.context_limit is not None and context + self.suffix - 1 > engine.context_limit:
                continue
            prefixes = []
            for item in items:
                end = item.details["position"]
                # Inside a document: no marker, which would say that it begins here.
                prefixes.append(data.shards.document(item.document)[end - context : end])
            for row, nll in enumerate(engine.score_many(prefixes, choices)):
                scores[row][str(context)] = [float(values.sum()) for values in nll]
        return [
            {
                "document": data.shards.ids[item.document],
                "truth": item.details["place"],
                "tokens": [len(choice) for choice in some],
                "scores": score,
            }
            for item, some, score in zip(items, choices, scores, strict=True)
        ]

    def observe(self, record: Record) -> Iterable[Observation]:
        """Credit of the truth, its change against 64 tokens, and its lead over the best wrong candidate."""
        answer = record.answer
        truth, lengths = answer["truth"], np.array(answer["tokens"], dtype=np.float64)
        divisor = lengths if self.score == "per_token" else np.ones_like(lengths)
        credits = {}
        for context, sums in answer["scores"].items():
            scores = np.array(sums, dtype=np.float64) / divisor
            credits[int(context)] = credit(scores, truth)
            x, cluster = float(context), answer["document"]
            yield self.observation(record, "accuracy", credits[int(context)], 1.0, cluster=cluster, x=x)
            per_token = np.array(sums) / lengths
            lead = float(np.delete(per_token, truth).min() - per_token[truth]) * float(lengths[truth])
            yield self.observation(record, "margin", lead, float(lengths[truth]), cluster=cluster, x=x)
        for context, value in credits.items():
            if context > BASE_CONTEXT and BASE_CONTEXT in credits:
                gain = value - credits[BASE_CONTEXT]
                yield self.observation(
                    record, "long_range_gain", gain, 1.0, cluster=answer["document"], x=float(context)
                )

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The end of the context and all candidates."""
        end = item.details["position"]
        before = shown(data, data.shards.document(item.document)[max(0, end - 60) : end])
        listed = "  ".join(f"[{i + 1}] {shown(data, choice, 80)}" for i, choice in enumerate(self.choices(item, data)))
        return Asked(f"… {before} ⟶ {listed}", f"[{item.details['place'] + 1}]")

    def choices(self, item: Item, data: ProbeData) -> list[NDArray[Any]]:
        """The candidates in the order asked."""
        position = item.details["position"]
        spans = [data.shards.document(d)[start : start + self.suffix] for d, start in item.details["wrong"]]
        spans.insert(item.details["place"], data.shards.document(item.document)[position : position + self.suffix])
        return spans

    @model_validator(mode="after")
    def _contexts_are_lengths(self) -> Self:
        if self.contexts is not None and min(self.contexts, default=0) < 1:
            raise UserError(f"contexts {list(self.contexts)}", "one or more positive lengths", "mend `contexts`")
        return self

    def _contexts(self, data: ProbeData) -> tuple[int, ...]:
        if self.contexts is not None:
            return tuple(sorted({BASE_CONTEXT, *self.contexts}))
        found = [BASE_CONTEXT]
        while found[-1] * 2 <= 2 * data.context:
            enough = int((data.shards.lengths >= found[-1] * 2 + self.suffix).sum()) >= self.min_documents
            if not enough:
                break
            found.append(found[-1] * 2)
        return tuple(found)

    def _edges(
        self, data: ProbeData, surprise_V: NDArray[np.float64], generator: np.random.Generator
    ) -> NDArray[np.float64]:
        """Inner edges of the bins: quantiles of the unigram NLL of random spans."""
        long_enough = np.flatnonzero(data.shards.lengths >= self.suffix)
        sums = [surprise_V[self._span(data, long_enough, generator)[2]].sum() for _ in range(SPANS_FOR_EDGES)]
        edges: NDArray[np.float64] = np.quantile(sums, np.arange(1, self.bins) / self.bins)
        return edges

    def _span(
        self, data: ProbeData, documents: NDArray[np.int64], generator: np.random.Generator
    ) -> tuple[int, int, NDArray[Any]]:
        document = int(generator.choice(documents))
        start = int(generator.integers(int(data.shards.lengths[document]) - self.suffix + 1))
        return document, start, data.shards.document(document)[start : start + self.suffix]

    def _distractors(
        self,
        data: ProbeData,
        document: int,
        truth: NDArray[Any],
        surprise_V: NDArray[np.float64],
        edges: NDArray[np.float64],
        generator: np.random.Generator,
    ) -> list[tuple[int, int]]:
        """(document, start) of the wrong candidates: random spans of the truth's bin, none equal to another."""
        others = np.flatnonzero(data.shards.lengths >= self.suffix)
        others = others[others != document]
        wanted = np.searchsorted(edges, surprise_V[truth].sum())
        seen = {truth.tobytes()}
        drawn: list[tuple[int, int]] = []
        tries = TRIES_PER_CANDIDATE * self.bins * self.candidates
        for _ in range(tries if len(others) else 0):
            if len(drawn) == self.candidates - 1:
                return drawn
            other, start, span = self._span(data, others, generator)
            if np.searchsorted(edges, surprise_V[span].sum()) == wanted and span.tobytes() not in seen:
                seen.add(span.tobytes())
                drawn.append((other, start))
        if len(drawn) == self.candidates - 1:
            return drawn
        raise UserError(
            f"{len(drawn)} different spans of {self.suffix} tokens outside document {data.shards.ids[document]} are as "
            "common as the truth",
            f"at least {self.candidates - 1}, one for each wrong candidate",
            "use more varied text, fewer `candidates` or `bins`, or another `suffix`",
        )

    def _too_few(self, data: ProbeData, reach: int, found: int) -> UserError:
        lengths = np.sort(data.shards.lengths)[::-1]
        needed = self.min_documents
        longest = int(lengths[needed - 1]) - self.suffix if len(lengths) >= needed else 0
        fix = f"ask for contexts up to {longest}" if longest >= BASE_CONTEXT else "use more or longer test documents"
        return UserError(
            f"{found} of {len(lengths)} test documents have {reach} + {self.suffix} tokens or more",
            f"at least {needed} for contexts up to {reach}",
            f"{fix}, or lower `min_documents`",
        )


def unigram_nll(data: ProbeData) -> NDArray[np.float64]:
    """-log of each token's share of the split (add one), float64 (V,): how uncommon it is."""
    counts = np.ones(data.tokenizer.vocab_size, dtype=np.float64)
    for document in data.shards:
        counts += np.bincount(document, minlength=len(counts))
    nll: NDArray[np.float64] = np.log(counts.sum()) - np.log(counts)
    return nll


def spread(total: int, room: Sequence[int]) -> list[int]:
    """`total` over places as evenly as their room allows; less where there is not room for all."""
    given = [0] * len(room)
    left = min(total, sum(room))
    while left:
        free = [place for place in range(len(room)) if given[place] < room[place]]
        for place in free[:left]:
            given[place] += 1
        left -= min(left, len(free))
    return given
