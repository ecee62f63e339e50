"""From a source to verified token shards, in stages that a killed run does not repeat.

`request.json` says what the folder is for, `work/` holds what finished stages left, `ledger.json` is written last:
with it the corpus is whole, without it the next run goes on from the last finished stage (or shard) and ends in the
same bytes.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longspan.corpus.collect import Collected, CorpusConfig, SplitConfig, collect
from longspan.corpus.document import SPLITS
from longspan.corpus.packing import Batch, PackedBatches, PackingConfig, evaluation_batches
from longspan.corpus.sharding import write_shards
from longspan.corpus.shards import TokenShards
from longspan.corpus.spool import PART_BYTES, read_part
from longspan.corpus.tasks import Task, TaskBatches, make_task, validation_batches
from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, tokenizer_fingerprint, train_tokenizer
from longspan.foundation.errors import DataError, UserError
from longspan.foundation.files import atomic_directory, digest, read_json, recover_directory, sha256_file, write_json
from longspan.foundation.progress import Progress, Report, silent

__all__ = ["CorpusConfig", "PreparedCorpus", "SplitConfig", "prepare"]

LEDGER, TOKENIZER = "ledger.json", "tokenizer"
_REQUEST, _WORK = "request.json", "work"
_REPORT_BYTES = 1 << 20

TrainingBatches = PackedBatches | TaskBatches


@dataclass(frozen=True)
class PreparedCorpus:
    """A corpus that is ready to train and to be asked about.

    Attributes:
        folder: where it lies.
        tokenizer: what made the tokens.
        shards: split → documents as tokens; a split that nobody asked for is absent.
        ledger: where every document went: `seen`, `dropped` by reason with examples, `dedup`, `splits` (documents,
            characters, bytes, tokens), `tokenizer`.
        fingerprint: sha256 (hex) of tokenizer and shards.
        task: what training draws its strings from where the corpus is a task; its shards hold a few for the probes.
    """

    folder: Path
    tokenizer: Tokenizer
    shards: dict[str, TokenShards]
    ledger: dict[str, Any]
    task: Task | None = None

    @staticmethod
    def open(folder: Path, verify: bool = True) -> PreparedCorpus:
        """Open what `prepare` wrote.

        Args:
            folder: the folder given to `prepare`.
            verify: compare the sha256 of every file; sizes are compared in any case.

        Raises:
            DataError: an unfinished preparation, or a missing, truncated or altered file, by name.
        """
        if not (folder / LEDGER).is_file():
            raise DataError(
                f"{folder} holds no finished corpus (no {LEDGER})", "a finished preparation", "prepare the corpus"
            )
        ledger = read_json(folder / LEDGER)
        tokenizer = Tokenizer.load(folder / TOKENIZER)
        shards = {split: TokenShards.open(folder / split, verify=verify) for split in ledger["splits"]}
        for split, of_split in shards.items():
            if of_split.tokenizer_fingerprint != tokenizer.fingerprint:
                raise DataError(
                    f"the shards of {folder / split} were made by another tokenizer than the one beside them",
                    "the files as written",
                    "remove the folder and prepare the corpus again",
                )
        task = make_task(ledger["task"], f"{folder}: task") if "task" in ledger else None
        return PreparedCorpus(folder=folder, tokenizer=tokenizer, shards=shards, ledger=ledger, task=task)

    def training_batches(self, packing: PackingConfig, *, context: int, rows: int, seed: int) -> TrainingBatches:
        """Batches to train on, without end.

        Raises:
            DataError, UserError: nothing to train on, or a packing that cannot be; see `PackedBatches`, `TaskBatches`.
        """
        if self.task is not None:
            return TaskBatches(self.task, packing, context=context, rows=rows, seed=seed)
        special = self.tokenizer.special
        return PackedBatches(self.shards["train"], packing, context=context, rows=rows, special=special, seed=seed)

    def validation_batches(self, packing: PackingConfig, *, context: int, rows: int) -> Iterator[Batch]:
        """One pass over the validation split, or over a task's fixed validation set.

        Raises:
            DataError: no validation split.
        """
        if self.task is not None:
            return validation_batches(self.task, packing, context=context, rows=rows)
        if "validation" not in self.shards:
            raise DataError(
                "the corpus has no validation split",
                "one for training, which keeps the best weights by it",
                "raise corpus.splits.validation, or take it out of train with corpus.carve=[validation]",
            )
        special = self.tokenizer.special
        return evaluation_batches(self.shards["validation"], packing, context=context, rows=rows, special=special)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer and of every shard."""
        shards = {split: of_split.fingerprint for split, of_split in self.shards.items()}
        return digest({"tokenizer": self.tokenizer.fingerprint, "shards": shards})


