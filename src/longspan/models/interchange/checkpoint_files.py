"""The tensors of a folder with Hugging Face weights, in one safetensors file or several; no pickle is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from longspan.foundation.errors import DataError, UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt")
# Names of the first published conversions of Mamba.
_RENAMED = {"backbone.embedding.weight": "backbone.embeddings.weight"}


class CheckpointFiles:
    """Names and tensors; use it as a context, so that files are closed.

    Attributes:
        folder: with the files.

    Raises:
        UserError: the folder holds pickles only, or no weights.
        DataError: a file is missing, damaged, or not what the index says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open = ExitStack()
        self._files: dict[str, tuple[Any, str]] = {}
        try:
            for path in _paths(folder):
                self._add(path)
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        """A tensor; it may share the file's memory.

        Raises:
            DataError: there is none of this name.
        """
        file, stored = self._find(name)
        tensor: Tensor = file.get_tensor(stored)
        return tensor

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors calls it, e.g. `BF16`; nothing is read.

        Raises:
            DataError: there is no such tensor.
        """
        file, stored = self._find(name)
        return str(file.get_slice(stored).get_dtype())

    def _find(self, name: str) -> tuple[Any, str]:
        if name not in self._files:
            raise DataError(
                f"{self.folder} has no tensor `{name}`", "the weights that config.json describes", "fetch it"
            )
        return self._files[name]

    def _add(self, path: Path) -> None:
        try:
            file = self._open.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is not readable ({error})", "a whole safetensors file", "fetch it again") from None
        for stored in file.keys():  # noqa: SIM118
            name = _RENAMED.get(stored, stored)
            if name in self._files:
                raise DataError(f"{path}: tensor `{name}` is there twice", "each tensor once", "fetch the folder again")
            self._files[name] = (file, stored)


def _paths(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if index.is_file():
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(
                f"{index} is damaged ({error!r})", "`weight_map`: tensor -> file", "fetch it again"
            ) from None
        for name in files:
            if Path(name).name != name or not (folder / name).is_file():
                raise DataError(
                    f"{index} names {name!r}, which is not there", "files beside it", "fetch the folder again"
                )
        return [folder / name for name in files]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} has weights as pickles only ({', '.join(pickles[:3])}), and opening a pickle runs code in it",
            f"{WEIGHTS}, or {INDEX} with its files",
            "take a repository with safetensors, or convert it where you trust it: load it with transformers and "
            "`save_pretrained` it",
        )
    raise UserError(f"{folder} holds no weights", f"{WEIGHTS}, or {INDEX} with its files", "check the path")
