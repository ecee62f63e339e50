"""A task as the corpus of a study: its settings, and the folder that takes the place of token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import SerializeAsAny, field_validator, model_validator

from longspan.corpus.prepare import LEDGER, TOKENIZER, PreparedCorpus
from longspan.corpus.shards import ShardWriter
from longspan.corpus.tasks.base import Task, make_task
from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.foundation.config import Config
from longspan.foundation.errors import UserError
from longspan.foundation.files import atomic_directory, write_json
from longspan.foundation.plugins import is_plugin
from longspan.foundation.progress import Progress, Report, silent
from longspan.foundation.randomness import numpy_generator

TEST_STRINGS = 256
"""Strings kept as documents for the probes that ask about documents."""
TEST_SEED = 0
FORMAT = 1


class TaskCorpus(Config):
    """Strings of a task, drawn anew in every step: no text, no splits, no tokenizer to train.

    The settings of the task stand beside its name: `{source: task, task: copy, min_length: 5, max_length: 20}`.

    Attributes:
        source: `task`.
        task: which, with its settings.
    """

    source: Literal["task"]
    task: SerializeAsAny[Task]

    @model_validator(mode="before")
    @classmethod
    def _gather_task(cls, data: Any) -> Any:
        if not isinstance(data, dict) or isinstance(data.get("task"), dict | Task):
            return data
        settings = {key: value for key, value in data.items() if key != "source"}
        return {"source": data.get("source"), "task": make_task(settings, "")}

    @field_validator("task", mode="before")
    @classmethod
    def _task_from_settings(cls, value: Any) -> Any:
        return make_task(value, "") if isinstance(value, dict) else value

    def fingerprint(self, cache: Path) -> dict[str, Any]:
        """All that determines the strings, JSON-able."""
        del cache
        module = type(self.task).__module__
        # The name of a user's own file holds its checksum.
        code = {"code": module} if is_plugin(module) else {}
        return {"source": "task", "generator": FORMAT, **self.task.model_dump(mode="json"), **code}

    def tokenizer(self) -> TokenizerConfig:
        """Settings of the tokenizer that the task brings."""
        return TokenizerConfig(kind="task", vocab_size=len(self.task.vocabulary().symbols))


def prepare_task(
    corpus: TaskCorpus, tokenizer: TokenizerConfig, folder: Path, report: Report = silent
) -> PreparedCorpus:
    """Write the tokenizer of a task, and a few strings as the test split; training needs nothing on disk.

    Raises:
        UserError: another tokenizer than the task's (a model that was trained on something else), or a task that has
            no example of some size.
    """
    task = corpus.task
    made = task.tokenizer()
    _check_tokenizer(task, made, tokenizer)
    if not (folder / LEDGER).exists():
        with atomic_directory(folder / TOKENIZER) as partial:
            made.save(partial)
        with atomic_directory(folder / "test") as partial:
            facts = _write_strings(task, made, partial, report)
        ledger = {
            "format": FORMAT,
            "task": task.model_dump(mode="json"),
            "splits": {"test": facts},
            "tokenizer": {"name": made.name, "fingerprint": made.fingerprint, "vocab_size": made.vocab_size},
        }
        write_json(folder / LEDGER, ledger)
    return PreparedCorpus.open(folder)


def _check_tokenizer(task: Task, made: Tokenizer, given: TokenizerConfig) -> None:
    if given.kind == "task":
        return
    found = train_tokenizer(given, ()) if given.kind == "pretrained" else None
    if found is None or found.fingerprint != made.fingerprint:
        raise UserError(
            f"the tokenizer {found.name if found else given.kind} for the task {task.task}",
            f"the task's own, {made.name}: its ids are not those of a text",
            "ask a model that was trained on this task with the same vocabulary, or ask this one about text",
        )


def _write_strings(task: Task, tokenizer: Tokenizer, folder: Path, report: Report) -> dict[str, int]:
    writer = ShardWriter(folder, tokenizer.vocab_size, tokenizer.fingerprint)
    sizes = task.sizes()
    for number in range(TEST_STRINGS):
        size = sizes[number * len(sizes) // TEST_STRINGS]
        tokens = task.example(numpy_generator(TEST_SEED, "task test", number), size).inputs
        # Packing puts markers in front of documents.
        tokens = np.asarray(tokens[1:] if task.marked else tokens)
        writer.add(f"{size}:{number}", task.task, tokens, int(tokenizer.token_bytes[tokens].sum()))
    shards = writer.close()
    report(Progress("strings", TEST_STRINGS, TEST_STRINGS, "strings"))
    return {"documents": shards.num_documents, "tokens": shards.num_tokens, "bytes": shards.num_bytes}
