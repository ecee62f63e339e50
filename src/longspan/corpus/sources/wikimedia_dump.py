"""Pages out of a MediaWiki XML dump (`.xml.bz2`), in parallel, in page order, with bounded memory.

A multistream dump is many small bz2 streams, each holding whole pages: the parent process only cuts the file at the
streams' signatures, and workers decompress, parse and clean. Any other dump is decompressed by the parent, cut at page
ends, and parsed and cleaned by workers. At most two batches per worker are in flight.
"""

from __future__ import annotations

import bz2
import multiprocessing
import os
import re
import threading
import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from longspan.corpus.cleaning import CleaningConfig, Namespaces, clean_wikitext
from longspan.corpus.document import Document
from longspan.foundation.errors import DataError
from longspan.foundation.failures import killed_process
from longspan.foundation.progress import Progress, Report

_STREAM = b"BZh91AY&SY"
_READ_BYTES = 1 << 20
_BATCH_BYTES = 1 << 19
"""Compressed bytes per multistream batch (a few MB of wikitext)."""
_PAGES_BYTES = 1 << 22
_MAX_STREAM_BYTES = 1 << 26
_PAGE_END = b"</page>"


@dataclass(slots=True)
class PageCounts:
    """What became of the pages of a dump."""

    articles: int = 0
    redirects: int = 0
    other_namespaces: int = 0
    empty: int = 0
    unreadable: list[str] = field(default_factory=list)

    def add(self, other: PageCounts) -> None:
        """Add the counts of another part of the dump."""
        self.articles += other.articles
        self.redirects += other.redirects
        self.other_namespaces += other.other_namespaces
        self.empty += other.empty
        self.unreadable += other.unreadable


@dataclass(frozen=True, slots=True)
class _Batch:
    """Work for one worker: bytes that hold whole pages, where they stand in the dump and where the file then is."""

    data: bytes
    compressed: bool
    offset: int
    done: int


@dataclass(frozen=True, slots=True)
class _Settings:
    dump: Path
    cleaning: CleaningConfig
    names: tuple[tuple[int, str], ...]


def read_dump(dump: Path, cleaning: CleaningConfig, workers: int, report: Report) -> Iterator[Document]:
    """Yield the articles of a dump (namespace 0, no redirects) as clean text, in page order.

    `id` is the page id. Pages whose text is empty after cleaning, and the few that the parser cannot take, are left
    out and counted in a last progress message.

    Args:
        dump: a local `.xml.bz2`.
        cleaning: what counts as running text.
        workers: processes; 1 works in this process.
        report: takes progress in bytes of the dump.

    Raises:
        DataError: the dump is damaged, truncated or not a MediaWiki dump; by name.
    """
    if not dump.is_file():
        raise DataError(f"{dump} does not exist", "a .xml.bz2 file", "change corpus.path")
    counts = PageCounts()
    total = dump.stat().st_size
    settings = _Settings(dump, cleaning, _namespaces(dump))
    for batch, documents, part in _process(_batches(dump), settings, workers):
        counts.add(part)
        report(Progress("extract", batch.done, total, "B", {"articles": counts.articles}))
        yield from documents
    summary = (
        f"{dump.name}: {counts.articles:,} articles; left out {counts.redirects:,} redirects, "
        f"{counts.other_namespaces:,} pages of other namespaces, {counts.empty:,} without prose"
    )
    if counts.unreadable:
        names = ", ".join(counts.unreadable[:5])
        summary += f", {len(counts.unreadable):,} that the parser could not read ({names})"
    report(Progress("extract", total, total, "B", {"articles": counts.articles}, summary))


def _process(
    batches: Iterator[_Batch], settings: _Settings, workers: int
) -> Iterator[tuple[_Batch, list[Document], PageCounts]]:
    if workers == 1:
        for batch in batches:
            yield batch, *_extract(batch, settings)
        return
    # `spawn`: the caller may hold torch threads, which a forked child would inherit half-dead.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_with_parent)
    waiting: deque[tuple[_Batch, Future[tuple[list[Document], PageCounts]]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_extract, batch, settings)))
            if len(waiting) >= 2 * workers:
                first, result = waiting.popleft()
                yield first, *result.result()
        while waiting:
            first, result = waiting.popleft()
            yield first, *result.result()
    except BrokenProcessPool as error:
        fix = "free some memory, or lower corpus.workers, then run the same command again"
        raise killed_process(str(settings.dump), fix) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _leave_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# ---- cutting the file ----------------------------------------------------------------------------------------------


def _damaged(dump: Path, cause: object) -> DataError:
    return DataError(
        f"{dump} is truncated or damaged ({cause})",
        "a whole MediaWiki dump (.xml.bz2)",
        "remove the file and get it again; Longspan verifies dumps that it fetches itself",
    )


def _batches(dump: Path) -> Iterator[_Batch]:
    return _stream_batches(dump) if is_multistream(dump) else _page_batches(dump)


def is_multistream(dump: Path) -> bool:
    """Whether the second bz2 stream begins with a page, i.e. streams hold whole pages."""
    streams = _streams(dump, search_bytes=_MAX_STREAM_BYTES)
    next(streams, None)
    second = next(streams, None)
    if second is None:
        return False
    with suppress(OSError, ValueError):
        return bz2.BZ2Decompressor().decompress(second[1], max_length=4096).lstrip().startswith(b"<page>")
    return False


