"""From an entry under `subjects:` to an engine, for models that are not held by Longspan's own classes."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.base import Engine, Prompting
from longspan.engines.loading import check_device, end_tokens, trained_context
from longspan.engines.native import Dtype
from longspan.engines.prompting import Templated, Unstated, chat_form, custom_form
from longspan.engines.random_weights import native_of_shape, transformers_config, transformers_model
from longspan.engines.source import EndpointArguments, ModelSource, TransformersArguments, VllmArguments
from longspan.engines.state_shapes import StateShape
from longspan.foundation.errors import UserError, first_line
from longspan.foundation.extras import require
from longspan.foundation.files import digest, sha256_file
from longspan.foundation.progress import Report, silent
from longspan.models.budget import Parameters
from longspan.models.config import ModelConfig
from longspan.models.interchange import DESCRIPTIONS, DTYPES, FETCHED, read_config, read_tokenizer, resolve
from longspan.models.interchange.config_keys import CONFIG
from longspan.models.interchange.json_object import read_object

if TYPE_CHECKING:
    from longspan.engines.transformers import TransformersEngine

BYTES = TokenizerConfig(vocab_size=258)
"""The tokenizer of a shape: the bytes of a text."""
LONGEST_SHAPE = 2**20
"""Positions that a shape is written down for; it has no table of them."""
KERNELS = ("mamba_ssm", "causal_conv1d")
"""Packages without which transformers computes recurrent layers slowly."""
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Described:
    """What is known of a model before its weights are read.

    Attributes:
        source: what the study says of it.
        folder: with its tokenizer, and its config.json unless it is an endpoint.
        tokenizer: its own.
        markers: whether a boundary token precedes each document.
    """

    source: ModelSource
    folder: Path
    tokenizer: Tokenizer
    markers: bool

    @cached_property
    def config(self) -> Any:
        """Its configuration as transformers holds it, with the study's rotary settings; None for an endpoint."""
        if self.source.kind == "endpoint":
            return None
        if self.source.kind == "shape":
            if self.source.engine == "native":
                return None
            return transformers_config(*self.source.shape_config(), LONGEST_SHAPE)
        arguments = self.source.engine_arguments()
        trusted = isinstance(arguments, TransformersArguments) and arguments.trust_remote_code
        try:
            config = require("transformers").AutoConfig.from_pretrained(self.folder, trust_remote_code=trusted)
        except (ValueError, OSError) as error:
            raise UserError(
                f"transformers cannot read the configuration in {self.folder} ({first_line(error)})",
                "an architecture that the installed transformers knows",
                "install a newer transformers, or set `arguments: {trust_remote_code: true}` if you trust its code",
            ) from None
        if self.source.rope_scaling is not None:
            _scale_rope(config.get_text_config(decoder=True), self.source)
        return config

    @property
    def context_limit(self) -> int | None:
        """Most tokens it can take in: what the study says, else its rotary settings, else its configuration."""
        if self.source.context_limit is not None or self.config is None:
            return self.source.context_limit
        found = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(found) if found else None

    @cached_property
    def shape(self) -> StateShape | None:
        """Its state, None where it is not known."""
        return None if self.config is None else StateShape.of(self.config)

    @cached_property
    def counted_as(self) -> tuple[ModelConfig, int] | None:
        """The model of Longspan's own of the same layers and sizes, and its vocabulary, for counting what it computes.

        None of an endpoint, and of an architecture that Longspan's models cannot be.
        """
        if self.source.shape is not None:
            return self.source.shape_config()
        if self.source.kind == "endpoint":
            return None
        try:
            return read_config(self.folder)
        except UserError:
            return None

    @cached_property
    def fingerprint(self) -> dict[str, Any]:
        """All that determines its answers."""
        if self.source.shape is not None:
            return {
                "shape": {**self.source.shape},
                "tokenizer": self.tokenizer.fingerprint,
                "asked": self.source.asked_how(),
                "arguments": self.source.engine_arguments().model_dump(mode="json"),
                "versions": _versions(self.source),
            }
        facts = {
            "tokenizer": self.tokenizer.fingerprint,
            "markers": self.markers,
            "asked": self.source.asked_how(),
            "arguments": self.source.engine_arguments().model_dump(mode="json"),
        }
        if self.source.endpoint is not None:
            model = self.source.endpoint.model_dump(mode="json", exclude={"tokenizer"})
            return {**facts, "endpoint": model, "revision": self.source.revision, "template": _template_files(self)}
        weights, template = _weights(self.folder), _template_files(self)
        return {**facts, "weights": weights, "template": template, "versions": _versions(self.source)}

    def prompting(self) -> Prompting | None:
        """How it is asked by text; None: the text as it is."""
        source = self.source
        if source.template is None:
            return Unstated(source.label)
        if source.template == "raw":
            return None
        if source.template == "chat":
            form = chat_form(self.folder, source.template_arguments, source.system)
        else:
            form = custom_form(source.custom_template or "")
        bos = self.tokenizer.special.boundary if self.markers else None
        return Templated(form, self.folder / "tokenizer.json", bos=bos, subject=source.label)

    def end_tokens(self) -> frozenset[int]:
        """The ids with which it ends a text."""
        if self.source.kind == "shape" or self.config is None:
            return frozenset()
        return end_tokens(self.folder, read_object(self.folder / CONFIG))


