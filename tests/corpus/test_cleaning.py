"""Wikitext to prose: unit cases, and what is left over in the real pages."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longspan.corpus.cleaning import CleaningConfig, Namespaces, clean_wikitext
from longspan.corpus.document import Document
from longspan.corpus.sources import WikipediaSource

CASES = {
    "links": ("A [[cat]], [[dog|dogs]], [[:Category:Pets|pets]] and [[wikt:ox|ox]]en.", "A cat, dogs, pets and oxen."),
    "files": ("Before [[File:A.jpg|thumb|left|A ''[[cat]]'' [http://x y] {{nowrap|here}}]] after.", "Before after."),
    "old files": ("[[Image:A.jpg|thumb|A [[cat|big [[tom]] cat]]]]Text.", "Text."),
    "categories": ("Text.\n[[Category:Cats]]\n[[category:Pets|*]]", "Text."),
    "languages": ("Text.\n[[de:Katze]]\n[[zh-yue:貓]]\n[[simple:Cat]]", "Text."),
    "external": ("See [http://a.b/c the ''page''] and [http://a.b].", "See the page and."),
    "reference": ('Fact.<ref name="a">{{cite web|url=x|title=<b>y</b>}}</ref> More.<ref name="a" />', "Fact. More."),
    "open reference": ("Fact.<ref> More", "Fact. More"),
    "odd reference": ('Fact.<ref>{{cite|a</ref name="x"> b}}</ref> More.', "Fact. More."),
    "comment": ("One <!-- two\n\n{{three --> four.", "One four."),
    "comment to the end": ("One.<!-- two", "One."),
    "templates": ("A {{infobox|a={{b|c}}|d=[[e]]}}b {{Citation needed|date=May 2016}}.", "A b."),
    "parameter": ("A {{{1|default}}} b.", "A b."),
    "magic words": ("__NOTOC__\nText.__NOEDITSECTION__\n{{DISPLAYTITLE:x}}{{DEFAULTSORT:y}}", "Text."),
    "units": (
        "It is {{convert|15000|mi|km|abbr=on}} or {{cvt|3|to|5|ft}} long.",
        "It is 15,000 miles or 3 to 5 feet long.",
    ),
    "languages said": ("The {{lang|fr|''chat''}} ({{lang-de|Katze}}, {{transl|ru|kot}}).", "The chat (Katze, kot)."),
    "dates": ("{{As of|2016|5}}, and {{as of|2015|lc=y}}.", "As of May 2016, and as of 2015."),
    "ships": (
        "{{USS|Enterprise|CVN-65}} of the {{sclass-|Nimitz|carrier}}s.",
        "USS Enterprise of the Nimitz-class carriers.",
    ),
    "words": ("a{{ndash}}b{{mdash}}c{{nbsp}}d {{frac|1|2}} H{{sub|2}}O {{val|5|u=kg}}", "a–b—c d 1/2 H2O 5 kg"),
    "kept inside kept": ("{{nowrap|{{lang|la|a [[b|c]]}} {{dropped}}d}}", "a c d"),
    "kept inside dropped": ("{{infobox|{{nowrap|a}}}}b", "b"),
    "quotation": ("{{quote|Words [[of]] it.|A. Author}}", "Words of it."),
    "bold and italics": ("'''Bold''', ''italic'', '''''both''''' and l'''eau''.", "Bold, italic, both and l'eau."),
    "possessive": ("''Nautilus'''s crew", "Nautilus's crew"),
    "entities": ("A&nbsp;&ndash; B &amp; C &lt;ref&gt; x&#x5B;i&#93;", "A – B & C <ref> x[i]"),
    "nowiki": ("Write <nowiki>[[link]] and {{this}}</nowiki> so.", "Write [[link]] and {{this}} so."),
    "formula": ("If <math>x + 1</math> then <math>\\frac{a}{b}</math> holds.", "If x + 1 then holds."),
    "tags": ("H<sub>2</sub>O <small>is</small> <span style='x'>wet</span><br />now", "H2O is wet\nnow"),
    "empty brackets": ("Rome ({{IPA|x}}; {{lang-la|Roma}}) is ( ) old ({{IPA|y}}).", "Rome (Roma) is old."),
    "stray marks": ("Text }} with ]] marks [[ left {{ over.", "Text with marks left over."),
    "table": ("A\n{| class=x\n|-\n| b || {|\n| c\n|}\n|}\nD", "A\n\nD"),
    "indented table": ("A\n:{|\n| b\n|}\nD", "A\n\nD"),
    "template in table": ("A\n{|\n| {{b\n|c\n}}\n|}\nD", "A\n\nD"),
    "table in template": ("A {{b|\n{|\n| c\n|}\n}}\nD", "A\nD"),
    "open table": ("A\n{|\n| b\n== C ==\nD", "A\n\nC\n\nD"),
    "framed rows": ("A\n{{start}}\n|-\n! b\n| c\n{{end}}\nD", "A\n\nD"),
    "lists": ("* one\n** [[two]]\n# three\n: four", "one\ntwo\nthree\nfour"),
    "gallery": ("A\n<gallery mode=x>\nFile:A.jpg|b\n</gallery>\nC", "A\n\nC"),
    "paragraphs": ("One\ntwo.\n\n\n\nThree.", "One\ntwo.\n\nThree."),
    "nothing": ("{{stub}}", ""),
}


@pytest.mark.parametrize("case", CASES)
def test_wikitext_becomes_what_a_reader_reads(case: str) -> None:
    wikitext, prose = CASES[case]
    cleaned = clean_wikitext(wikitext)
    assert re.sub(r"\n+", "\n", cleaned).strip() == re.sub(r"\n+", "\n", prose)
    assert not cleaned or cleaned.endswith(prose[-1] + "\n")


SECTIONS = """Lead.

