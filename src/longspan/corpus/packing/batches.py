"""Batches of packed rows: endless and shuffled for training, one ordered pass for evaluation.

T is the context, B the rows of a batch. Everything random is a pure function of (seed, epoch), so a position in the
data is two numbers, and going on from it is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longspan.corpus.packing.best_fit import BestFitPlan
from longspan.corpus.packing.concat import ConcatPlan
from longspan.corpus.packing.config import PackingConfig
from longspan.corpus.packing.one_document import OneDocumentPlan
from longspan.corpus.packing.plan import Pieces, Plan
from longspan.corpus.shards import TokenShards
from longspan.corpus.tokenizer import SpecialTokens
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.randomness import numpy_generator

IGNORE = -100
"""The target of a position without loss."""


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows of T positions, all int32 (B, T).

    Attributes:
        tokens: input ids; the pad id where a row has no document.
        targets: the id that follows, or `IGNORE`.
        doc_id: equal values in a row = same document; -1 on padding. In training documents are numbered from 0 within
            the batch; `evaluation_batches` gives each document's index in the shards.
        samples: strings of a task whose whole answer carries loss; 0 for text.
    """

    tokens: np.ndarray
    targets: np.ndarray
    doc_id: np.ndarray
    samples: int = 0


@dataclass(slots=True)
class _Counts:
    """What went out so far. An element is a text token or a marker; `fresh` ones were not shown before in the pass."""

    batches: int = 0
    rows: int = 0
    positions: int = 0
    padding: int = 0
    fresh: int = 0
    repeated: int = 0
    targets: int = 0
    targets_repeated: int = 0


