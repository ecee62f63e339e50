"""What the subjects of a study cost, before anything is prepared or trained: `longspan budget`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.corpus.tokenizer import TokenizerConfig, train_tokenizer
from longspan.foundation.errors import LongspanError, UserError
from longspan.foundation.files import read_json
from longspan.models.budget import (
    Parameters,
    count_parameters,
    forward_flops_per_token,
    state_bytes,
    training_flops_per_token,
)
from longspan.models.config import ModelConfig
from longspan.models.language_model import LanguageModel
from longspan.report.numbers import MISSING, byte_size, count, duration, relative, scaled, share
from longspan.study.checks import check_primary, check_probes
from longspan.study.environment import hardware
from longspan.study.expand import Match, Subject, expand, match_model
from longspan.study.jobs import DONE, SPECIFICATION
from longspan.study.plan import describe_mixers
from longspan.study.predicted_time import ASSUMED_EFFICIENCY, matmul_rate, trained_tokens, validation_share
from longspan.study.schema import Study
from longspan.study.sections import SubjectConfig

CONTEXTS = (512, 4096, 32_768, 131_072)
ASSUMED_VOCABULARY = 32_768
SPEED = ("context", "batch_tokens", "accumulation", "optimizer", "dtype", "compile")
"""Training settings that decide how fast a model trains."""

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]


@dataclass(frozen=True)
class SubjectBudget:
    """What an arm costs, or several arms whose costs are the same.

    Attributes:
        label: the arm; of several, what they have in common.
        arms: all their labels.
        runs: how many trainings: arms x seeds.
        model: with its free setting solved.
        mixers: true mixer name of every layer.
        parameters: by part.
        match, free: how well the match came out and the setting it solved, None without one.
        context: the training context.
        forward_flops: per token at that context.
        training_flops: of one training.
        tokens: positions of one training.
        state: context → bytes of one row's state, caches in fp32.
        handed_over: bits in which a row's state is handed over rounded, None where it is not (`model.state_bits`).
        seconds: predicted time of one training, with its validation where `validates` is known.
        validates: FLOPs of all validations as a share of those of training; None for text, whose amount is not known.
        tokens_per_second: of earlier runs of this model on this machine, None where there are none.
    """

    label: str
    arms: tuple[str, ...]
    runs: int
    model: ModelConfig
    mixers: tuple[str, ...]
    parameters: Parameters
    match: Match | None
    free: str | None
    context: int
    forward_flops: float
    training_flops: float
    tokens: int
    state: dict[int, int]
    handed_over: int | None
    seconds: float
    validates: float | None
    tokens_per_second: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain data, units in the names."""
        match = self.match
        parts = ("total", "non_embedding", "embedding", "mixers", "mlp", "norms", "head")
        return {
            "subject": self.label,
            "arms": list(self.arms),
            "runs": self.runs,
            "pattern": self.model.pattern,
            "mixers": list(self.mixers),
            "model": self.model.model_dump(mode="json"),
            "parameters": {part: getattr(self.parameters, part) for part in parts},
            "match": None
            if match is None
            else {"quantity": match.quantity, "target": match.target, "reached": match.reached,
                  "residual": match.residual, "free": self.free},
            "training_context": self.context,
            "forward_flops_per_token": self.forward_flops,
            "state_bytes_fp32": {str(context): size for context, size in self.state.items()},
            "handed_over_bits": self.handed_over,
            "tokens_per_run": self.tokens,
            "training_flops_per_run": self.training_flops,
            "predicted_seconds_per_run": self.seconds,
            "validation_flops_share": self.validates,
            "predicted_from": "matmul rate" if self.tokens_per_second is None else "earlier runs",
        }  # fmt: skip