@cache
def _described(source_json: str) -> Described:
    source = ModelSource.model_validate_json(source_json)
    if source.shape is not None:
        return Described(source, Path(), train_tokenizer(BYTES, ["bytes"]), markers=False)
    if source.endpoint is not None:
        folder = resolve(source.endpoint.tokenizer, fetched=DESCRIPTIONS)
    else:
        assert source.pretrained is not None
        folder = resolve(source.pretrained, source.revision, fetched=DESCRIPTIONS)
    tokenizer, markers = read_tokenizer(folder)
    return Described(source, folder, tokenizer, markers)


def describe(source: ModelSource) -> Described:
    """What is known of a model before its weights are read; of a hub id the descriptions are fetched, not the weights.

    Raises:
        UserError: it is not there, or its tokenizer loses text.
    """
    return _described(source.model_dump_json())


def open_engine(source: ModelSource, device: str, report: Report = silent) -> Engine:
    """An engine that asks a model, ready to answer; close it afterwards.

    Args:
        source: of a model that Longspan does not hold itself (engine transformers, vllm or openai).
        device: of transformers, e.g. `cuda:0`; vLLM sees that device alone.
        report: told of what takes long.

    Raises:
        UserError: it is not there, cannot be reached, or something asked of it cannot be honoured.
    """
    found = describe(source)
    fingerprint = digest(found.fingerprint)
    if source.kind == "shape":
        return _drawn(found, fingerprint, device)
    if source.engine == "transformers":
        return _transformers(found, fingerprint, device)
    arguments = source.engine_arguments()
    assert isinstance(arguments, EndpointArguments)
    from longspan.engines.openai import OpenAIEngine

    if isinstance(arguments, VllmArguments):
        from longspan.engines.vllm import start_vllm

        return start_vllm(found, fingerprint, arguments, device, report)
    assert source.endpoint is not None
    return OpenAIEngine(
        source.endpoint.base_url,
        source.endpoint.model,
        found.tokenizer,
        markers=found.markers,
        fingerprint=fingerprint,
        arguments=arguments,
        api=source.endpoint.api,
        prompting=None if source.endpoint.api == "chat" else found.prompting(),
        context_limit=found.context_limit,
        name=source.label,
    )


def _drawn(found: Described, fingerprint: str, device: str) -> Engine:
    """A model of a shape with random weights."""
    check_device(device)
    source = found.source
    config, rows = source.shape_config()
    if source.engine == "native":
        dtype: Dtype = "bf16" if source.dtype == "bf16" else "fp32"
        native = native_of_shape(config, rows, found.tokenizer, dtype=dtype, device=device, name=source.label)
        native.fingerprint = fingerprint
        return native
    from longspan.engines.transformers import TransformersEngine

    arguments = source.engine_arguments()
    assert isinstance(arguments, TransformersArguments)
    engine = TransformersEngine(
        transformers_model(config, rows, found.config, DTYPES[source.dtype], device),
        found.tokenizer,
        markers=False,
        fingerprint=fingerprint,
        batch_tokens=arguments.batch_tokens,
        name=source.label,
    )
    _note_slow_layers(engine)
    return engine


