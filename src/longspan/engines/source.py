"""What a study says of a model that is asked as it is: where it lies, which engine runs it, and how it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from longspan.engines.prompting import Policy, custom_form
from longspan.engines.trained_run import Weights
from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.models.config import ModelConfig

EngineName = Literal["native", "transformers", "vllm", "openai"]
SourceDtype = Literal["fp32", "bf16", "fp16"]


class TransformersArguments(Config):
    """How transformers runs a model.

    Attributes:
        attention: its implementation of attention: `sdpa`, `eager`, `flash_attention_2`, … ; None: its own choice.
        batch_tokens: most positions in one forward pass.
        trust_remote_code: run code that comes with the weights.
    """

    attention: str | None = None
    batch_tokens: int = Field(4_096, ge=1)
    trust_remote_code: bool = False


class EndpointArguments(Config):
    """How a server is asked.

    Attributes:
        concurrency: most requests under way at a time.
        timeout: seconds without a byte after which a request counts as failed; for the first byte of an answer too.
        retries: how often a failed request is sent again, with growing pauses.
        key: name of the environment variable that holds the key, if there is one.
        stream: take answers token by token, so that the first token's time is known.
        extra: more fields for every request, e.g. `{seed: 0}`.
    """

    concurrency: int = Field(8, ge=1, le=1_024)
    timeout: float = Field(600.0, gt=0)
    retries: int = Field(5, ge=0)
    key: str = "OPENAI_API_KEY"
    stream: bool = True
    extra: dict[str, Any] = Field(default_factory=dict)


class VllmArguments(EndpointArguments):
    """How vLLM serves a model.

    Attributes:
        python: the Python of vLLM's own environment, or the folder of that environment; None: what the environment
            variable LONGSPAN_VLLM says.
        serve: flags of `vllm serve`, e.g. `{max-model-len: 131072, enforce-eager: true}`.
        environment: variables for the server.
        start_timeout: seconds until it must answer.
    """

    python: str | None = None
    serve: dict[str, str | int | float | bool] = Field(default_factory=dict)
    environment: dict[str, str] = Field(default_factory=dict)
    start_timeout: float = Field(1_800.0, gt=0)


class NativeArguments(Config):
    """The native engine takes no arguments."""


SOURCES = ("checkpoint", "pretrained", "endpoint", "shape")
"""Ways to say where a model's weights come from."""
FEWEST_ROWS = 258
"""Of a shape's embedding: one for every byte, and the two special ids."""
ARGUMENTS: dict[str, type[Config]] = {
    "native": NativeArguments,
    "transformers": TransformersArguments,
    "vllm": VllmArguments,
    "openai": EndpointArguments,
}


class Endpoint(Config):
    """A server that speaks the OpenAI API.

    Attributes:
        base_url: up to and without `/v1`, e.g. `http://localhost:8000`.
        model: as the server calls it.
        tokenizer: a folder or hub id with the model's tokenizer.json.
        api: `completions` sends whole prompts, as token ids where the server takes them; `chat` sends the question,
            which the server puts in its own template.
    """

    base_url: str
    model: str
    tokenizer: str
    api: Literal["completions", "chat"] = "completions"

    @model_validator(mode="after")
    def _url(self) -> Self:
        if not self.base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url = {self.base_url!r}", "http://… or https://…", "write the server's address")
        return self