@dataclass(frozen=True)
class BudgetTable:
    """The costs of a study's subjects; seeds, and arms with the same costs, are one row."""

    study: str
    subjects: list[SubjectBudget]
    notes: list[str]

    def tables(self) -> list[Table]:
        """Columns and rows: what the subjects are, then what they cost."""
        return [self._parameters(), self._costs()]

    def _parameters(self) -> Table:
        columns: tuple[str, ...] = ("<subject", "runs", "<mixers", "parameters")
        columns += ("embedding", "mixers", "MLP", "norms", "head")
        free = next((each.free for each in self.subjects if each.free), None)
        if free is not None:
            columns += (free, "match")
        rows: list[tuple[str, ...]] = []
        for each in self.subjects:
            p = each.parameters
            row: tuple[str, ...] = (each.label, str(each.runs), describe_mixers(each.mixers), count(p.total))
            row += tuple(count(part) for part in (p.embedding, p.mixers, p.mlp, p.norms))
            row += ("tied" if each.model.tied else count(p.head),)
            if free is not None:
                solved = count(_solved(each.model, each.free)) if each.free else "–"
                row += (solved, "–" if each.match is None else relative(each.match.residual))
            rows.append(row)
        return columns, rows

    def _costs(self) -> Table:
        contexts = list(self.subjects[0].state)
        columns = ("<subject", "FLOPs/token", *(f"state at {short(context)}" for context in contexts))
        rounded = any(each.handed_over is not None for each in self.subjects)
        columns += (*(["handed over"] if rounded else []), "tokens", "training FLOPs", "time a run")
        rows: list[tuple[str, ...]] = []
        for each in self.subjects:
            sizes = tuple(byte_size(each.state[context]) for context in contexts)
            measured = "" if each.tokens_per_second is None else " *"
            time = f"{duration(each.seconds)}{measured}"
            bits = MISSING if each.handed_over is None else f"{count(each.handed_over)} bit"
            row = (each.label, scaled(each.forward_flops), *sizes, *([bits] if rounded else []))
            rows.append((*row, scaled(each.tokens), scaled(each.training_flops), time))
        return columns, rows

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {"study": self.study, "subjects": [each.to_json() for each in self.subjects], "notes": self.notes}


def budget_table(
    study: Study, runs: Path, *, contexts: Sequence[int] = CONTEXTS, vocab_size: int | None = None
) -> BudgetTable:
    """Count what every subject costs; needs no corpus.

    Args:
        study: as loaded.
        runs: folder of all runs, where throughput was perhaps measured before.
        contexts: where state bytes are counted, tokens.
        vocab_size: rows of a pretrained tokenizer that is not at hand; None: it is loaded, or a size is assumed and
            said.

    Raises:
        UserError: a combination that cannot be built or matched.
    """
    expansion = expand(study)
    check_primary(study, expansion)
    check_probes(expansion)
    trained = [subject for subject in expansion.subjects if isinstance(subject.config, SubjectConfig)]
    if not trained:
        raise UserError(f"{study.name} trains nothing", "a study with a model to train", "there is nothing to budget")
    notes = list(expansion.merged)
    notes += [f"{source.label} is asked as it is and costs no training" for source in study.sources]
    vocabulary = _Vocabulary(vocab_size, notes)
    rate, earlier = matmul_rate(), _measured_rates(runs)
    groups: dict[str, list[Subject]] = {}
    for subject in trained:
        groups.setdefault(_what_costs(subject), []).append(subject)
    budgets = [_budget(group, vocabulary, contexts, rate, earlier) for group in groups.values()]
    return BudgetTable(study.name, budgets, [*notes, *_explained(budgets, rate)])


def _what_costs(subject: Subject) -> str:
    """Equal for subjects that cost the same: isolation and seed do not matter, nor packing and corpus of text."""
    config = _trained(subject)
    training = config.training.model_copy(update={"seed": 0})
    parts = [part.model_dump_json() for part in (config.model, config.tokenizer, training)]
    return "".join([*parts, str(validation_share(config))])


def _trained(subject: Subject) -> SubjectConfig:
    assert isinstance(subject.config, SubjectConfig)
    return subject.config


def _common_label(group: Sequence[Subject]) -> str:
    """The label of one arm; of several, the levels that they share."""
    first = group[0]
    if len({subject.label for subject in group}) == 1:
        return first.label
    shared = [level for name, level in first.factors.items() if all(s.factors.get(name) == level for s in group)]
    return " · ".join(shared) or _trained(first).model.pattern


def _budget(
    group: Sequence[Subject],
    vocabulary: _Vocabulary,
    contexts: Sequence[int],
    rate: float,
    earlier: Sequence[tuple[dict[str, Any], float]],
) -> SubjectBudget:
    config = _trained(group[0])
    rows = vocabulary.size(config.tokenizer)
    model, match = match_model(config, rows)
    training = config.training
    tokens = trained_tokens(training)
    flops = training_flops_per_token(model, rows, training.context) * tokens
    wanted = _speed_of(model.model_dump(mode="json"), rows, training.model_dump(mode="json"))
    rates = [measured for found, measured in earlier if found == wanted]
    tokens_per_second = statistics.median(rates) if rates else None
    validates = validation_share(config)
    seconds = tokens / tokens_per_second if tokens_per_second else flops / (rate * ASSUMED_EFFICIENCY)
    return SubjectBudget(
        label=_common_label(group),
        arms=tuple(dict.fromkeys(subject.label for subject in group)),
        runs=len(group),
        model=model,
        mixers=tuple(model.mixer(layer)[0].name for layer in model.layers()),
        parameters=count_parameters(model, rows),
        match=match,
        free=config.model.match.free if config.model.match else None,
        context=training.context,
        forward_flops=forward_flops_per_token(model, rows, training.context),
        training_flops=flops,
        tokens=tokens,
        state={context: state_bytes(model, context) for context in contexts},
        handed_over=None if model.state_bits is None else LanguageModel(model, rows).handed_over_bits(),
        seconds=seconds * (1 + (validates or 0.0)),
        validates=validates,
        tokens_per_second=tokens_per_second,
    )