def prepare(
    corpus: CorpusConfig,
    tokenizer: TokenizerConfig,
    folder: Path,
    cache: Path,
    report: Report = silent,
    *,
    workers: int | None = None,
    part_bytes: int = PART_BYTES,
) -> PreparedCorpus:
    """Prepare a corpus, or what is missing of it. Memory stays bounded whatever the size of the source.

    Args:
        corpus: which documents.
        tokenizer: which tokens; trained on the training split only.
        folder: gets `tokenizer/`, a folder of shards per split, and `ledger.json` last.
        cache: for the source's downloads; kept.
        report: takes progress; it may raise `Stopped`.
        workers: tokenizing processes; None decides by the size of the text. The result does not depend on it.
            A script that asks for several must guard its main code with `if __name__ == "__main__":`.
        part_bytes: UTF-8 bytes of text per shard.

    Raises:
        UserError: settings that cannot be honoured; a folder prepared from other settings or inputs; a vocabulary
            larger than the text supports.
        DataError: damaged input, an empty split, no space on the disk. What finished before is kept.
        MissingExtra: a source or tokenizer without its package.
    """
    _claim(folder, corpus, tokenizer, cache, part_bytes)
    work = folder / _WORK
    if not (folder / LEDGER).exists():
        documents = work / "documents"
        recover_directory(documents)
        if documents.exists():
            collected = Collected(documents)
        else:
            collected = collect(corpus, documents, cache, part_bytes, report)
        recover_directory(folder / TOKENIZER)
        if not (folder / TOKENIZER).exists():
            _make_tokenizer(tokenizer, collected, folder / TOKENIZER, report)
        splits = write_shards(collected, folder / TOKENIZER, folder, work / "entries", workers, report)
        _write_ledger(folder, collected, splits)
    shutil.rmtree(work, ignore_errors=True)
    return PreparedCorpus.open(folder)


def _claim(folder: Path, corpus: CorpusConfig, tokenizer: TokenizerConfig, cache: Path, part_bytes: int) -> None:
    """Refuse a folder that belongs to another corpus; otherwise say what it is for."""
    request = {
        "format": 1,
        "corpus": corpus.fingerprint(cache),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "part_bytes": part_bytes,
    }
    path = folder / _REQUEST
    if not path.exists():
        write_json(path, request)
    elif (there := read_json(path)) != request:
        key, was, now = next(_differences(there, request, ""))
        raise UserError(
            f"{folder} was prepared with {key} = {was}, not {now}",
            "the settings and inputs that the folder was made with",
            "choose another folder, or remove this one",
        )


def _differences(first: Any, second: Any, where: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            yield from _differences(first.get(key), second.get(key), f"{where}.{key}".lstrip("."))
    elif first != second:
        yield where, first, second


def _make_tokenizer(config: TokenizerConfig, collected: Collected, folder: Path, report: Report) -> None:
    total = min(collected.text_bytes["train"], config.training_bytes)
    report(Progress("tokenizer", 0, total, "B"))
    made = train_tokenizer(config, _training_texts(config, collected, total, report))
    with atomic_directory(folder) as partial:
        made.save(partial)
    report(Progress("tokenizer", total, total, "B"))


def _training_texts(config: TokenizerConfig, collected: Collected, total: int, report: Report) -> Iterator[str]:
    """The training split, or a sample of its documents that hangs on their ids alone."""
    fraction = config.training_bytes / max(1, collected.text_bytes["train"])
    done = reported = 0
    for part in collected.parts:
        if part.split != "train":
            continue
        for document in read_part(collected.folder, part, collected.keep):
            if fraction < 1 and _place(document.id) >= fraction:
                continue
            yield document.text
            done += len(document.text.encode())
            if done - reported >= _REPORT_BYTES:
                reported = done
                report(Progress("tokenizer", min(done, total), total, "B"))


def _place(document_id: str) -> float:
    """A stable point of the unit interval, independent of the split's."""
    hashed = hashlib.sha256(f"tokenizer\x1f{document_id}".encode()).digest()
    return int.from_bytes(hashed[:8], "big") / 2**64


def _write_ledger(folder: Path, collected: Collected, splits: dict[str, dict[str, int]]) -> None:
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    dropped = dict(collected.facts["dropped"])
    if without_tokens := sum(facts.pop("without_tokens") for facts in splits.values()):
        dropped["without_tokens"] = {"documents": without_tokens, "examples": []}
    write_json(
        folder / LEDGER,
        {
            "format": 1,
            "request": sha256_file(folder / _REQUEST),
            **collected.facts,
            "dropped": dropped,
            "splits": {split: splits[split] for split in SPLITS if split in splits},
            "tokenizer": {
                "name": tokenizer.name,
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "bytes_per_token": {split: facts["bytes"] / facts["tokens"] for split, facts in splits.items()},
                **tokenizer.provenance,
            },
        },
    )
