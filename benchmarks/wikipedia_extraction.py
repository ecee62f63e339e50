"""Wikipedia extraction: MB of XML per second on one and on all cores, against the parser alone.

    python benchmarks/wikipedia_extraction.py [--dump FILE.xml.bz2] [--copies 4] [--rounds 3]

The dump's pages are repeated `copies` times into a multistream dump of 50 pages a stream (the default is the sample of
206 real pages that the package `gensim` carries). Compared in one run, taking turns: mwparserfromhell's own
`parse(...).strip_code()` on the same articles, already decompressed, in one process (what a user would write first);
the whole path of Longspan (decompression, XML, cleaning) with one worker; and with all cores. MB are 10^6 bytes of
XML. Prints a table and ends in one JSON line.
"""

from __future__ import annotations

import argparse
import bz2
import html
import importlib.metadata
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mwparserfromhell

from longspan.corpus.cleaning import CleaningConfig
from longspan.corpus.sources.wikimedia_dump import read_dump
from longspan.foundation.machine import available_cores
from longspan.foundation.progress import silent

SAMPLE = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", type=Path, default=None)
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    dump = arguments.dump or Path(str(importlib.metadata.distribution("gensim").locate_file(SAMPLE)))
    cores = available_cores()
    with tempfile.TemporaryDirectory() as folder:
        large, size, texts = repeated(dump, arguments.copies, Path(folder))
        ways: dict[str, Callable[[], int]] = {
            "parser alone, 1 process": lambda: sum(len(plain(text)) for text in texts),
            "longspan, 1 worker": lambda: extract(large, 1),
            f"longspan, {cores} workers": lambda: extract(large, cores),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                began = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - began)
    first = statistics.median(seconds["parser alone, 1 process"])
    print(f"{size / 1e6:.1f} MB of XML, {len(texts)} articles, {cores} cores, median of {arguments.rounds} rounds\n")
    print(f"{'':28}{'s':>8}{'MB/s':>8}{'against the parser alone':>28}")
    rows = {}
    for name, taken in seconds.items():
        median = statistics.median(taken)
        rows[name] = {"seconds": median, "mb_per_second": size / 1e6 / median, "ratio": first / median}
        print(f"{name:28}{median:8.2f}{size / 1e6 / median:8.2f}{first / median:27.2f}x")
    print(json.dumps({"benchmark": "wikipedia_extraction", "bytes": size, "cores": cores, "ways": rows}))


def repeated(dump: Path, copies: int, folder: Path) -> tuple[Path, int, list[str]]:
    """A multistream dump of all pages `copies` times, its size in bytes of XML, and the articles' wikitext."""
    xml = bz2.decompress(dump.read_bytes()).decode()
    head, body = xml[: xml.index("<page>")], xml[xml.index("<page>") : xml.rindex("</page>") + len("</page>")]
    pages = re.findall(r"<page>.*?</page>", body, re.S) * copies
    large = folder / "large.xml.bz2"
    with large.open("wb") as file:
        file.write(bz2.compress(head.encode()))
        for start in range(0, len(pages), 50):
            file.write(bz2.compress("\n".join(pages[start : start + 50]).encode()))
        file.write(bz2.compress(b"</mediawiki>"))
    texts = [
        html.unescape(text)
        for page in pages
        if "<redirect" not in page
        for text in re.findall(r"<text[^>]*>(.*?)</text>", page, re.S)
    ]
    return large, len(head) + sum(len(page.encode()) for page in pages), texts


def plain(text: str) -> str:
    return str(mwparserfromhell.parse(text, skip_style_tags=True).strip_code())


def extract(dump: Path, workers: int) -> int:
    return sum(len(document.text) for document in read_dump(dump, CleaningConfig(), workers, silent))


if __name__ == "__main__":
    main()