class _Vocabulary:
    """Rows of the embedding of each tokenizer; what had to be assumed is noted once."""

    def __init__(self, given: int | None, notes: list[str]) -> None:
        self._given = given
        self._notes = notes
        self._known: dict[str, int] = {}

    def size(self, tokenizer: TokenizerConfig) -> int:
        key = tokenizer.model_dump_json()
        if key not in self._known:
            self._known[key] = self._find(tokenizer)
        return self._known[key]

    def _find(self, tokenizer: TokenizerConfig) -> int:
        if tokenizer.kind != "pretrained":
            return tokenizer.vocab_size
        if self._given is not None:
            return self._given
        try:
            return train_tokenizer(tokenizer, ()).vocab_size
        except LongspanError as error:
            reason = error.given if isinstance(error, UserError) else str(error)
            self._notes.append(f"a vocabulary of {ASSUMED_VOCABULARY:,} is assumed (--vocab-size sets it): {reason}")
            return ASSUMED_VOCABULARY


def _measured_rates(runs: Path) -> list[tuple[dict[str, Any], float]]:
    """Trained positions per second of finished training jobs on this machine, with what decides that speed."""
    here, found = _machine(hardware()), []
    for marker in sorted((runs / "jobs").glob(f"train-*/{DONE}")):
        done, job = read_json(marker), read_json(marker.parent / SPECIFICATION)
        rate = done["result"]["training"]["tokens_per_second"]
        if rate and _machine(done["environment"]["hardware"]) == here:
            specification = job["specification"]
            speed = _speed_of(specification["model"], specification["vocab_size"], specification["training"])
            found.append((speed, float(rate)))
    return found


def _machine(facts: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in facts.items() if key in ("processor", "cores") or key.startswith("cuda")}


def _speed_of(model: dict[str, Any], vocab_size: int, training: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "vocab_size": vocab_size, **{key: training[key] for key in SPEED}}


def _explained(budgets: Sequence[SubjectBudget], rate: float) -> list[str]:
    contexts = " or ".join(f"{context:,}" for context in sorted({each.context for each in budgets}))
    notes = [
        f"FLOPs/token: forward at the training context of {contexts}; training counts three forwards",
        "state: one row, caches and recurrent states in fp32",
    ]
    if places := sorted({each.model.handover for each in budgets if each.model.handover is not None}):
        after = " or ".join(f"{place:,}" for place in places)
        notes.append(f"handed over: bits of a row's state where it is rounded, after {after} tokens (model.state_bits)")
    if any(each.tokens_per_second is None for each in budgets):
        notes.append(
            f"time: assumes {share(ASSUMED_EFFICIENCY)} of {scaled(rate, 'FLOP/s')}, "
            "the rate of matrix products just measured on this machine"
        )
    if any(each.tokens_per_second is not None for each in budgets):
        notes.append("time *: from the tokens/s of earlier runs of the same model on this machine")
    seconds = sum(each.seconds * each.runs for each in budgets)
    flops = sum(each.training_flops * each.runs for each in budgets)
    runs = sum(each.runs for each in budgets)
    validated = all(each.validates is not None for each in budgets)
    notes.append(
        f"training in all: {runs} run{'s' if runs > 1 else ''}, {scaled(flops, 'FLOP')}, about {duration(seconds)} "
        f"one after the other; {'validation is counted, probes' if validated else 'validation and probes'} come on top"
    )
    return notes


def _solved(model: ModelConfig, free: str | None) -> int:
    """The value of the free setting."""
    return {"mlp_width": model.hidden, "width": model.width, "depth": len(model.layers())}[free or "width"]


def parse_contexts(text: str) -> list[int]:
    """`512,4k,131072` as numbers of tokens, each once, in order; `k` is 1,024.

    Raises:
        UserError: anything else.
    """
    try:
        found = [int(part[:-1]) * 1024 if part[-1:] in ("k", "K") else int(part) for part in text.split(",")]
    except ValueError:
        raise _no_contexts(text) from None
    if min(found) < 1:
        raise _no_contexts(text)
    return sorted(set(found))


def _no_contexts(text: str) -> UserError:
    allowed = "numbers of tokens of 1 or more with commas, e.g. 512,4k,131072"
    return UserError(f"--contexts {text!r}", allowed, "write them so, or leave `--contexts` out")


def short(context: int) -> str:
    """`512`, `4k`, `1000`: as in `parse_contexts`."""
    return f"{context // 1024}k" if context % 1024 == 0 else str(context)
