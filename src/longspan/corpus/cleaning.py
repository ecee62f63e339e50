"""Wikitext to prose: what a reader of the page reads as running text, and nothing else.

mwparserfromhell is the parser and the slowest part. So what will be dropped anyway and can be found safely with a
scan (comments, references, tables, templates without words, trailing sections) is cut out before it sees the page.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable
from typing import Any

from longspan.corpus.templates import renderer
from longspan.foundation.config import Config

VERSION = 1
"""Goes into fingerprints: raise it when the same wikitext gives another text."""

TRAILING_SECTIONS = (
    "references", "notes", "footnotes", "external links", "see also", "further reading", "bibliography", "sources",
    "citations", "notes and references", "references and notes", "gallery", "works cited", "cited sources",
    "references and footnotes", "footnotes and references", "sources and references", "further information",
    "further references", "general references", "cited works", "secondary sources", "primary sources", "image gallery",
    "picture gallery", "photo gallery", "external sources", "references and sources", "notes and citations", "endnotes",
    "works consulted", "literature cited", "additional reading", "external link", "related links", "links",
)  # fmt: skip


class CleaningConfig(Config):
    """What counts as running text.

    Attributes:
        drop_sections: titles (any case) of sections that go, with their sub-sections.
        lists: keep list items, one a line without their marks.
    """

    drop_sections: tuple[str, ...] = TRAILING_SECTIONS
    lists: bool = True


class Namespaces:
    """The names that mark a link as a file, a category or a link to another language's page.

    Args:
        names: local names by namespace number, from a dump's `siteinfo`; the English ones always count.
    """

    def __init__(self, names: Iterable[tuple[int, str]] = ()) -> None:
        dropped = {"file", "image", "media", "category"}
        self.dropped = frozenset(dropped | {name.lower() for key, name in names if key in (-2, 6, 14) and name})

    def hides(self, target: str) -> bool:
        """Whether a link to `target` shows nothing where it stands in the text."""
        prefix, colon, _ = target.partition(":")
        prefix = prefix.strip().replace("_", " ").lower()
        return bool(colon) and (prefix in self.dropped or bool(_LANGUAGE.fullmatch(prefix)))


# Interlanguage prefixes; interwiki prefixes of the same shape show their text, and are taken out here.
_LANGUAGE = re.compile(
    r"(?!(?:doi|hdl|rfc|pmid|isbn|mw|mos|wp|wt|arx|cve|oclc)$)[a-z]{2,3}(?:-[a-z]+)*|simple|zh-.+|be-tarask|map-bms|roa-.+"
)

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_ELEMENTS = (
    "ref|gallery|references|timeline|imagemap|score|hiero|syntaxhighlight|source|table|mapframe|maplink|graph|"
    "templatedata|templatestyles|inputbox|categorytree|noinclude|chem|ce|pre|math|section"
)
_ELEMENT = re.compile(rf"</(?P<close>{_ELEMENTS})\s*>|<(?P<open>{_ELEMENTS})\b[^<>]*?(?P<alone>/?)\s*>", re.IGNORECASE)
_NOWIKI = re.compile(r"<nowiki\s*>(.*?)</nowiki\s*>", re.IGNORECASE | re.DOTALL)
_INNERMOST = re.compile(r"\{\{([^{}]*(?:(?:\{(?!\{)|\}(?!\}))[^{}]*)*)\}\}")
_PARAMETER = re.compile(r"\{\{\{[^{}]*\}\}\}")
_TABLE_MARK = re.compile(r"^[ \t:*#;]*(?:(?P<open>\{\|)|(?P<close>\|\}(?!\})))", re.MULTILINE)
_HEADING = re.compile(r"^(={1,6})[ \t]*(.+?)[ \t]*\1[ \t]*$", re.MULTILINE)
_MAGIC_WORD = re.compile(r"__[A-Z]{3,}__")
# Private-use characters stand for the braces of templates that stay, and for literal (nowiki) brackets.
_RESERVED = re.compile("[\ue000-\ue01f]")
_LITERAL = str.maketrans({char: chr(0xE010 + place) for place, char in enumerate("[]{}<>|='*#:;_")})
_LITERAL_BACK = {value: chr(key) for key, value in _LITERAL.items()}
# Links whose target names no namespace: they only show their text, and are three quarters of what the parser would do.
_PLAIN_LINK = re.compile(r"\[\[(?:[^\[\]|{}<>:\n]+\|)?([^\[\]|{}<>:\n]+)\]\]")


def clean_wikitext(wikitext: str, config: CleaningConfig | None = None, namespaces: Namespaces | None = None) -> str:
    """Turn a page's wikitext into plain text.

    Paragraphs are separated by a blank line, headings are plain lines, list items stand one a line. Tables, references,
    templates without words, files with their captions, categories, galleries, magic words, interlanguage links and
    sections named in `config.drop_sections` are gone. An empty section loses its heading.
    """
    config = config or CleaningConfig()
    pruned = _prune(wikitext, {title.casefold() for title in config.drop_sections})
    return _tidy(_render_page(pruned, namespaces or Namespaces()), config)


def _prune(text: str, drop_sections: set[str]) -> str:
    text = _COMMENT.sub("", _RESERVED.sub("", text.replace("\r", "")))
    text = _NOWIKI.sub(lambda match: match[1].translate(_LITERAL), text)
    text = _cut_elements(text)
    text = _cut_tables(_cut_templates(_cut_tables(text)))
    text = _PLAIN_LINK.sub(r"\1", _MAGIC_WORD.sub("", _cut_sections(text, drop_sections)))
    return text.replace("\ue000", "{{").replace("\ue001", "}}")


def _cut_elements(text: str) -> str:
    """Drop elements without running text, from an opening tag to the first closing one, as MediaWiki reads them.

    A tag that is never closed, or closes nothing, goes alone.
    """
    tags = list(_ELEMENT.finditer(text))
    next_close: dict[str, re.Match[str]] = {}
    partners: list[re.Match[str] | None] = []
    for tag in reversed(tags):
        if tag["close"]:
            next_close[tag["close"].lower()] = tag
        alone = tag["close"] or tag["alone"]
        partners.append(None if alone else next_close.get(tag["open"].lower()))
    kept: list[str] = []
    end = 0
    for tag, close in zip(tags, reversed(partners), strict=True):
        if tag.start() < end:
            continue
        kept.append(text[end : tag.start()])
        end = (close or tag).end()
        if close and tag["open"].lower() == "math":
            kept.append(_formula(text[tag.end() : close.start()].strip()))
    return "".join([*kept, text[end:]])


def _formula(content: str) -> str:
    """A formula that reads as text (`x + 1`) stays; TeX goes."""
    return content.translate(_LITERAL) if len(content) <= 40 and not re.search(r"[\\{}^_&\n]", content) else ""


def _cut_templates(text: str) -> str:
    """Drop templates without words, innermost first; the others wait between private-use braces for the parser."""

    def decide(match: re.Match[str]) -> str:
        content = match[1]
        name = content.partition("|")[0]
        return f"\ue000{content}\ue001" if renderer(name) else ""

    while True:
        text, parameters = _PARAMETER.subn("", text)
        text, templates = _INNERMOST.subn(decide, text)
        if not parameters + templates:
            return text


def _cut_tables(text: str) -> str:
    """Drop tables, nested ones with their outer one; an unclosed table goes up to the next heading or the end."""
    kept: list[str] = []
    end, depth, start = 0, 0, 0
    for mark in _TABLE_MARK.finditer(text):
        if mark["open"]:
            start = mark.start() if depth == 0 else start
            depth += 1
        elif depth == 1:
            kept.append(text[end:start])
            end, depth = mark.end(), 0
        elif depth:
            depth -= 1
    if depth:
        kept.append(text[end:start])
        heading = _HEADING.search(text, start)
        end = heading.start() if heading else len(text)
    return "".join([*kept, text[end:]])


def _cut_sections(text: str, titles: set[str]) -> str:
    kept: list[str] = []
    start, dropped_level = 0, 0
    for heading in _HEADING.finditer(text):
        level = len(heading[1])
        if dropped_level and level > dropped_level:
            continue
        if not dropped_level:
            kept.append(text[start : heading.start()])
        start = heading.start()
        title = re.sub(r"[^\w\s]|<[^<>]*>", "", heading[2]).strip().casefold()
        dropped_level = level if title in titles else 0
    if not dropped_level:
        kept.append(text[start:])
    return "".join(kept)


# ---- what the parser sees ------------------------------------------------------------------------------------------

_BLOCKS = frozenset(
    {"blockquote", "poem", "div", "p", "center", "li", "ul", "ol", "dl", "dd", "dt", "br", "hr", "td", "tr"}
)
_DROPPED_TAGS = frozenset({"ref", "gallery", "references", "timeline", "math", "table", "source", "syntaxhighlight"})


def _render_page(text: str, namespaces: Namespaces) -> str:
    import mwparserfromhell

    return _render(mwparserfromhell.parse(text, skip_style_tags=True), namespaces)


def _render(code: Any, namespaces: Namespaces) -> str:
    return "".join(_NODES[type(node).__name__](node, namespaces) for node in code.nodes)


def _text(node: Any, namespaces: Namespaces) -> str:
    return str(node.value)


def _entity(node: Any, namespaces: Namespaces) -> str:
    return html.unescape(str(node)).translate(_LITERAL)


def _heading(node: Any, namespaces: Namespaces) -> str:
    mark = "=" * node.level
    return f"{mark} {' '.join(_render(node.title, namespaces).split())} {mark}"


def _wikilink(node: Any, namespaces: Namespaces) -> str:
    target = str(node.title).strip()
    if namespaces.hides(target):
        return ""
    if node.text is None:
        return _render(node.title, namespaces).removeprefix(":")
    return _render(node.text, namespaces)


def _external_link(node: Any, namespaces: Namespaces) -> str:
    if node.title is not None:
        return _render(node.title, namespaces)
    return "" if node.brackets else str(node.url)


def _tag(node: Any, namespaces: Namespaces) -> str:
    name = str(node.tag).strip().lower()
    if name in _DROPPED_TAGS:
        return ""
    if node.wiki_markup:
        # List marks stay until the lines are put together.
        return str(node.wiki_markup)
    inner = "" if node.self_closing or node.contents is None else _render(node.contents, namespaces)
    return f"\n{inner}\n" if name in _BLOCKS else inner


def _template(node: Any, namespaces: Namespaces) -> str:
    render = renderer(str(node.name))
    if render is None:
        return ""
    positional: list[str] = []
    named: dict[str, str] = {}
    for parameter in node.params:
        value = _render(parameter.value, namespaces).strip()
        name = str(parameter.name).strip()
        if parameter.showkey and not name.isdigit():
            named[name.lower()] = value
        else:
            positional.append(value)
    return render(positional, named)


def _nothing(node: Any, namespaces: Namespaces) -> str:
    return ""


_NODES: dict[str, Callable[[Any, Namespaces], str]] = {
    "Text": _text, "HTMLEntity": _entity, "Heading": _heading, "Wikilink": _wikilink, "ExternalLink": _external_link,
    "Tag": _tag, "Template": _template, "Comment": _nothing, "Argument": _nothing,
}  # fmt: skip

# ---- lines and paragraphs ------------------------------------------------------------------------------------------

_STRAY = ("{{", "}}", "[[", "]]", "{|", "|}")
_QUOTES = re.compile(r"'{2,}")
_LIST_MARK = re.compile(r"^[*#:;]+[ \t]*")
_LEFT_TAG = re.compile(r"</?[a-zA-Z][a-zA-Z0-9]*(?:\s[^<>\n]*)?/?>")
_EMPTY_BRACKETS = re.compile(r"[ \t]*(?:\([\s,;:/–-]*\)|\[[\s,;:]*\])")
_BRACKET_START = re.compile(r"([(\[])[\s,;:]+")
_BRACKET_END = re.compile(r"[\s,;:]+([)\]])")
_BEFORE_PUNCTUATION = re.compile(r"(?<=[^\s.,])[ \t]+([,.])(?=\s|$)")
_REPEATED_COMMA = re.compile(r",(?:[ \t]*,)+")
_INVISIBLE = re.compile("[\u200b\u200e\u200f\ufeff\u00ad]")


def _tidy(text: str, config: CleaningConfig) -> str:
    """Join rendered lines into paragraphs; drop what only markup had held together."""
    blocks: list[tuple[int, str]] = []  # (heading level or 0, text)
    for line in text.split("\n"):
        heading = _HEADING.fullmatch(line.strip())
        if heading:
            blocks.append((len(heading[1]), _tidy_line(heading[2])))
            continue
        stripped = line.strip()
        # What starts so is the inside of a table whose frame was a template.
        if stripped.startswith(("|", "!", "{|")):
            continue
        if not config.lists and stripped.startswith(("*", "#", ":", ";")):
            continue
        blocks.append((0, _tidy_line(_LIST_MARK.sub("", stripped))))
    return _join(blocks)


def _tidy_line(line: str) -> str:
    if "''" in line:
        line = _drop_quotes(line)
    if "<" in line:
        line = _LEFT_TAG.sub("", line)
    if any(stray in line for stray in _STRAY):
        for stray in _STRAY:
            line = line.replace(stray, "")
    if "(" in line or "[" in line:
        line = _BRACKET_END.sub(r"\1", _BRACKET_START.sub(r"\1", _EMPTY_BRACKETS.sub("", line)))
    if " ," in line or " ." in line:
        line = _BEFORE_PUNCTUATION.sub(r"\1", line)
    if ",," in line or ", ," in line:
        line = _REPEATED_COMMA.sub(",", line)
    if not line.isascii():
        line = _INVISIBLE.sub("", _RESERVED.sub(lambda match: _LITERAL_BACK.get(match[0], ""), line))
    return " ".join(line.split())


def _drop_quotes(line: str) -> str:
    """Take out the marks of bold and italics as MediaWiki reads them.

    Where neither bold nor italics balance, one run of 3 is an apostrophe and a mark of italics (`''Nautilus'''s`): the
    first one after a word of one letter (`l'''eau''`), else after a longer word, else after a space.
    """
    runs = list(_QUOTES.finditer(line))
    bold = sum(len(run[0]) != 2 for run in runs)
    italics = sum(len(run[0]) == 2 or len(run[0]) >= 5 for run in runs)
    apostrophe = None
    if bold % 2 and italics % 2:
        threes = [run for run in runs if len(run[0]) in (3, 4)]
        apostrophe = min(threes, key=lambda run: _apostrophe_rank(line, run.start()), default=None)
    kept, end = [], 0
    for run in runs:
        literal = 1 if len(run[0]) == 4 else max(len(run[0]) - 5, 0)
        kept += [line[end : run.start()], "'" * (literal + (run is apostrophe))]
        end = run.end()
    return "".join([*kept, line[end:]])


def _apostrophe_rank(line: str, place: int) -> int:
    if line[max(place - 1, 0) : place] in ("", " "):
        return 2
    return 0 if line[max(place - 2, 0) : place - 1] in ("", " ") else 1


def _join(blocks: list[tuple[int, str]]) -> str:
    """Paragraphs and headings apart by a blank line; lines of one list or poem stay together."""
    lines: list[str] = []
    pending: list[tuple[int, str]] = []  # headings that still wait for text
    blank = True
    for level, text in blocks:
        if level:
            while pending and pending[-1][0] >= level:
                pending.pop()
            if text:
                pending.append((level, text))
            blank = True
        elif not text or not any(char.isalnum() for char in text):
            blank = True
        else:
            for _, heading in pending:
                lines += ["", heading]
            if blank or pending:
                lines.append("")
            lines.append(text)
            pending, blank = [], False
    return "\n".join(lines).strip() + "\n" if lines else ""
