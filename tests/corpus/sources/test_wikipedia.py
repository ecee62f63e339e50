"""The real MediaWiki sample: which pages come out, in which order, whatever way the dump is packed."""

from __future__ import annotations

import bz2
import multiprocessing
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from longspan.corpus.document import Document
from longspan.corpus.sources import WikipediaSource, wikimedia_dump
from longspan.corpus.sources.wikimedia_dump import is_multistream
from longspan.foundation.errors import DataError, MachineError, UserError
from longspan.foundation.progress import silent

ARTICLES = "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
TABLES = "enwiki-table-markup.xml.bz2"


def sample(name: str) -> Path:
    """A dump sample that the package gensim ships; its code is not imported."""
    try:
        return Path(str(distribution("gensim").locate_file(f"gensim/test/test_data/{name}")))
    except PackageNotFoundError:
        pytest.skip("the package gensim (extra `dev`) carries the dump sample and is not installed")


@pytest.fixture(scope="module")
def table_pages() -> list[Document]:
    return read(sample(TABLES))


def read(path: Path, workers: int = 1, **settings: object) -> list[Document]:
    source = WikipediaSource.model_validate({"path": path, "workers": workers, **settings})
    return list(source.documents(Path("unused")))


def repack(source: Path, target: Path, pages_per_stream: int) -> Path:
    """The same dump as a multistream one: a head, streams of whole pages, and the end in a stream of its own."""
    head, *pages = bz2.decompress(source.read_bytes()).split(b"  <page>")
    pages = [b"  <page>" + page for page in pages]
    last, _, end = pages[-1].partition(b"</mediawiki>")
    parts = [head]
    pages[-1] = last
    parts += [b"".join(pages[i : i + pages_per_stream]) for i in range(0, len(pages), pages_per_stream)]
    parts.append(b"</mediawiki>" + end)
    target.write_bytes(b"".join(map(bz2.compress, parts)))
    return target


def test_a_multistream_dump_gives_the_same_documents_in_the_same_order(
    table_pages: list[Document], tmp_path: Path
) -> None:
    multistream = repack(sample(TABLES), tmp_path / "multi.xml.bz2", 2)
    assert is_multistream(multistream)
    assert not is_multistream(sample(TABLES))
    assert read(multistream) == table_pages
    assert len(table_pages) == 5


def test_streams_that_cut_pages_apart_are_read_as_one_file(table_pages: list[Document], tmp_path: Path) -> None:
    content = bz2.decompress(sample(TABLES).read_bytes())
    target = tmp_path / "parallel.xml.bz2"
    target.write_bytes(b"".join(bz2.compress(content[i : i + 50_000]) for i in range(0, len(content), 50_000)))
    assert not is_multistream(target)
    assert read(target) == table_pages


@pytest.mark.slow
@pytest.mark.parametrize("multistream", [False, True])
def test_workers_change_nothing(tmp_path: Path, multistream: bool) -> None:
    dump = repack(sample(ARTICLES), tmp_path / "m.xml.bz2", 10) if multistream else sample(ARTICLES)
    alone = read(dump)
    assert len(alone) == 106
    assert read(dump, workers=2) == alone


def test_a_killed_worker_is_told_with_the_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikimedia_dump, "_READ_BYTES", 500)
    monkeypatch.setattr(wikimedia_dump, "_PAGES_BYTES", 500)
    path = write_dump(tmp_path / "dump.xml.bz2", [(f"Page {number}", "Some words. " * 40) for number in range(40)])
    documents = WikipediaSource(path=path, workers=2).read(tmp_path, silent)
    next(documents)
    for worker in multiprocessing.active_children():
        worker.kill()
    with pytest.raises(MachineError, match=r"dump\.xml\.bz2: most likely it was out of memory") as caught:
        list(documents)
    assert "corpus.workers" in caught.value.fix


def test_redirects_and_other_namespaces_are_left_out_and_counted(tmp_path: Path) -> None:
    messages: list[str] = []
    source = WikipediaSource(path=sample(ARTICLES), workers=1)
    documents = list(source.documents(tmp_path, lambda progress: messages.append(progress.message)))
    assert len(documents) == 106
    assert len({document.id for document in documents}) == 106
    assert (documents[0].id, documents[0].title) == ("12", "Anarchism")
    assert [int(document.id) for document in documents] == sorted(int(document.id) for document in documents)
    assert "106 articles; left out 99 redirects, 1 pages of other namespaces, 0 without prose" in messages[-1]


