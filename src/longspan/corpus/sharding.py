"""The last stage of a preparation: each part of the spool becomes one shard, in one process per core."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longspan.corpus.collect import KEEP, Collected
from longspan.corpus.document import Document
from longspan.corpus.shards import OneShard, ShardEntry, write_index
from longspan.corpus.spool import Part, read_part
from longspan.corpus.tokenizer import Tokenizer
from longspan.foundation.failures import killed_process
from longspan.foundation.files import read_json, write_json
from longspan.foundation.machine import available_cores
from longspan.foundation.progress import Progress, Report

_BATCH_CHARS = 1 << 19
_WORTH_A_PROCESS = 32 * 2**20


@dataclass(frozen=True, slots=True)
class _Task:
    """All that a process needs to write one shard."""

    part: Part
    spool: Path
    keep: Path
    shards: Path
    entry: Path


def write_shards(
    collected: Collected, tokenizer_folder: Path, folder: Path, entries: Path, workers: int | None, report: Report
) -> dict[str, dict[str, int]]:
    """Tokenize every part and write the index of each split. Parts whose entry exists are not done again.

    Args:
        collected: the spooled documents.
        tokenizer_folder: a saved tokenizer.
        folder: gets a folder per split.
        entries: a folder that remembers finished parts between runs.
        workers: processes; None takes one per core where the text is worth it. The result does not depend on it.

    Returns:
        split → documents, characters, bytes, tokens, inexact_documents.
    """
    entries.mkdir(parents=True, exist_ok=True)
    tasks = [
        _Task(
            part=part,
            spool=collected.folder,
            keep=collected.folder / KEEP,
            shards=folder / part.split,
            entry=entries / f"{part.name}.json",
        )
        for part in collected.parts
    ]
    missing = [task for task in tasks if not task.entry.exists()]
    total = sum(collected.text_bytes.values())
    done = sum(read_json(task.entry)["facts"]["bytes"] for task in tasks if task.entry.exists())
    report(Progress("tokenize", done, total, "B"))
    for num_bytes in _run(missing, tokenizer_folder, _num_workers(workers, missing, total)):
        done += num_bytes
        report(Progress("tokenize", done, total, "B"))
    return _join(tasks, Tokenizer.load(tokenizer_folder), folder)


def _num_workers(asked: int | None, tasks: list[_Task], total_bytes: int) -> int:
    if asked is None:
        # Alone, the tokenizer's own threads use all cores; a process costs a second or two to start.
        asked = available_cores() if total_bytes >= 2 * _WORTH_A_PROCESS else 1
    return max(1, min(asked, len(tasks)))


def _run(tasks: list[_Task], tokenizer_folder: Path, workers: int) -> Iterator[int]:
    """Do the tasks; yields bytes of text as they are done."""
    if workers == 1:
        tokenizer = Tokenizer.load(tokenizer_folder) if tasks else None
        for task in tasks:
            assert tokenizer is not None
            yield from _write(task, tokenizer)
        return
    # Spawned, not forked: a fork would copy the locks of the tokenizer's and torch's running threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(tokenizer_folder,))
    try:
        futures: list[Future[int]] = [pool.submit(_write_in_worker, task) for task in tasks]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        fix = "free some memory, then run the same command again: it goes on after the finished shards"
        raise killed_process("the tokens of the corpus", fix) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker_tokenizer: list[Tokenizer] = []


def _start(tokenizer_folder: Path) -> None:
    # One thread each: the processes already use all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_tokenizer[:] = [Tokenizer.load(tokenizer_folder)]


def _write_in_worker(task: _Task) -> int:
    return sum(_write(task, _worker_tokenizer[0]))


def _write(task: _Task, tokenizer: Tokenizer) -> Iterator[int]:
    """Write one shard and, last, the entry that says it is whole; yields the bytes of text of each batch."""
    facts = {"documents": 0, "characters": 0, "bytes": 0, "tokens": 0, "inexact_documents": 0, "without_tokens": 0}
    keep = np.load(task.keep, mmap_mode="r")
    with OneShard(task.shards, task.part.number, tokenizer.vocab_size) as shard:
        for documents in _batches(read_part(task.spool, task.part, keep)):
            before = facts["bytes"]
            for document, ids in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
                num_bytes = len(document.text.encode())
                facts["bytes"] += num_bytes
                if not len(ids):
                    facts["without_tokens"] += 1
                    continue
                facts["documents"] += 1
                facts["characters"] += len(document.text)
                facts["tokens"] += len(ids)
                facts["inexact_documents"] += int(tokenizer.token_bytes[ids].sum()) != num_bytes
                shard.add(document.id, document.title, ids, num_bytes)
            yield facts["bytes"] - before
        entry = shard.close()
    if not entry.num_documents:
        for name in entry.files:
            (task.shards / name).unlink()
    write_json(task.entry, {"facts": facts, "entry": asdict(entry) if entry.num_documents else None})


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _join(tasks: list[_Task], tokenizer: Tokenizer, folder: Path) -> dict[str, dict[str, int]]:
    facts: dict[str, dict[str, int]] = {}
    entries: dict[str, list[ShardEntry]] = {}
    for task in tasks:
        stored: dict[str, Any] = read_json(task.entry)
        totals = facts.setdefault(task.part.split, dict.fromkeys(stored["facts"], 0))
        for name, value in stored["facts"].items():
            totals[name] += value
        entries.setdefault(task.part.split, []).extend([ShardEntry(**stored["entry"])] if stored["entry"] else [])
    for split, of_split in entries.items():
        if of_split:
            write_index(
                folder / split,
                of_split,
                vocab_size=tokenizer.vocab_size,
                tokenizer_fingerprint=tokenizer.fingerprint,
            )
    return {split: totals for split, totals in facts.items() if totals["documents"]}