def _streams(dump: Path, search_bytes: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each bz2 stream; without a second signature in `search_bytes` it gives up."""
    with dump.open("rb") as file:
        pending, offset, searched = b"", 0, 0
        while chunk := file.read(_READ_BYTES):
            start = max(len(pending) - len(_STREAM) + 1, 1)
            pending += chunk
            while (cut := pending.find(_STREAM, start)) > 0:
                yield offset, pending[:cut]
                pending, offset, searched, start = pending[cut:], offset + cut, 0, 1
            searched += len(chunk)
            if search_bytes is not None and searched > search_bytes:
                return
            if len(pending) > 2 * _MAX_STREAM_BYTES:
                raise _damaged(dump, f"no end of the bz2 stream at byte {offset:,}")
        if pending:
            yield offset, pending


def _stream_batches(dump: Path) -> Iterator[_Batch]:
    held: list[bytes] = []
    first, size, last = 0, 0, b""
    for offset, stream in _streams(dump):
        if size + len(stream) > _BATCH_BYTES and held:
            yield _Batch(b"".join(held), True, first, offset)
            held, size = [], 0
        if not held:
            first = offset
        held.append(stream)
        size += len(stream)
        last = stream
    # The dump's closing tag has a stream of its own, or ends the last one: its absence is a cut at a stream's end.
    _check_end(dump, last)
    yield _Batch(b"".join(held), True, first, dump.stat().st_size)


def _check_end(dump: Path, stream: bytes) -> None:
    try:
        end = _decompress(stream)
    except (OSError, ValueError) as error:
        raise _damaged(dump, error) from None
    if not end.rstrip().endswith(b"</mediawiki>"):
        raise _damaged(dump, "it ends before </mediawiki>")


def _page_batches(dump: Path) -> Iterator[_Batch]:
    pending, offset = b"", 0
    with dump.open("rb") as raw:
        try:
            with bz2.open(raw) as file:
                while chunk := file.read(_READ_BYTES):
                    pending += chunk
                    if len(pending) >= _PAGES_BYTES and (cut := pending.rfind(_PAGE_END)) >= 0:
                        cut += len(_PAGE_END)
                        yield _Batch(pending[:cut], False, offset, raw.tell())
                        pending, offset = pending[cut:], offset + cut
        except (EOFError, OSError) as error:
            raise _damaged(dump, error) from None
    if not pending.rstrip().endswith(b"</mediawiki>"):
        raise _damaged(dump, "it ends before </mediawiki>")
    yield _Batch(pending, False, offset, dump.stat().st_size)


def _decompress(data: bytes) -> bytes:
    """All streams in `data`. `bz2.decompress` ignores a damaged stream after a good one."""
    parts = []
    while data:
        stream = bz2.BZ2Decompressor()
        parts.append(stream.decompress(data))
        if not stream.eof:
            raise ValueError("a bz2 stream is cut short")
        data = stream.unused_data
    return b"".join(parts)


def site_info(dump: Path) -> str:
    """What stands before the first page: the root element and, in most dumps, the wiki's namespaces."""
    try:
        with bz2.open(dump) as file:
            head = file.read(1 << 16)
    except (EOFError, OSError) as error:
        raise _damaged(dump, error) from None
    if b"<mediawiki" not in head[:4096]:
        raise DataError(f"{dump} is not a MediaWiki dump", "an XML dump of pages (.xml.bz2)", "name another file")
    return head.partition(b"<page>")[0].decode("utf-8", errors="ignore")


def _namespaces(dump: Path) -> tuple[tuple[int, str], ...]:
    found = re.findall(r'<namespace key="(-?\d+)"[^<>]*>([^<]+)</namespace>', site_info(dump))
    return tuple((int(key), name) for key, name in found)


# ---- the work of one worker ----------------------------------------------------------------------------------------


def _extract(batch: _Batch, settings: _Settings) -> tuple[list[Document], PageCounts]:
    counts = PageCounts()
    documents = []
    namespaces = Namespaces(settings.names)
    for page in _pages(batch, settings.dump):
        if page.findtext("ns") != "0":
            counts.other_namespaces += 1
        elif page.find("redirect") is not None:
            counts.redirects += 1
        elif document := _document(page, settings.cleaning, namespaces, counts):
            documents.append(document)
    return documents, counts


def _pages(batch: _Batch, dump: Path) -> Iterator[ElementTree.Element]:
    try:
        data = _decompress(batch.data) if batch.compressed else batch.data
        start, end = data.find(b"<page>"), data.rfind(_PAGE_END)
        if start < 0:
            return
        # Namespaces are declared on the root element, which only the first batch has: between pages there is nothing.
        yield from ElementTree.fromstring(b"<pages>" + data[start : end + len(_PAGE_END)] + b"</pages>")
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise _damaged(dump, f"from byte {batch.offset:,}: {error}") from None


def _document(
    page: ElementTree.Element, cleaning: CleaningConfig, namespaces: Namespaces, counts: PageCounts
) -> Document | None:
    # A dump with histories lists revisions from old to new.
    revisions = page.findall("revision")
    wikitext = (revisions[-1].findtext("text") if revisions else None) or ""
    title = page.findtext("title") or ""
    from mwparserfromhell.parser import ParserError

    try:
        text = clean_wikitext(wikitext, cleaning, namespaces)
    except (ParserError, RecursionError):
        # What the parser raises on pathological nesting; the page is named in the summary.
        counts.unreadable.append(title)
        return None
    if not text:
        counts.empty += 1
        return None
    counts.articles += 1
    return Document(id=page.findtext("id") or "", text=text, title=title)