def write_dump(path: Path, pages: list[tuple[str, str]], pack: Callable[[bytes], bytes] = bz2.compress) -> Path:
    namespaces = '<namespace key="6" case="first-letter">Datei</namespace><namespace key="0" />'
    body = "".join(
        f"<page><title>{escape(title)}</title><ns>0</ns><id>{number}</id>"
        f"<revision><id>1</id><text>{escape(text)}</text></revision></page>\n"
        for number, (title, text) in enumerate(pages, 1)
    )
    info = f"<siteinfo><namespaces>{namespaces}</namespaces></siteinfo>"
    root = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/">'
    path.write_bytes(pack(f"{root}{info}\n{body}</mediawiki>\n".encode()))
    return path


def test_the_namespaces_of_the_wiki_itself_count(tmp_path: Path) -> None:
    dump = write_dump(
        tmp_path / "de.xml.bz2", [("Haus", "Ein [[Haus]]. [[Datei:Haus.jpg|mini|Ein Haus]]"), ("Leer", "")]
    )
    assert read(dump) == [Document("1", "Ein Haus.\n", "Haus")]


@pytest.mark.parametrize("keep", [0.3, 0.9, 0.9999])
@pytest.mark.parametrize("multistream", [False, True])
def test_a_truncated_dump_is_refused_by_name(tmp_path: Path, keep: float, multistream: bool) -> None:
    whole = repack(sample(TABLES), tmp_path / "whole.xml.bz2", 1) if multistream else sample(TABLES)
    content = whole.read_bytes()
    dump = tmp_path / "cut.xml.bz2"
    dump.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(DataError, match=r"cut\.xml\.bz2 is truncated or damaged"):
        read(dump)


def test_a_dump_cut_between_two_streams_is_refused_by_name(tmp_path: Path) -> None:
    content = repack(sample(TABLES), tmp_path / "whole.xml.bz2", 1).read_bytes()
    dump = tmp_path / "cut.xml.bz2"
    dump.write_bytes(content[: content.rfind(b"BZh91AY&SY")])
    with pytest.raises(DataError, match=r"cut\.xml\.bz2 .*it ends before </mediawiki>"):
        read(dump)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_dump_is_refused_by_name(tmp_path: Path, workers: int) -> None:
    content = bytearray(repack(sample(TABLES), tmp_path / "whole.xml.bz2", 1).read_bytes())
    content[len(content) // 2] ^= 0xFF
    dump = tmp_path / "bad.xml.bz2"
    dump.write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.xml\.bz2 is truncated or damaged"):
        read(dump, workers)


def test_what_is_no_dump_is_refused_by_name(tmp_path: Path) -> None:
    for name, content in (("text.bz2", bz2.compress(b"hello")), ("plain.bz2", b"hello"), ("empty.bz2", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)
    with pytest.raises(DataError, match="nowhere"):
        read(tmp_path / "nowhere.bz2")
    with pytest.raises(UserError, match="`path` together with `date`"):
        WikipediaSource.parse({"source": "wikipedia", "path": "x", "date": "20260101"}, "corpus.source")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_dump(tmp_path: Path) -> None:
    generator = random.Random(0)
    page = " ".join(f"word{generator.randrange(1000)}" for _ in range(10_000))
    code = """
import pathlib, resource, sys
from longspan.corpus.sources import WikipediaSource
for document in WikipediaSource(path=pathlib.Path(sys.argv[1]), workers=1).documents(pathlib.Path(".")):
    pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""

    def peak_mebibytes(pages: int) -> int:
        dump = write_dump(tmp_path / f"{pages}.xml.bz2", [(f"P{i}", f"{i} {page}") for i in range(pages)])
        done = subprocess.run([sys.executable, "-c", code, str(dump)], check=True, capture_output=True, text=True)
        return int(done.stdout)

    # 20 MB of wikitext more cost less than half of that.
    assert peak_mebibytes(300) < peak_mebibytes(50) + 10