class ModelSource(Config):
    """One entry of `subjects:`, a model that is asked as it is.

    Attributes:
        checkpoint: the folder of a run that Longspan trained.
        pretrained: a folder with Hugging Face weights, or a hub id.
        endpoint: a server.
        shape: a model of this configuration with random weights, `vocab_size` among its settings; for what a model
            costs, which weights do not change. Texts reach it as bytes.
        engine: what runs it: `native` (of checkpoints, and of weights that Longspan's own models can hold),
            `transformers` (any causal language model of it), `vllm` (which is started and stopped), `openai` (of
            endpoints). Default `native`, `openai` for endpoints.
        revision: branch, tag or commit of the hub id; of an endpoint, what tells its weights from others of the name.
        weights: of a checkpoint, `best` or `last`.
        dtype: of the computation.
        rope_scaling: rotary settings in place of its own, as transformers names them.
        context_limit: tokens it may be shown; None: what its configuration says.
        template: how it is asked by text: `chat` (its own chat template), `raw` (the text as it is), `custom`.
        custom_template: of `custom`: a text with `{prompt}` in it, special tokens written out.
        template_arguments: for its chat template.
        system: what the system says first (`chat`).
        arguments: of the engine.
        name: what reports call it; default the last part of its path or id.
    """

    checkpoint: str | None = None
    pretrained: str | None = None
    endpoint: Endpoint | None = None
    shape: dict[str, Any] | None = None
    engine: EngineName = "native"
    revision: str | None = None
    weights: Weights = "best"
    dtype: SourceDtype = "fp32"
    rope_scaling: dict[str, Any] | None = None
    context_limit: int | None = Field(None, ge=2)
    template: Policy | None = None
    custom_template: str | None = None
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    system: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _endpoints_have_one_engine(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("endpoint") is not None and "engine" not in data:
            return {**data, "engine": "openai"}
        return data

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in SOURCES if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(f"`{name}`" for name in given) if given else "a subject without weights"
            raise UserError(what, f"exactly one of {', '.join(f'`{name}`' for name in SOURCES)}", "name one model")
        if self.revision is not None and self.checkpoint is not None:
            raise UserError(f"revision = {self.revision!r} of a checkpoint", "revisions of hub ids only", "remove it")
        if self.weights != "best" and self.checkpoint is None:
            raise UserError(f"weights = {self.weights!r} of {self.label}", "checkpoints only", "remove it")
        return self

    @model_validator(mode="after")
    def _engine_fits(self) -> Self:
        engines = {
            "checkpoint": ["native"],
            "endpoint": ["openai"],
            "pretrained": ["native", "transformers", "vllm"],
            "shape": ["native", "transformers"],
        }
        kind = self.kind
        if self.engine not in engines[kind]:
            allowed = ", ".join(engines[kind])
            fix = (
                "export it (`longspan export`), and name the folder as `pretrained:`"
                if kind == "checkpoint"
                else "choose one of these"
            )
            raise UserError(f"engine = {self.engine!r} of a {kind}", allowed, fix)
        if self.engine == "native":
            for name in ("rope_scaling", "context_limit"):
                if getattr(self, name) is not None:
                    raise UserError(
                        f"{name} of {self.label} with the engine native",
                        "the engines transformers and vllm",
                        "choose `engine: transformers`",
                    )
            if self.dtype == "fp16":
                raise UserError("dtype = 'fp16' with the engine native", "fp32, bf16", "choose one of these")
        if self.engine == "openai" and (self.rope_scaling is not None or self.dtype != "fp32"):
            raise UserError(
                f"dtype or rope_scaling of the endpoint {self.label}",
                "settings of the server, which is already running",
                "remove them",
            )
        self.engine_arguments()
        return self

    @model_validator(mode="after")
    def _template_fits(self) -> Self:
        if (self.template == "custom") != (self.custom_template is not None):
            raise UserError(
                f"template = {self.template!r} with custom_template = {self.custom_template!r}",
                "`template: custom` with `custom_template`, or neither",
                "add the one, or remove the other",
            )
        if self.checkpoint is not None and self.template not in (None, "raw"):
            raise UserError(
                f"template = {self.template!r} of a checkpoint", "raw: it was trained on plain text", "remove it"
            )
        if self.custom_template is not None:
            custom_form(self.custom_template)
        if self.template != "chat" and (self.system is not None or self.template_arguments):
            raise UserError("system or template_arguments", "with `template: chat` only", "remove them")
        if self.shape is not None:
            self._check_shape()
        if self.endpoint is not None and self.endpoint.api == "chat" and self.template not in (None, "chat"):
            raise UserError(
                f"template = {self.template!r} with the API chat",
                "chat: the server puts each question in its own template",
                "choose `api: completions`",
            )
        return self

    def _check_shape(self) -> None:
        if self.template not in (None, "raw") or self.rope_scaling is not None or self.name is None:
            raise UserError(
                f"the shape {self.name or self.place} with {'no name' if self.name is None else 'more settings'}",
                "a `name`, and no `rope_scaling` and no `template` but `raw`",
                "add `name:`, and say all of the model under `shape:`",
            )
        self.shape_config()

    def shape_config(self) -> tuple[ModelConfig, int]:
        """The configuration of a shape, and the rows of its embedding."""
        given = dict(self.shape or {})
        rows = given.pop("vocab_size", None)
        if not isinstance(rows, int) or rows < FEWEST_ROWS:
            fix = "add `vocab_size: 128256` to the shape"
            raise UserError(f"vocab_size = {rows!r} of {self.label}", f"a number of rows, at least {FEWEST_ROWS}", fix)
        return ModelConfig.parse(given, f"the shape of {self.label}"), rows

    @property
    def kind(self) -> Literal["checkpoint", "pretrained", "endpoint", "shape"]:
        """Where its weights come from."""
        if self.shape is not None:
            return "shape"
        if self.checkpoint is not None:
            return "checkpoint"
        return "pretrained" if self.pretrained is not None else "endpoint"

    @property
    def place(self) -> str:
        """Where it is, for people."""
        served = self.endpoint and f"{self.endpoint.model} at {self.endpoint.base_url}"
        drawn = self.shape and f"{self.shape.get('pattern')} with random weights"
        return self.checkpoint or self.pretrained or served or drawn or ""

    @property
    def label(self) -> str:
        """What reports call it."""
        model = self.endpoint.model if self.endpoint else ""
        return self.name or Path(self.checkpoint or self.pretrained or model).name

    def engine_arguments(self) -> Config:
        """The engine's arguments, checked."""
        return ARGUMENTS[self.engine].parse(self.arguments, "arguments")

    def asked_how(self) -> dict[str, Any]:
        """All that says how it is asked, for fingerprints."""
        names = ("engine", "dtype", "rope_scaling", "context_limit", "template", "custom_template")
        return {name: getattr(self, name) for name in (*names, "template_arguments", "system")}