def _transformers(found: Described, fingerprint: str, device: str) -> Engine:
    import torch

    from longspan.engines.transformers import TransformersEngine

    check_device(device)
    source, arguments = found.source, found.source.engine_arguments()
    assert isinstance(arguments, TransformersArguments)
    assert source.pretrained is not None
    patterns = (*FETCHED, "*.py") if arguments.trust_remote_code else FETCHED
    folder = resolve(source.pretrained, source.revision, fetched=patterns)
    more: dict[str, Any] = {} if arguments.attention is None else {"attn_implementation": arguments.attention}
    transformers = require("transformers")
    transformers.utils.logging.disable_progress_bar()
    # What it warns of while it loads and runs stands in the notes, where a reader of the numbers finds it.
    transformers.utils.logging.set_verbosity_error()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=found.config,
            dtype=DTYPES[source.dtype],
            trust_remote_code=arguments.trust_remote_code,
            use_safetensors=True,
            **more,
        )
    except (ValueError, OSError, ImportError) as error:
        raise UserError(
            f"transformers cannot load {source.place} ({first_line(error)})",
            "a causal language model with safetensors",
            "look at its files, or choose another `arguments.attention`",
        ) from error
    model.to(torch.device(device))
    engine = TransformersEngine(
        model,
        found.tokenizer,
        markers=found.markers,
        fingerprint=fingerprint,
        prompting=found.prompting(),
        context_limit=found.context_limit,
        trained_context=trained_context(folder),
        end_tokens=found.end_tokens(),
        batch_tokens=arguments.batch_tokens,
        name=source.label,
    )
    _note_slow_layers(engine)
    return engine


def _note_slow_layers(engine: TransformersEngine) -> None:
    if engine.shape and any("mamba" in layer for layer in engine.shape.layers) and (absent := _absent(KERNELS)):
        engine.notes += (
            f"its recurrent layers run in the reference code of transformers, which is right and slow: "
            f"{' and '.join(absent)} are not installed",
        )


def count_parameters(found: Described) -> Parameters | None:
    """Parameters by part, counted on a model without memory; None for an endpoint."""
    if found.config is None:
        return None
    import torch

    with torch.device("meta"):
        model = require("transformers").AutoModelForCausalLM.from_config(found.config)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    embedding = sum(parameter.numel() for parameter in embeddings.parameters())
    tied = head is None or head.weight is embeddings.weight
    in_head = 0 if tied else sum(parameter.numel() for parameter in head.parameters())
    total = sum(sizes.values())
    norms = sum(size for name, size in sizes.items() if _is_norm(name))
    mlp = sum(size for name, size in sizes.items() if _is_mlp(name) and not _is_norm(name))
    rest = total - embedding - in_head
    return Parameters(total, embedding, in_head, rest, rest - mlp - norms, mlp, norms)


def _is_norm(name: str) -> bool:
    owner = name.split(".")[-2] if "." in name else ""
    return "norm" in owner and "mixer" not in name and "mamba" not in name


def _is_mlp(name: str) -> bool:
    return any(part in name for part in (".mlp.", "feed_forward", "experts", "block_sparse_moe", "shared_transf"))


def _scale_rope(config: Any, source: ModelSource) -> None:
    own = getattr(config, "rope_parameters", None)
    if not isinstance(own, dict) or "rope_theta" not in own:
        raise UserError(
            f"rope_scaling for {source.label}, a {config.model_type} without rotary positions of one kind",
            "models with one set of rotary settings",
            "remove it",
        )
    scaling = dict(source.rope_scaling or {})
    if "rope_type" not in scaling:
        raise UserError(
            f"rope_scaling = {scaling}",
            "settings as transformers names them, with `rope_type`",
            "add `rope_type: yarn`",
        )
    config.rope_parameters = {**own, **scaling}
    if (factor := scaling.get("factor")) and (original := scaling.get("original_max_position_embeddings")):
        config.max_position_embeddings = int(factor * original)


def _weights(folder: Path) -> Mapping[str, str]:
    """What tells the weights of a folder from others: the commit of a hub's snapshot, else the content of the files."""
    if folder.parent.name == "snapshots" and _COMMIT.fullmatch(folder.name):
        return {"commit": folder.name}
    files = [folder / CONFIG, *sorted(folder.glob("*.safetensors"))]
    return {file.name: sha256_file(file) for file in files}


def _template_files(found: Described) -> Mapping[str, str]:
    names = ("tokenizer_config.json", "chat_template.jinja", "chat_template.json")
    files = [found.folder / name for name in names] if found.source.template == "chat" else []
    return {file.name: sha256_file(file) for file in files if file.is_file()}


def _absent(modules: Sequence[str]) -> list[str]:
    return [module for module in modules if importlib.util.find_spec(module) is None]


def _versions(source: ModelSource) -> dict[str, str]:
    """Of the package in this process whose code gives the answers; a server's is its own matter."""
    if source.engine != "transformers":
        return {}
    try:
        return {"transformers": version("transformers")}
    except PackageNotFoundError:
        return {"transformers": ""}
