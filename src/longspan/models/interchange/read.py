"""From a folder with Hugging Face weights to a `LanguageModel`, with safetensors and json alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from longspan.foundation.errors import DataError, UserError
from longspan.models.config import ModelConfig
from longspan.models.interchange.architecture import Architecture
from longspan.models.interchange.checkpoint_files import CheckpointFiles
from longspan.models.interchange.choose import ARCHITECTURES
from longspan.models.interchange.config_keys import ConfigKeys
from longspan.models.interchange.layout import Multipliers, Part, Weight
from longspan.models.language_model import LanguageModel

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read_config(path: Path) -> tuple[ModelConfig, int]:
    """The configuration and the vocabulary size of the model that a folder describes; no weights are read.

    Raises:
        UserError: an architecture or a setting that cannot be honoured, by key and value.
    """
    _, config, _, vocab_size = _understand(path)
    return config, vocab_size


def read_folder(path: Path, *, dtype: torch.dtype | None = None) -> LanguageModel:
    """Build the model that a folder describes, on the CPU, in evaluation mode.

    Llama, GraniteMoeHybrid without experts, Mamba-2 and Mamba-1, whoever wrote them, and Nemotron-H as `write_folder`
    writes it. Factors that Longspan's models do not have (`attention_multiplier`, `residual_multiplier`,
    `logits_scaling`) are multiplied into the weights, in fp32.

    Args:
        path: a folder with config.json and safetensors.
        dtype: of the parameters; None: the widest in the files. What a mixer keeps in fp32 is fp32 always.

    Raises:
        UserError: an architecture or a setting that cannot be honoured, by key and value; weights as pickles only.
        DataError: a file is damaged, or a tensor is missing, unknown or of another shape.
    """
    architecture, config, by, vocab_size = _understand(path)
    model = LanguageModel(config, vocab_size, device="meta")
    weights = list(architecture.weights(config, by))
    with CheckpointFiles(path) as files:
        _check_names(weights, files, tied=config.tied)
        _fill(model, weights, files, dtype)
    return model.eval()


def fp32_parameters(model: LanguageModel) -> frozenset[str]:
    """Names of the parameters that stay in fp32."""
    return frozenset(f"layers.{i}.mixer.{name}" for i, block in enumerate(model.blocks) for name in block.mixer.fp32)


def _understand(path: Path) -> tuple[Architecture, ModelConfig, Multipliers, int]:
    keys = ConfigKeys.load(path)
    architecture = _architecture(keys)
    config, by = architecture.understand(keys)
    vocab_size = keys.integer("vocab_size")
    keys.finish()
    return architecture, config, by, vocab_size


def _architecture(keys: ConfigKeys) -> Architecture:
    architecture = ARCHITECTURES.get(keys.take("model_type"))
    if architecture is None:
        raise keys.refuse("model_type", ", ".join(ARCHITECTURES))
    if keys.take("architectures", None) not in (None, [], [architecture.name]):
        raise keys.refuse("architectures", f'["{architecture.name}"]')
    return architecture


def _check_names(weights: Iterable[Weight], files: CheckpointFiles, tied: bool) -> None:
    """Every tensor must have a place; a tied head may be stored again, rotary frequencies are computed."""
    places = {part.name: weight.name for weight in weights for part in weight.parts}
    embedding = next(name for name, ours in places.items() if ours == "embedding.weight")
    for name in files:
        if name in places:
            if files.dtype(name) not in STORED:
                given = f"{files.folder}: tensor `{name}` is {files.dtype(name)}"
                raise UserError(given, ", ".join(STORED), "use a checkpoint that is not quantised")
        elif tied and name == "lm_head.weight":
            if not torch.equal(files.tensor(name), files.tensor(embedding)):
                raise _unexpected(files, name, "differs from the embedding that it is tied to")
        elif not name.endswith("rotary_emb.inv_freq"):
            raise _unexpected(files, name, "is unknown")


def _unexpected(files: CheckpointFiles, name: str, problem: str) -> DataError:
    return DataError(
        f"{files.folder}: tensor `{name}` {problem}",
        "the tensors that config.json describes",
        "use another checkpoint; nothing in it is ignored",
    )


def _fill(model: LanguageModel, weights: list[Weight], files: CheckpointFiles, dtype: torch.dtype | None) -> None:
    kept = fp32_parameters(model)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {weight.name for weight in weights} == shapes.keys(), "the architecture has a place for every parameter"
    if dtype is None:
        dtype = _widest(files, (part.name for weight in weights if weight.name not in kept for part in weight.parts))
    for weight in weights:
        tensors = [_tensor(weight, part, shapes[weight.name], files) for part in weight.parts]
        # Always a copy, since tensors mapped from a file are not aligned as torch's own, and that can change last bits.
        value = torch.cat(tensors).to(torch.float32 if weight.name in kept else dtype)
        owner, _, leaf = weight.name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))


def _tensor(weight: Weight, part: Part, shape: torch.Size, files: CheckpointFiles) -> Tensor:
    tensor = files.tensor(part.name)
    rows = part.rows or shape[0]
    wanted = (rows, 1, *shape[1:]) if weight.channel_axis else (rows, *shape[1:])
    if tensor.shape != wanted:
        raise DataError(
            f"{files.folder}: tensor `{part.name}` is {tuple(tensor.shape)}, config.json says {tuple(wanted)}",
            "weights of the shape that config.json describes",
            "fetch the folder again",
        )
    if weight.channel_axis:
        tensor = tensor.squeeze(1)
    return tensor if part.to_ours == 1.0 else tensor.float() * part.to_ours


def _widest(files: CheckpointFiles, names: Iterable[str]) -> torch.dtype:
    widest: torch.dtype | None = None
    for name in names:
        dtype = STORED[files.dtype(name)]
        widest = dtype if widest is None else torch.promote_types(widest, dtype)
    assert widest is not None
    return widest
