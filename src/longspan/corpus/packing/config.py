"""The settings of packing, and what they exclude."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from longspan.foundation.config import Config
from longspan.foundation.errors import UserError


class PackingConfig(Config):
    """How documents fill rows.

    Attributes:
        method:
            `concat`: documents one after another in a stream that is cut into rows; only the last row is padded.
            `best_fit`: documents (cut where longer than a row) are sorted into rows so that few are cut and little
            is padded.
            `one_per_row`: a row holds one document or one part of one; the rest is padding.
            `chunks`: a row is one full chunk of one document; what does not fill a chunk is dropped and counted.
        markers: put the boundary id before each document; without, no boundary signal is left in the ids.
        overlap: tokens that a row repeats from the row before it (of the same document or stream) as extra context,
            so that rows advance by `context - overlap`. In training repeated tokens are targets again; in evaluation
            each is scored once, in the row that shows it first. Not with `best_fit`.
        isolation: what crosses a document boundary (see the models); here it only decides whether loss may.
        loss_crosses_boundary: the first element of a document is also a target, predicted from the document before
            it; only with isolation `none`.
    """

    method: Literal["concat", "best_fit", "one_per_row", "chunks"] = "concat"
    markers: bool = True
    overlap: int = Field(default=0, ge=0)
    isolation: Literal["full", "attention", "state", "none"] = "full"
    loss_crosses_boundary: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss_crosses_boundary and self.isolation != "none":
            raise UserError(
                f"loss_crosses_boundary with isolation `{self.isolation}`",
                "loss across a boundary only where nothing is isolated",
                "set isolation: none, or loss_crosses_boundary: false",
            )
        if self.overlap and self.method == "best_fit":
            raise UserError(
                f"overlap {self.overlap} with method `best_fit`",
                "overlap with concat, one_per_row or chunks",
                "set overlap: 0 or choose another method",
            )
        return self
