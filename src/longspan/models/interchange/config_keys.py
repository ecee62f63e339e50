"""A checkpoint's config.json, read so that nothing in it is ignored unseen: what no one asked for is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from longspan.foundation.errors import UserError
from longspan.models.interchange.json_object import read_object

CONFIG = "config.json"

# Training, bookkeeping, generation and output options of transformers: none changes a logit. Special ids come from the
# tokenizer's files.
WITHOUT_INFLUENCE = frozenset({
    "_attn_implementation_autoset", "_model_name_or_path", "_name_or_path", "architectures", "attention_dropout",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "finetuning_task", "gradient_checkpointing",
    "hidden_dropout", "id2label", "initializer_range", "label2id", "max_position_embeddings", "output_attentions",
    "output_hidden_states", "pad_token_id", "problem_type", "rescale_prenorm_residual", "residual_in_fp32",
    "return_dict", "sep_token_id", "task_specific_params", "torch_dtype", "transformers.js_config",
    "transformers_version", "unk_token_id", "use_cache",
})  # fmt: skip


class ConfigKeys:
    """The keys of a config.json, each of which must be taken, or named as having no influence, before `finish`.

    Args:
        values: the file's content.
        where: the file, for errors.
    """

    def __init__(self, values: Mapping[str, Any], where: Path) -> None:
        self.where = where
        self._values = dict(values)
        self._seen = {"model_type", *WITHOUT_INFLUENCE}

    @staticmethod
    def load(folder: Path) -> ConfigKeys:
        """Read `folder/config.json`.

        Raises:
            UserError: there is none.
            DataError: not a JSON object.
        """
        path = folder / CONFIG
        if not path.is_file():
            raise UserError(f"{folder} holds no {CONFIG}", "a folder with Hugging Face weights", "check the path")
        return ConfigKeys(read_object(path), path)

    def take(self, name: str, default: Any = None) -> Any:
        """The value of a key; `default` where it is missing."""
        self._seen.add(name)
        return self._values.get(name, default)

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number of at least 1; without a default the key must be there."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.refuse(name, "a whole number of at least 1")
        return value

    def number(self, name: str, default: float) -> float:
        """A positive number."""
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.refuse(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def only(self, name: str, *allowed: Any, default: Any = ..., why: str = "") -> None:
        """A key that must have one of these values; where it is missing it is `default`, or else the first of them."""
        value = self.take(name, allowed[0] if default is ... else default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            raise self.refuse(name, " or ".join(json.dumps(one) for one in allowed), why)

    def without_influence(self, names: Iterable[str]) -> None:
        """Keys of parts that this checkpoint does not have."""
        self._seen.update(names)

    def refuse(self, name: str, allowed: str, why: str = "") -> UserError:
        """The error for a key whose value cannot be honoured."""
        given = f"{self.where}: `{name}` {self._shown(name)}"
        return UserError(given + (f", {why}" if why else ""), allowed, "use another checkpoint")

    def finish(self) -> None:
        """Refuse the first key that nobody asked for."""
        for name in self._values:
            if name not in self._seen:
                given = f"{self.where}: unknown key `{name}` {self._shown(name)}"
                allowed = ", ".join(sorted(self._seen - WITHOUT_INFLUENCE))
                raise UserError(given, allowed, "use a checkpoint without it; what is unknown is never ignored")

    def _shown(self, name: str) -> str:
        if name not in self._values:
            return "is missing"
        text = json.dumps(self._values[name], ensure_ascii=False)
        return f"= {text if len(text) <= 80 else text[:77] + '...'}"
