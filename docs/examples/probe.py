"""A probe of one's own: how much of a passage's loss is saved when the same passage stands right before it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from longspan.engines.base import Engine
from longspan.foundation.errors import UserError
from longspan.probes.base import Item, Probe, ProbeData, register
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record


@register("repetition")
class Repetition(Probe):
    """The beginning of a document is shown twice; the second copy costs less the better a subject can look back.

    Attributes:
        lengths: tokens of the passage.
        max_documents: the first so many of the split that are long enough.
    """

    title: ClassVar[str] = "Repetition"
    explanation: ClassVar[str] = (
        "A passage is shown twice in a row. Saved is the loss per token of the first copy minus that of the second: "
        "what a subject gains by finding the passage again."
    )

    lengths: tuple[int, ...] = (16, 64, 256)
    max_documents: int = Field(64, ge=1)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        return (
            Metric("saved", "Saved by the first copy", "nats/token", "ratio", "higher", x_name="length", chance=0.0),
            Metric("nll_second", "NLL of the second copy", "nats/token", "ratio", "lower", x_name="length"),
        )

    def items(self, data: ProbeData) -> list[Item]:
        """One item per document that is long enough for every length, so that all lengths ask the same documents."""
        longest = max(self.lengths)
        documents = np.flatnonzero(data.shards.lengths >= longest)[: self.max_documents].tolist()
        if not documents:
            raise UserError(
                f"no test document has {longest} tokens", "at least one as long as the longest of `lengths`", "lower it"
            )
        return [Item(data.shards.ids[i], i, 2 * sum(self.lengths)) for i in documents]

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """NLL sums of both copies at every length that the subject can take in."""
        prefix, limit = engine.document_prefix, engine.context_limit
        lengths = [n for n in self.lengths if limit is None or len(prefix) + 2 * n - 1 <= limit]
        passages = [data.shards.document(item.document)[:n] for item in items for n in lengths]
        nlls = iter(engine.nll([np.concatenate([prefix, passage, passage]) for passage in passages]))
        contents = []
        for _ in items:
            sums = []
            for n in lengths:
                # The last n - 1 predictions are those of the second copy without its first token; a passage earlier
                # stand those of the first copy without its first token, which no subject is asked for.
                nll = next(nlls)
                sums.append([n, float(nll[-2 * n + 1 : -n].sum()), float(nll[-n + 1 :].sum())])
            contents.append({"lengths": sums})
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """Both sums over n - 1 tokens; documents are what resampling draws."""
        for n, first, second in record.answer["lengths"]:
            yield self.observation(record, "saved", first - second, n - 1, cluster=record.item, x=float(n))
            yield self.observation(record, "nll_second", second, n - 1, cluster=record.item, x=float(n))
