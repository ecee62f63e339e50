"""From a `LanguageModel` to a folder that stock transformers loads, whole or not at all."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from longspan.corpus.tokenizer import Tokenizer
from longspan.foundation.errors import UserError
from longspan.foundation.files import atomic_directory, recover_directory, write_json
from longspan.models.interchange.architecture import Architecture
from longspan.models.interchange.checkpoint_files import WEIGHTS
from longspan.models.interchange.choose import architecture_of
from longspan.models.interchange.config_keys import CONFIG
from longspan.models.interchange.layout import Multipliers
from longspan.models.interchange.read import DTYPES, fp32_parameters
from longspan.models.interchange.tokenizer_files import write_tokenizer
from longspan.models.language_model import LanguageModel

GENERATION = "generation_config.json"
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        folder: where.
        architecture: the class of transformers.
        notes: what a user of the folder must know.
    """

    folder: Path
    architecture: str
    notes: tuple[str, ...]


def write_folder(
    model: LanguageModel,
    folder: Path,
    *,
    context: int,
    tokenizer: Tokenizer | None = None,
    markers: bool = True,
    dtype: torch.dtype = torch.float32,
    replace: bool = False,
    verify: Callable[[Path], None] | None = None,
) -> Written:
    """Write config.json, model.safetensors, generation_config.json and the tokenizer's files.

    `AutoModelForCausalLM` and `AutoTokenizer` of transformers load the folder without any code of Longspan.

    Args:
        model: left as it is.
        folder: a new or empty one.
        context: tokens that the model is made for; stored as `max_position_embeddings`, which limits servers.
        tokenizer: the model's own; its boundary token becomes bos and eos, its pad token pad. None: no such files.
        markers: whether documents began with the boundary token; then the written tokenizer puts it before a text.
        dtype: fp32, bf16 or fp16; what a mixer keeps in fp32 is fp32 always.
        replace: put the folder in the place of an earlier one.
        verify: called with the written files before they are in place; where it raises, nothing is written.

    Raises:
        UserError: no class of transformers computes the same (every reason is named), or the folder is taken.
        DataError: no space left.
    """
    if dtype not in DTYPES.values():
        raise UserError(f"dtype {dtype}", ", ".join(DTYPES), "choose one of these")
    if tokenizer is not None and model.vocab_size < tokenizer.vocab_size:
        given = f"a model with {model.vocab_size} rows for the tokenizer {tokenizer.name}"
        raise UserError(given, f"at least {tokenizer.vocab_size} rows", "give the tokenizer that it was trained with")
    architecture = architecture_of(model.config)
    recover_directory(folder)
    _check_place(folder, replace)
    notes = architecture.notes(model.config)
    with atomic_directory(folder) as partial:
        special: dict[str, int] = {}
        if tokenizer is not None:
            notes += write_tokenizer(tokenizer, partial, markers=markers, context=context)
            boundary = tokenizer.special.boundary
            special = {"bos_token_id": boundary, "eos_token_id": boundary, "pad_token_id": tokenizer.special.pad}
        tensors = {name: tensor.cpu() for name, tensor in exported_tensors(model, dtype).items()}
        _save(tensors, partial / WEIGHTS)
        write_json(partial / CONFIG, _config(model, architecture, context, dtype, special))
        write_json(partial / GENERATION, {**special, **architecture.generation(model.config)})
        if verify is not None:
            verify(partial)
    return Written(folder, architecture.name, tuple(notes))


def _check_place(folder: Path, replace: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not replace:
        raise UserError(f"{folder} exists", "a new or empty folder", "name another one, or replace it with --force")
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder} exists and holds no {CONFIG}, so it is no export", "an earlier export", "name another folder"
        )


def _config(
    model: LanguageModel, architecture: Architecture, context: int, dtype: torch.dtype, special: dict[str, int]
) -> dict[str, Any]:
    return {
        "architectures": [architecture.name],
        "model_type": architecture.model_type,
        "vocab_size": model.vocab_size,
        **architecture.describe(model.config, context),
        # Written by name where there is no tokenizer, too: some classes have ids of their own as defaults.
        **{name: special.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        "torch_dtype": _NAMES[dtype],
    }


def exported_tensors(model: LanguageModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The parameters under the names of transformers, where they are; what needs no change is no copy.

    Args:
        model: left as it is.
        dtype: what a mixer keeps in fp32 is fp32 always.

    Raises:
        UserError: no class of transformers computes the same.
    """
    architecture = architecture_of(model.config)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    kept = fp32_parameters(model)
    tensors: dict[str, Tensor] = {}
    for weight in architecture.weights(model.config, Multipliers()):
        value = parameters.pop(weight.name)
        if weight.channel_axis:
            value = value.unsqueeze(1)
        rows = [part.rows or len(value) for part in weight.parts]
        for part, tensor in zip(weight.parts, torch.split(value, rows), strict=True):
            scaled = tensor if part.to_theirs == 1.0 else tensor.float() * part.to_theirs
            tensors[part.name] = scaled.to(torch.float32 if weight.name in kept else dtype).contiguous()
    assert not parameters, f"the architecture has no place for {', '.join(parameters)}"
    return tensors


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library has no error class for a full disk.
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "no space left on device", str(path)) from error
        raise
