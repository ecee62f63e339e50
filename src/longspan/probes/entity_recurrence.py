"""Entity recurrence: is a name or rare word that came before expected when it comes again, and from how far away?"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from longspan.engines.base import Engine
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import Asked, Item, Probe, ProbeData, register, shown
from longspan.probes.mentions import Mention, MentionKind, Read, read
from longspan.probes.suffix_identification import spread
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record

NEAREST = 64
LEAD = 32
"""Tokens before the earlier mention that are shown."""
SHORTEST_WORD = 4
TRIES = 60
"""Replacements tried for a mention."""
FEWEST_RARE = 2
"""A word of so many documents is rare however few documents there are."""


@register("entity_recurrence")
class EntityRecurrence(Probe):
    """What the earlier mention of a word saves when the word comes again `distance` tokens later.

    Names, numbers and rare lower-case words of the test documents, with no other mention in between. The text from
    shortly before the earlier mention to the later one is shown twice: as it is, and with the earlier mention replaced
    by a word of another document, of the same kind and of equally many tokens, so that nothing else moves. The
    difference in NLL at the first token of the later mention is the gain. A subject that does not look back as far as
    the earlier mention gains exactly nothing.

    Attributes:
        longest: largest distance; None: twice the training context. Distances are binned from 64 by doubling.
        per_bin: most recurrences of a bin, spread evenly over documents.
        rare: a word is rare where at most this share of the documents has it (two documents always are few).
        kinds: what counts.
        max_documents: documents that are read, drawn with the study's seed.
        min_documents: fewest documents of a bin; bins with fewer are left out.
    """

    title: ClassVar[str] = "Entity recurrence"
    explanation: ClassVar[str] = (
        "A name, number or rare word comes again after some distance. The gain is what its earlier mention saves, in "
        "nats, against the same text in which another word of the same kind and length stands there."
    )

    longest: int | None = Field(None, ge=2 * NEAREST)
    per_bin: int = Field(100, ge=1)
    rare: float = Field(0.05, gt=0, le=1)
    kinds: tuple[MentionKind, ...] = Field(("name", "number", "word"), min_length=1)
    max_documents: int = Field(200, ge=2)
    min_documents: int = Field(5, ge=1)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        unit = "nats/mention"
        return (
            Metric("gain", "Gain from the earlier mention", unit, "ratio", "higher", x_name="distance", chance=0.0),
            Metric("word_gain", "Gain over the whole word", unit, "ratio", "higher", x_name="distance", chance=0.0),
            Metric("nll", "NLL of the recurrence", unit, "ratio", "lower", x_name="distance", compare=False),
        )

    def items(self, data: ProbeData) -> list[Item]:
        """Recurrences by rising distance."""
        generator = numpy_generator(data.seed, "entity_recurrence", self.rare, *self.kinds)
        chosen = generator.permutation(len(data.shards))[: self.max_documents]
        opened = ((int(d), read(data.shards.document(int(d)), data.tokenizer)) for d in np.sort(chosen))
        documents = {document: found for document, found in opened if found is not None}
        is_rare = self._rarity(documents)
        pool: dict[tuple[MentionKind, int, bool], list[tuple[int, Mention]]] = defaultdict(list)
        for document, found in documents.items():
            for mention in found.mentions:
                if mention.kind in self.kinds and is_rare(mention):
                    pool[self._type(mention, data)].append((document, mention))
        edges = self._edges(data)
        recurrences: dict[tuple[int, int], dict[int, list[tuple[Mention, Mention]]]] = {
            span: defaultdict(list) for span in pairwise(edges)
        }
        for document, found in documents.items():
            for first, again in self._recurrences(found, is_rare):
                distance = again.start - first.start
                for low, high in recurrences:
                    if low <= distance < high:
                        recurrences[low, high][document].append((first, again))
        items: list[Item] = []
        most = 0
        for (low, high), by_document in recurrences.items():
            drawn = self._draw(data, documents, by_document, pool, generator)
            most = max(most, len({item.document for item in drawn}))
            if len({item.document for item in drawn}) >= self.min_documents:
                items += [Item(i.id, i.document, i.tokens, {**i.details, "bin": [low, high]}) for i in drawn]
        if not items:
            raise UserError(
                f"no distance has recurrences in {self.min_documents} or more documents; the best has {most} of "
                f"{len(data.shards)}",
                f"at least {self.min_documents}",
                "use more or longer test documents, raise `rare`, or lower `min_documents`",
            )
        return sorted(items, key=lambda item: item.tokens)

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """NLL of every token of the later mention, with the earlier one and with its replacement."""
        limit = engine.context_limit
        able = [item for item in items if limit is None or self._length(item) - 1 <= limit]
        nll = iter(engine.nll([text for item in able for text in self.texts(item, data)]))
        contents = []
        for item in items:
            content: dict[str, Any] = {
                "document": data.shards.ids[item.document],
                "bin": item.details["bin"],
                "kind": item.details["kind"],
            }
            if limit is None or self._length(item) - 1 <= limit:
                size = item.details["size"]
                content |= {name: next(nll)[-size:].tolist() for name in ("kept", "replaced")}
            contents.append(content)
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """x is the geometric middle of the bin of distances."""
        answer = record.answer
        if "kept" not in answer:
            return
        low, high = answer["bin"]
        place: dict[str, Any] = {"cluster": answer["document"], "x": round(math.sqrt(low * high), 1)}
        kept, replaced = answer["kept"], answer["replaced"]
        yield self.observation(record, "gain", replaced[0] - kept[0], 1.0, **place)
        yield self.observation(record, "word_gain", sum(replaced) - sum(kept), 1.0, **place)
        yield self.observation(record, "nll", kept[0], 1.0, **place)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """Both mentions with what stands before them."""
        text, _ = self.texts(item, data)
        before, size = item.details["lead"], item.details["size"]
        early = shown(data, text[: before + size])
        late = shown(data, text[max(before + size, len(text) - size - 24) : len(text) - size])
        instead = shown(data, np.array(item.details["ids"]))
        asked = f"({item.details['distance']:,} tokens) {early} [or: {instead}] … {late} ⟶"
        return Asked(asked, shown(data, text[-size:]))

    def texts(self, item: Item, data: ProbeData) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The text up to the end of the later mention: as it is, and with the earlier mention replaced."""
        details = item.details
        begin = details["first"] - details["lead"]
        text = data.shards.document(item.document)[begin : begin + self._length(item)].astype(np.int64)
        replaced = text.copy()
        replaced[details["lead"] : details["lead"] + details["size"]] = details["ids"]
        return text, replaced

    def _length(self, item: Item) -> int:
        return int(item.details["lead"] + item.details["distance"] + item.details["size"])

    def _edges(self, data: ProbeData) -> list[int]:
        longest = self.longest or max(2 * NEAREST, 2 * data.context)
        return [NEAREST * 2**k for k in range(32) if NEAREST * 2**k <= longest]

    def _rarity(self, documents: Mapping[int, Read]) -> Any:
        """Whether a mention's word is rare, and a name's not also a common word."""
        having: Counter[str] = Counter()
        common: set[str] = set()
        for found in documents.values():
            having.update({mention.word.lower() for mention in found.mentions})
            common |= {mention.word for mention in found.mentions if mention.kind == "word"}
        most = max(FEWEST_RARE, int(self.rare * len(documents)))

        def is_rare(mention: Mention) -> bool:
            if len(mention.word) < SHORTEST_WORD and mention.kind != "number":
                return False
            if mention.kind == "name" and mention.word.lower() in common:
                return False
            return having[mention.word.lower()] <= most

        return is_rare

    def _recurrences(self, found: Read, is_rare: Any) -> Iterable[tuple[Mention, Mention]]:
        """Pairs of the same word with no mention of it in between, in whatever form."""
        last: dict[str, Mention] = {}
        for mention in found.mentions:
            if mention.kind not in self.kinds or not is_rare(mention):
                continue
            before = last.get(mention.word)
            if before and before.ids == mention.ids and not found.holds(mention.word, before.stop, mention.start):
                yield before, mention
            last[mention.word] = mention

    def _draw(
        self,
        data: ProbeData,
        documents: Mapping[int, Read],
        by_document: Mapping[int, list[tuple[Mention, Mention]]],
        pool: Mapping[tuple[MentionKind, int, bool], list[tuple[int, Mention]]],
        generator: np.random.Generator,
    ) -> list[Item]:
        """Up to `per_bin` recurrences with their replacements, spread evenly over documents."""
        possible: dict[int, list[Item]] = {}
        for document, pairs in by_document.items():
            found: list[Item] = []
            for index in generator.permutation(len(pairs)):
                if len(found) == self.per_bin:
                    break
                first, again = pairs[int(index)]
                instead = self._replacement(
                    first, document, documents[document], pool[self._type(first, data)], generator
                )
                if instead is not None:
                    found.append(self._item(data, document, documents[document], first, again, instead))
            possible[document] = found
        shares = spread(self.per_bin, [len(found) for found in possible.values()])
        return [item for found, share in zip(possible.values(), shares, strict=True) for item in found[:share]]

    def _replacement(
        self,
        first: Mention,
        document: int,
        found: Read,
        alike: Sequence[tuple[int, Mention]],
        generator: np.random.Generator,
    ) -> Mention | None:
        """A mention of another document whose word this one does not hold and which begins with another token."""
        for _ in range(TRIES):
            other, mention = alike[int(generator.integers(len(alike)))]
            if other != document and mention.ids[0] != first.ids[0] and not found.holds(mention.word):
                return mention
        return None

    def _item(
        self, data: ProbeData, document: int, found: Read, first: Mention, again: Mention, instead: Mention
    ) -> Item:
        lead = min(LEAD, first.start)
        while lead and found.holds(first.word, first.start - lead, first.start):
            # A still earlier mention must not stay in the text.
            lead -= 1
        distance, size = again.start - first.start, len(first.ids)
        details = {
            "first": first.start,
            "lead": lead,
            "distance": distance,
            "size": size,
            "kind": first.kind,
            "ids": list(instead.ids),
        }
        name = f"{data.shards.ids[document]}:{again.start}"
        return Item(name, document, 2 * (lead + distance + size), details)

    def _type(self, mention: Mention, data: ProbeData) -> tuple[MentionKind, int, bool]:
        """Kind, number of tokens, and whether the first of them holds the space before the word."""
        spaced = int(data.tokenizer.token_bytes[list(mention.ids)].sum()) > len(mention.word.encode())
        return mention.kind, len(mention.ids), spaced
