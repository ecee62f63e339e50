"""The sections of a study and what they hold together: one checked configuration per subject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Self

from pydantic import BaseModel, Discriminator, Field, Tag, field_validator, model_validator

from longspan.corpus.packing import PackingConfig
from longspan.corpus.prepare import CorpusConfig
from longspan.corpus.tasks.batches import check_task
from longspan.corpus.tasks.corpus import TaskCorpus
from longspan.corpus.tokenizer import TokenizerConfig
from longspan.engines.source import ModelSource
from longspan.engines.trained_run import Weights
from longspan.foundation.config import Config, ConfigError
from longspan.foundation.errors import UserError
from longspan.models.config import ModelConfig
from longspan.models.matching import MatchConfig
from longspan.probes.base import Probe, make_probe
from longspan.training.config import TrainingConfig
from longspan.training.trackers import TrackingConfig


class ModelSection(ModelConfig):
    """A model, and what `match` holds equal between the subjects of a study."""

    match: MatchConfig | None = None

    def unmatched(self) -> ModelConfig:
        """The model as written, without the match."""
        return ModelConfig(**self.model_dump(exclude={"match"}))


def _kind_of_corpus(value: Any) -> str:
    source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
    return "task" if source == "task" else "text"


AnyCorpus = Annotated[
    Annotated[CorpusConfig, Tag("text")] | Annotated[TaskCorpus, Tag("task")], Discriminator(_kind_of_corpus)
]
"""Documents, or the strings of a task."""


def _with_handover(model: Any, corpus: Any) -> Any:
    """The model's section, in which a state of few bits is handed over where the questions of the task begin.

    Raises:
        UserError: there is no such place.
    """
    if not isinstance(model, Mapping) or model.get("state_bits") is None:
        return model
    task = corpus.task if isinstance(corpus, TaskCorpus) else None
    border = None if task is None else task.handover()
    if border is None:
        given = "text as the corpus" if task is None else f"the task {task.task} as it is set"
        raise UserError(
            f"model.state_bits = {model['state_bits']} with {given}",
            "a task whose questions begin at the same place of every row, where the state is handed over",
            "use `mqar` and set its `border`, or remove `state_bits`",
        )
    return {"handover": border, **model}


class AskedConfig(Config):
    """What any subject is asked, on which text."""

    corpus: AnyCorpus
    packing: PackingConfig = PackingConfig()
    probes: dict[str, Any] = Field(default_factory=dict)

    @field_validator("probes", mode="after")
    @classmethod
    def _probes_exist(cls, probes: dict[str, Any]) -> dict[str, Any]:
        return {name: make_probe(name, settings).model_dump(mode="json") for name, settings in probes.items()}

    def make_probes(self) -> dict[str, Probe]:
        """name in the study → probe."""
        return {name: make_probe(name, settings) for name, settings in self.probes.items()}


class SubjectConfig(AskedConfig):
    """Everything that determines one trained subject and what it is asked; one arm of a study at one seed.

    `weights` says which weights the probes see: those with the lowest full-validation loss, or the last ones.
    """

    tokenizer: TokenizerConfig
    model: ModelSection
    training: TrainingConfig
    tracking: TrackingConfig = TrackingConfig()
    weights: Weights = "best"

    @model_validator(mode="before")
    @classmethod
    def _task_brings_its_tokenizer(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        if _kind_of_corpus(data.get("corpus")) != "task":
            return {**data, "model": _with_handover(data.get("model"), None)} if "model" in data else data
        given = data.get("tokenizer")
        if given is not None and not (isinstance(given, Mapping) and given.get("kind") == "task"):
            raise ConfigError(
                "tokenizer",
                f"`{ConfigError.PLACE}` with a task as the corpus",
                "none: a task brings its own",
                f"remove `{ConfigError.PLACE}`, or write `{ConfigError.PLACE}: null`",
            )
        corpus = TaskCorpus.parse(data["corpus"], "corpus")
        model = _with_handover(data.get("model"), corpus)
        return {**data, "corpus": corpus, "tokenizer": corpus.tokenizer(), "model": model}

    @model_validator(mode="after")
    def _rows_hold_a_string(self) -> Self:
        if isinstance(self.corpus, TaskCorpus):
            check_task(self.corpus.task, self.packing, self.training.context)
        elif self.training.mastery is not None:
            raise UserError(
                f"training.mastery = {self.training.mastery} with text as the corpus",
                "mastery of a task (`corpus: {source: task, ...}`)",
                "remove it; `patience` ends training on text early",
            )
        return self

    @model_validator(mode="after")
    def _every_border_is_the_handover(self) -> Self:
        bits, at = self.model.state_bits, self.model.handover
        if bits is None or not isinstance(self.corpus, TaskCorpus):
            return self
        border = self.corpus.task.handover()
        if at != border:
            given = f"model.handover = {at} of rows whose questions begin at {border}"
            raise UserError(given, f"{border}", "leave `handover` out")
        if self.packing.method != "one_per_row":
            raise UserError(
                f"model.state_bits = {bits} with packing.method = {self.packing.method}",
                "one_per_row: in a row of several strings most borders lie elsewhere",
                "set it",
            )
        return self

    @model_validator(mode="after")
    def _rows_advance(self) -> Self:
        overlap, context = self.packing.overlap, self.training.context
        if overlap >= context:
            raise UserError(f"packing.overlap = {overlap}", f"less than the context ({context})", "lower the overlap")
        return self

    @model_validator(mode="after")
    def _positions_suffice(self) -> Self:
        rows, context = self.model.max_positions, self.training.context
        if self.model.positions == "learned" and rows is not None and rows < context:
            raise UserError(
                f"model.max_positions = {rows} with training.context = {context}",
                "a learned position for every token of a row",
                f"set model.max_positions to {context} or more, or train at a shorter context",
            )
        return self


class ExaminedConfig(AskedConfig):
    """Everything that determines what a model that is asked as it is answers."""

    source: ModelSource


SECTIONS: dict[str, type[BaseModel]] = {
    "corpus": CorpusConfig,
    "tokenizer": TokenizerConfig,
    "packing": PackingConfig,
    "model": ModelSection,
    "training": TrainingConfig,
    "tracking": TrackingConfig,
}
