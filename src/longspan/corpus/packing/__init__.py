"""How documents fill the rows of a batch: one file per method, one file for the batches, one for the ledger.

A document of n tokens is a sequence of *elements*: with markers the boundary id and then its tokens (n + 1), without
markers its tokens alone (n), so that nothing in the ids tells where a document begins. A row of context T holds up to
T + 1 elements: `tokens = row[:-1]`, `targets = row[1:]`.
"""

from __future__ import annotations

from longspan.corpus.packing.batches import IGNORE, Batch, PackedBatches, evaluation_batches
from longspan.corpus.packing.config import PackingConfig

__all__ = ["IGNORE", "Batch", "PackedBatches", "PackingConfig", "evaluation_batches"]
