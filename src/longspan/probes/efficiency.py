"""Efficiency: what a request costs at growing context, alone on this machine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from longspan.engines.base import Engine, Sampling
from longspan.foundation.errors import UserError
from longspan.foundation.randomness import numpy_generator
from longspan.probes.base import Asked, Item, Probe, ProbeData, register
from longspan.records.observation import Metric, Observation
from longspan.records.store import Record


@register("efficiency")
class Efficiency(Probe):
    """One request at a time: a fresh prompt of exactly so many tokens of the corpus, then tokens one by one.

    Time to first token is from sending the prompt to the first token; prefill rate is prompt tokens over that time;
    time per output token leaves out the first. Medians with quartiles over `repeats`, after `warm_ups` that are not
    counted. Records also hold the state bytes of a sequence.

    Attributes:
        contexts: prompt lengths; None: 1/2, 1, 2, 4 and 8 times the training context.
        new_tokens: tokens generated, at least 2.
        repeats: counted runs at each context.
        warm_ups: runs before them.
    """

    title: ClassVar[str] = "Cost against context"
    explanation: ClassVar[str] = (
        "What one request costs at growing context: prefill rate, time to the first token, time per further token. "
        "Medians with quartiles over repeats on this machine."
    )
    requires: ClassVar[frozenset[str]] = frozenset({"generate"})
    place: ClassVar[Literal["quality", "cost"]] = "cost"

    contexts: tuple[int, ...] | None = None
    new_tokens: int = Field(32, ge=2)
    repeats: int = Field(5, ge=3)
    warm_ups: int = Field(2, ge=0)

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """In order of importance."""
        return (
            Metric("prefill_rate", "Prefill", "tok/s", "median", "higher", x_name="context", compare=False),
            Metric("first_token", "Time to first token", "ms", "median", "lower", x_name="context", compare=False),
            Metric("output_token", "Time per output token", "ms", "median", "lower", x_name="context", compare=False),
        )

    def items(self, data: ProbeData) -> list[Item]:
        """One item per context."""
        contexts = self.contexts or tuple(sorted({max(2, data.context * k // 2) for k in (1, 2, 4, 8, 16)}))
        if min(contexts) < 1:
            raise UserError(f"contexts {list(contexts)}", "positive lengths", "mend `contexts`")
        if data.shards.num_tokens == 0:
            raise UserError("the test split is empty", "some text for prompts", "give it a larger share")
        return [Item(f"context-{n}", 0, n * (self.repeats + self.warm_ups), {"context": n}) for n in contexts]

    def batches(self, items: Sequence[Item]) -> Iterator[list[Item]]:
        """One context at a time."""
        return iter([[item] for item in items])

    def answer(self, engine: Engine, items: Sequence[Item], data: ProbeData) -> list[dict[str, Any]]:
        """Seconds of each run, and state bytes; no runs where the subject cannot take the context."""
        contents = []
        for item in items:
            context = item.details["context"]
            content: dict[str, Any] = {"context": context, "new_tokens": self.new_tokens, "runs": []}
            limit = engine.context_limit
            if limit is None or context + self.new_tokens - 1 <= limit:
                sampling = Sampling(max_new_tokens=self.new_tokens, stop_at_boundary=False)
                for run in range(self.warm_ups + self.repeats):
                    (written,) = engine.generate([self._prompt(data, context, run)], sampling)
                    if run >= self.warm_ups:
                        content["runs"].append([written.first_token_seconds, written.decode_seconds])
                content["state_bytes"] = engine.state_bytes(context)
            contents.append(content)
        return contents

    def observe(self, record: Record) -> Iterable[Observation]:
        """Each run is an observation of its own."""
        context, further = record.answer["context"], record.answer["new_tokens"] - 1
        x = float(context)
        for run, (first, decode) in enumerate(record.answer["runs"]):
            for metric, numerator, denominator in (
                ("prefill_rate", context, first),
                ("first_token", 1e3 * first, 1.0),
                ("output_token", 1e3 * decode, further),
            ):
                item = f"{record.item}:{run}"
                yield Observation(record.subject, record.seed, item, item, metric, x, numerator, denominator)

    def describe(self, item: Item, data: ProbeData) -> Asked:
        """The size of the request."""
        del data
        return Asked(f"a prompt of {item.details['context']} tokens, then {self.new_tokens} tokens one by one")

    def _prompt(self, data: ProbeData, context: int, run: int) -> np.ndarray:
        """Documents in another order for every run; repeated where the split is shorter than the prompt."""
        order = numpy_generator(data.seed, "efficiency", context, run).permutation(data.shards.num_documents)
        parts: list[np.ndarray] = []
        total = 0
        while total < context:
            for document in order.tolist():
                parts.append(data.shards.document(document))
                total += len(parts[-1])
                if total >= context:
                    break
        return np.concatenate(parts)[:context]