class PackedBatches(Iterator[Batch]):
    """Training batches without end; each epoch shuffles documents (so their neighbours) and rows anew.

    Args:
        shards: the training split.
        packing: how documents fill rows.
        context: T.
        rows: B. A batch may hold the last rows of one epoch and the first of the next.
        special: the tokenizer's special ids.
        seed: decides every order.

    Raises:
        DataError: no document in the shards.
        UserError: nothing fills a row (every document is shorter than the context), or overlap ≥ context.
    """

    def __init__(
        self,
        shards: TokenShards,
        packing: PackingConfig,
        *,
        context: int,
        rows: int,
        special: SpecialTokens,
        seed: int,
    ) -> None:
        self._rows = _RowMaker(shards, packing, context, special)
        self._num_rows = rows
        self._seed = seed
        self._identity = {
            "shards": shards.fingerprint,
            "packing": packing.model_dump(mode="json"),
            "context": context,
            "rows": rows,
            "special": [special.boundary, special.pad],
            "seed": seed,
        }
        self._counts = _Counts()
        self._enter(epoch=0, row=0)

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the current epoch; `best_fit` may need one more or less in another."""
        return self._plan.num_rows

    def __next__(self) -> Batch:
        """The next batch."""
        parts: list[Pieces] = []
        missing = self._num_rows
        while missing:
            if self._row == self._plan.num_rows:
                self._enter(self._epoch + 1, 0)
            rows = self._order[self._row : self._row + missing]
            parts.append(self._plan.pieces(rows))
            self._row += len(rows)
            missing -= len(rows)
        return self._rows.fill(_join(parts), self._num_rows, self._counts, evaluation=False)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data and the ledger so far; JSON-able."""
        return {
            "identity": self._identity,
            "epoch": self._epoch,
            "row": self._row,
            "counts": {name: getattr(self._counts, name) for name in _Counts.__slots__},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state` was taken.

        Raises:
            UserError: the state is of other data or settings.
        """
        check_identity(state["identity"], self._identity)
        self._counts = _Counts(**state["counts"])
        self._enter(state["epoch"], state["row"])

    def ledger(self) -> dict[str, Any]:
        """Where every token went; JSON-able. An element is a text token or a marker.

        `elements_in` (all epochs begun) = `elements` (shown) + `remaining` (of the current epoch)
        + the tokens and markers under `dropped`; `tests/corpus/test_packing.py` holds it to that.

        - `documents`, `tokens`, `markers`: of one epoch; `epochs`: passes made, the fraction by rows
        - `batches`, `rows`, `positions` (rows × T), `padding` (positions without a document)
        - `elements`: shown for the first time in their epoch; `repeated`: shown again, as context at a row's beginning
        - `targets`: positions with loss; `targets_repeated`: of these, trained again because of `overlap`
        - `unscored`: shown, but never a target: nothing that may predict them comes before them
        - `dropped`: reason → documents, tokens, markers, over all epochs begun
        """
        counts, plan, epochs = self._counts, self._plan, self._epoch + 1
        per_epoch = self._rows.num_elements
        dropped = {
            reason: {
                "documents": lost.documents * epochs,
                "tokens": lost.tokens * epochs,
                "markers": lost.markers * epochs,
            }
            for reason, lost in plan.dropped.items()
        }
        lost = sum(entry["tokens"] + entry["markers"] for entry in dropped.values())
        return {
            "documents": self._rows.shards.num_documents,
            "tokens": self._rows.shards.num_tokens,
            "markers": per_epoch - self._rows.shards.num_tokens,
            "epochs": self._epoch + self._row / plan.num_rows,
            "batches": counts.batches,
            "rows": counts.rows,
            "positions": counts.positions,
            "padding": counts.padding,
            "elements_in": per_epoch * epochs,
            "elements": counts.fresh,
            "repeated": counts.repeated,
            "remaining": per_epoch * epochs - lost - counts.fresh,
            "targets": counts.targets,
            "targets_repeated": counts.targets_repeated,
            "unscored": counts.fresh - (counts.targets - counts.targets_repeated),
            "dropped": dropped,
        }

    def _enter(self, epoch: int, row: int) -> None:
        generator = numpy_generator(self._seed, "packing", epoch)
        self._plan = self._rows.plan(generator.permutation(self._rows.shards.num_documents), evaluation=False)
        self._order = generator.permutation(self._plan.num_rows)
        self._epoch = epoch
        self._row = row


def check_identity(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuse to go on from a place that was saved with other data or settings.

    Raises:
        UserError: naming what differs.
    """
    for name, value in own.items():
        if saved.get(name) != value:
            raise UserError(
                f"the saved position in the data is for {name} = {saved.get(name)}, not {value}",
                "the data and settings it was saved with",
                "restore them, or start the training anew in another directory",
            )


def evaluation_batches(
    shards: TokenShards, packing: PackingConfig, *, context: int, rows: int, special: SpecialTokens
) -> Iterator[Batch]:
    """One pass in the order of the shards; every target is scored exactly once.

    Nothing is dropped: `chunks` keeps the remainders of documents as padded rows here, so that subjects packed
    differently in training are validated on the same text. The last batch is filled up with rows of padding.

    Raises:
        DataError: no document in the shards.
        UserError: overlap ≥ context.
    """
    maker = _RowMaker(shards, packing, context, special)
    plan = maker.plan(np.arange(shards.num_documents), evaluation=True)
    return (
        maker.fill(plan.pieces(np.arange(start, min(start + rows, plan.num_rows))), rows, _Counts(), evaluation=True)
        for start in range(0, plan.num_rows, rows)
    )


class _RowMaker:
    """Turns plans into rows."""

    def __init__(self, shards: TokenShards, packing: PackingConfig, context: int, special: SpecialTokens) -> None:
        if shards.num_documents == 0:
            raise DataError(
                f"the split in {shards.folder} is empty", "at least one document", "use more text or other splits"
            )
        if packing.overlap >= context:
            raise UserError(f"overlap {packing.overlap}", f"less than the context ({context})", "lower the overlap")
        self.shards = shards
        self._packing = packing
        self._context = context
        self._special = special
        self._elements = shards.lengths + int(packing.markers)
        self.num_elements = int(self._elements.sum())

    def plan(self, order: np.ndarray, *, evaluation: bool) -> Plan:
        """One pass over the documents in `order`."""
        packing, context = self._packing, self._context
        plan: Plan
        if packing.method == "concat":
            plan = ConcatPlan(self._elements, order, context=context, overlap=packing.overlap)
        elif packing.method == "best_fit":
            plan = BestFitPlan(self._elements, order, context=context)
        else:
            plan = OneDocumentPlan(
                self._elements,
                order,
                context=context,
                overlap=packing.overlap,
                markers=packing.markers,
                full_only=packing.method == "chunks" and not evaluation,
            )
        if plan.num_rows == 0:
            raise UserError(
                f"every document is shorter than the context: the longest has {int(self.shards.lengths.max())} tokens,"
                f" a full chunk at context {context} takes {context + 1 - int(packing.markers)}",
                "a document that fills a chunk, or a packing that does not need one",
                "lower the context, use longer documents, or pack with best_fit, concat or one_per_row",
            )
        return plan

    def fill(self, pieces: Pieces, num_rows: int, counts: _Counts, *, evaluation: bool) -> Batch:
        """The batch that `pieces` make; adds to `counts`."""
        width = self._context + 1
        ids = np.full(num_rows * width, self._special.pad, np.int32)
        document = np.full(num_rows * width, -1, np.int32)
        fresh = np.ones(num_rows * width, bool)
        no_target = np.zeros(num_rows * width, bool)
        at = pieces.row * width + _offsets(pieces)
        labels = pieces.document if evaluation else np.arange(len(at))
        document[_ranges(at, pieces.length)] = np.repeat(labels, pieces.length)
        fresh[_ranges(at, pieces.repeated)] = False
        # A piece that goes on with its document begins with what the piece before it has already predicted.
        no_target[at[pieces.start > 0]] = True
        self._copy(ids, at, pieces)

        grid = (num_rows, width)
        here, following = document.reshape(grid)[:, :-1], document.reshape(grid)[:, 1:]
        following_fresh = fresh.reshape(grid)[:, 1:]
        scored = (following >= 0) & ~no_target.reshape(grid)[:, 1:]
        if not self._packing.loss_crosses_boundary:
            scored &= here == following
        if evaluation:
            scored &= following_fresh
        counts.batches += 1
        counts.rows += num_rows
        counts.positions += here.size
        counts.padding += int((here < 0).sum())
        counts.fresh += int((fresh & (document >= 0)).sum())
        counts.repeated += int((~fresh).sum())
        counts.targets += int(scored.sum())
        counts.targets_repeated += int((scored & ~following_fresh).sum())
        return Batch(
            tokens=np.ascontiguousarray(ids.reshape(grid)[:, :-1]),
            targets=np.where(scored, ids.reshape(grid)[:, 1:], np.int32(IGNORE)),
            doc_id=np.ascontiguousarray(here),
        )

    def _copy(self, ids: np.ndarray, at: np.ndarray, pieces: Pieces) -> None:
        markers = int(self._packing.markers)
        ids[at[pieces.start == 0]] = self._special.boundary  # overwritten below where there are no markers
        begins = (markers > 0) & (pieces.start == 0)
        into = at + begins
        start = pieces.start + begins - markers
        stop = pieces.start + pieces.length - markers
        document = self.shards.document
        for index, to, first, last in zip(
            pieces.document.tolist(), into.tolist(), start.tolist(), stop.tolist(), strict=True
        ):
            ids[to : to + last - first] = document(index)[first:last]


def _join(parts: list[Pieces]) -> Pieces:
    if len(parts) == 1:
        return parts[0]
    rows_before = np.cumsum([0, *(int(part.row[-1]) + 1 for part in parts)])
    return Pieces(
        row=np.concatenate([part.row + before for part, before in zip(parts, rows_before[:-1], strict=True)]),
        document=np.concatenate([part.document for part in parts]),
        start=np.concatenate([part.start for part in parts]),
        length=np.concatenate([part.length for part in parts]),
        repeated=np.concatenate([part.repeated for part in parts]),
    )


def _offsets(pieces: Pieces) -> np.ndarray:
    """Where each piece begins within its row."""
    before = np.cumsum(pieces.length) - pieces.length
    first = np.searchsorted(pieces.row, pieces.row, side="left")
    offsets: np.ndarray = before - before[first]
    return offsets


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions starts[i] … starts[i] + lengths[i] - 1 of all i."""
    total = int(lengths.sum())
    shift = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    positions: np.ndarray = shift + np.arange(total)
    return positions