== History ==
=== Early ===
Old.
=== Empty ===
{| class="wikitable"
| x
|}
== ''Only'' a table ==
{|
|}
== See also ==
* [[Link]]
=== More links ===
* [[Link]]
== Later ==
New.
==References==
{{reflist}}
"""


def test_headings_are_plain_lines_and_empty_or_trailing_sections_go() -> None:
    assert clean_wikitext(SECTIONS) == "Lead.\n\nHistory\n\nEarly\n\nOld.\n\nLater\n\nNew.\n"
    kept = clean_wikitext(SECTIONS, CleaningConfig(drop_sections=()))
    assert kept == "Lead.\n\nHistory\n\nEarly\n\nOld.\n\nSee also\n\nLink\n\nMore links\n\nLink\n\nLater\n\nNew.\n"
    assert "Link" not in clean_wikitext(SECTIONS, CleaningConfig(drop_sections=(), lists=False))


def test_the_names_of_the_wiki_count_beside_the_english_ones() -> None:
    names = Namespaces([(6, "Datei"), (14, "Kategorie"), (0, ""), (4, "Wikipedia")])
    text = "A[[Datei:x.jpg|mini|y]][[Kategorie:Z]][[File:x.jpg]] [[Wikipedia:Rules|rules]]."
    assert clean_wikitext(text, namespaces=names) == "A rules.\n"


PIECES = st.lists(
    st.sampled_from(
        ["{{", "}}", "[[", "]]", "{|", "|}", "\n", "\n|-", "|", "==", "'''", "''", "<ref>", "</ref>", "<math>", "<!--",
         "-->", "text", " ", "*", "[http://x", "]", "lang|fr|", "nowrap|", "File:", "<nowiki>", "</nowiki>", "&lt;",
         "<b>", "\ue000", "\ue010"]
    )
)  # fmt: skip


@given(PIECES)
def test_broken_markup_never_fails_and_leaves_no_private_marks(pieces: list[str]) -> None:
    cleaned = clean_wikitext("".join(pieces))
    assert not re.search("[\ue000-\ue0ff]", cleaned)


@pytest.mark.parametrize("piece", ["<ref>", "{{", "[[a", "<math>", "{|\n", "( ", "''", "<!--", "{{{"])
def test_broken_markup_costs_no_more_than_its_length(piece: str) -> None:
    """Quadratic time would not end here within the test's limit."""
    clean_wikitext(piece * (400_000 // len(piece)))


# ---- the real pages ------------------------------------------------------------------------------------------------

SAMPLES = ("enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2", "enwiki-table-markup.xml.bz2")


@pytest.fixture(scope="module")
def pages() -> list[Document]:
    """All 111 articles of the dump samples that the package gensim ships; its code is not imported."""
    try:
        folder = Path(str(distribution("gensim").locate_file("gensim/test/test_data")))
    except PackageNotFoundError:
        pytest.skip("the package gensim (extra `dev`) carries the dump sample and is not installed")
    sources = [WikipediaSource(path=folder / name, workers=1) for name in SAMPLES]
    documents = [document for source in sources for document in source.documents(folder)]
    assert len(documents) == 111
    return documents


LEFTOVERS = [
    r"\{\{", r"\}\}", r"\[\[", r"\]\]", r"\{\|", r"\|\}", r"\|-", r"<ref", r"</?[a-z]+[ />]", r"thumb\|", r"\|thumb",
    r"\bpx\b", r"Category:", r"File:", r"Image:", r"__[A-Z]+__", r"''", r"^[*#:;|!]", r"&[a-z]+;", r"==",
    r"colspan|rowspan|style=", r"\( *\)", r"https?://", r"\{\{\{", "[\ue000-\ue0ff]", r"<!--|-->", "\u00a0",
]  # fmt: skip


@pytest.mark.parametrize("pattern", LEFTOVERS)
def test_no_markup_is_left_in_the_real_pages(pages: list[Document], pattern: str) -> None:
    found = [
        (page.title, page.text[max(0, match.start() - 40) : match.end() + 40])
        for page in pages
        for match in re.finditer(pattern, page.text, re.MULTILINE)
    ]
    assert found == []


def test_the_only_bars_left_are_bars_that_the_page_shows(pages: list[Document]) -> None:
    """ASCII writes about the character; Afghanistan has a stray one in its source."""
    bars = [page.title for page in pages for _ in re.finditer(r"\|", page.text)]
    assert bars == ["ASCII", "ASCII", "Afghanistan"]


def test_the_prose_of_real_pages_is_kept(pages: list[Document]) -> None:
    text = {page.title: page.text for page in pages}
    assert sum(len(page.text) for page in pages) == pytest.approx(2_936_000, rel=0.02)
    assert text["Anarchism"].startswith(
        "Anarchism is a political philosophy that advocates self-governed societies based on voluntary institutions."
    )
    assert "\n\nEtymology and terminology\n\n" in text["Anarchism"]
    assert not re.search(r"^(References|External links|See also|Further reading)$", text["Anarchism"], re.MULTILINE)
    assert "Rand moved to the United States in 1926." in text["Ayn Rand"]
    assert "15,000 miles from Earth" in text["Apollo 8"]
