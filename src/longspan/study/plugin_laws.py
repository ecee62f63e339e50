"""The laws of a mixer, tried on a user's own before a study relies on it; shipped mixers have tests for them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from longspan.foundation.errors import UserError
from longspan.foundation.plugins import is_plugin
from longspan.foundation.randomness import torch_generator
from longspan.models.config import ModelConfig
from longspan.models.language_model import LanguageModel
from longspan.models.pattern import letters_of

VOCAB = 32
DOCUMENTS = (8, 1, 7, 8)
"""Lengths of the documents of the row that is tried."""
TOLERANCE = 1e-4


def check_own_mixers(configs: Iterable[ModelConfig]) -> None:
    """Try every mixer that comes from a plugin, alone in one layer.

    Raises:
        UserError: naming the mixer and the law that it breaks.
    """
    tried = set()
    for config in configs:
        for letter in dict.fromkeys(letter for layer in config.layers() for letter in letters_of(layer)):
            mixer, settings = config.mixer(letter)
            key = (letter, config.width, settings.model_dump_json())
            if is_plugin(mixer.__module__) and key not in tried:
                tried.add(key)
                _try(config, letter, f"the mixer `{mixer.name}` (`{letter}`)")


def _try(config: ModelConfig, letter: str, who: str) -> None:
    rows = max(config.max_positions, sum(DOCUMENTS)) if config.max_positions else None
    alone = config.model_copy(update={"pattern": letter, "dropout": 0.0, "max_positions": rows})
    try:
        _residual_outputs(alone, letter, who)
        model = LanguageModel(alone, VOCAB, seed=0).eval()
        with torch.no_grad():
            _shapes(model, who)
            _laws(model, who)
    except UserError:
        raise
    except Exception as error:
        problem = f"{who} fails on a small batch: {type(error).__name__}: {error}"
        raise _broken(problem, "what docs/add-a-mixer.md asks of a mixer") from error


def _residual_outputs(config: ModelConfig, letter: str, who: str) -> None:
    mixer, settings = config.mixer(letter)
    with torch.device("meta"):
        built = mixer(config.width, settings)
    missing = [name for name in built.residual_outputs if name not in dict(built.named_parameters())]
    if missing:
        named = ", ".join(f"`{name}`" for name, _ in built.named_parameters()) or "none"
        raise UserError(
            f"`residual_outputs` of {who} names `{missing[0]}`, which it does not have",
            f"weights of the mixer that write its output, of {named}",
            "name them in `residual_outputs`, or call the output's weight `out_proj.weight`",
        )


def _shapes(model: LanguageModel, who: str) -> None:
    tokens_BT, doc_BT = _row()
    (block,) = model.blocks
    x_BTD = model.embedding(tokens_BT)
    found = block.mixer(x_BTD, model.segments(tokens_BT, doc_BT), None)
    if not isinstance(found, tuple) or len(found) != 2:
        raise _broken(f"{who} returns a {type(found).__name__}", "a pair: the output and the state")
    y_BTD, state = found
    if y_BTD.shape != x_BTD.shape:
        given = f"{who} turns an input of shape {tuple(x_BTD.shape)} into {tuple(y_BTD.shape)}"
        raise _broken(given, "an output of the shape of its input")
    if state is not None:
        raise _broken(f"{who} returns a state where it was given none", "None in training")
    if not bool(y_BTD.isfinite().all()):
        raise _broken(f"{who} gives NaN or infinity on a small batch, freshly initialised", "finite outputs")


def _laws(model: LanguageModel, who: str) -> None:
    tokens_BT, doc_BT = _row()
    num_tokens = tokens_BT.shape[1]
    whole_BTD, after = model(tokens_BT, doc_BT, model.initial_state())
    later_T = torch.arange(num_tokens) >= num_tokens // 2
    changed_BTD, _ = model(_changed(tokens_BT, later_T), doc_BT)
    if not _close(whole_BTD[:, ~later_T], changed_BTD[:, ~later_T]):
        raise _broken(f"{who} looks ahead: a later token changes an earlier output", "outputs of earlier tokens only")
    first_T = doc_BT[0] == 0
    changed_BTD, _ = model(_changed(tokens_BT, first_T), doc_BT)
    if not _close(whole_BTD[:, ~first_T], changed_BTD[:, ~first_T]):
        raise _broken(f"{who} lets one document change another at isolation `full`", "documents kept apart by segments")
    state = model.initial_state()
    parts = []
    for part_BT, part_doc_BT in zip(torch.split(tokens_BT, 5, 1), torch.split(doc_BT, 5, 1), strict=True):
        part_BTD, state = model(part_BT, part_doc_BT, state)
        parts.append(part_BTD)
    if not _close(whole_BTD, torch.cat(parts, 1)):
        raise _broken(f"{who} gives other outputs in chunks than in one pass", "the same to 1e-5")
    measured, computed = after.bytes(), model.blocks[0].mixer.state_bytes(num_tokens, 4)
    if measured != computed:
        given = f"{who}: `state_bytes` says {computed} bytes after {num_tokens} tokens, its state has {measured}"
        raise _broken(given, "the bytes of the state of one row")


def _row() -> tuple[Tensor, Tensor]:
    """Tokens (1, T) and the document of each."""
    doc_BT = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS)).to(torch.int32)[None]
    return torch.randint(VOCAB, doc_BT.shape, generator=torch_generator(0, "laws")), doc_BT


def _changed(tokens_BT: Tensor, where_T: Tensor) -> Tensor:
    return torch.where(where_T, (tokens_BT + 7) % VOCAB, tokens_BT)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE)


def _broken(given: str, allowed: str) -> UserError:
    return UserError(given, allowed, "mend the plugin, see docs/add-a-mixer.md")
