"""The Wikipedia templates that carry words of a sentence, and what they say; every other template is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

Positional = Sequence[str]
Named = Mapping[str, str]
Renderer = Callable[[Positional, Named], str]

_UNITS = {"mi": "miles", "sqmi": "square miles", "km2": "km²", "m2": "m²", "m3": "m³", "km3": "km³", "C": "°C",
          "F": "°F",
          "lb": "pounds", "in": "inches", "acre": "acres", "mph": "mph", "cuft": "cubic feet", "sqft": "square feet",
          "ft": "feet", "yd": "yards", "oz": "ounces", "nmi": "nautical miles", "kph": "km/h", "K-change": "K",
          "C-change": "°C"}  # fmt: skip
_RANGES = {"to": " to ", "-": "–", "–": "–", "and": " and ", "by": " by ", "x": " × ", "or": " or ", "&ndash;": "–"}
_MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
           "December")  # fmt: skip


def _argument(place: int) -> Renderer:
    return lambda positional, named: positional[place] if place < len(positional) else named.get(str(place + 1), "")


def _constant(text: str) -> Renderer:
    return lambda positional, named: text


def _last(positional: Positional, named: Named) -> str:
    return positional[-1] if positional else ""


def _joined(separator: str) -> Renderer:
    return lambda positional, named: separator.join(part for part in positional if part)


def _quotation(positional: Positional, named: Named) -> str:
    return (positional[0] if positional else "") or named.get("text", "") or named.get("quote", "")


def _convert(positional: Positional, named: Named) -> str:
    # The template groups the digits of what it shows.
    parts = [f"{int(part):,}" if part.isdecimal() else part for part in positional]
    quantity = parts.pop(0) if parts else ""
    while len(parts) > 1 and parts[0] in _RANGES:
        quantity += _RANGES[parts[0]] + parts[1]
        del parts[:2]
    unit = _UNITS.get(parts[0], parts[0]) if parts else ""
    return f"{quantity} {unit}".strip()


def _as_of(positional: Positional, named: Named) -> str:
    date = list(positional[:3])
    if len(date) > 1 and date[1].isdigit() and 1 <= int(date[1]) <= 12:
        date[1] = _MONTHS[int(date[1]) - 1]
    words = named.get("alt") or f"{'since' if 'since' in named else 'as of'} {' '.join(reversed(date))}"
    return words if named.get("lc") or named.get("alt") else words[:1].upper() + words[1:]


def _fraction(positional: Positional, named: Named) -> str:
    if len(positional) == 3:
        return f"{positional[0]} {positional[1]}/{positional[2]}"
    return "/".join(positional) if len(positional) == 2 else f"1/{_last(positional, named)}"


def _value(positional: Positional, named: Named) -> str:
    exponent = f"×10^{named['e']}" if named.get("e") else ""
    error = f" ± {positional[1]}" if len(positional) > 1 and positional[1] else ""
    unit = named.get("u") or named.get("ul") or ""
    return f"{positional[0] if positional else ''}{error}{exponent} {unit}".strip()


def _ship(prefix: str) -> Renderer:
    return lambda positional, named: f"{prefix} {positional[0]}" if positional else prefix


def _ship_class(positional: Positional, named: Named) -> str:
    kind = positional[1] if len(positional) > 1 else ""
    return f"{positional[0]}-class {kind}".strip() if positional else ""


RENDERERS: dict[str, Renderer] = {
    **dict.fromkeys(
        ("nowrap", "nobr", "nobreak", "small", "smaller", "big", "larger", "abbr", "tooltip", "vanchor",
         "visible anchor",
         "linktext", "em", "strong", "strongbad", "sc", "smallcaps", "nobold", "noitalic", "script", "angbr", "math",
         "mvar", "var", "keypress", "key press", "code", "sup", "sub", "smallsup", "nihongo", "ill", "illm",
         "interlanguage link", "not a typo", "proper name", "flag", "flagcountry", "railgauge", "track gauge",
         "unicode", "polytonic", "hebrew", "he", "zh-tw", "okina", "native phrase", "nastaliq", "overline", "underline",
         "gender", "dfn", "samp", "kbd", "char", "unichar", "as written", "mono", "nowraplinks", "smalldiv", "pre2",
         "sic", "typo", "nom", "rtl-lang", "lang-sq", "ruby", "citequote", "tq", "wt", "w", "inline block"),
        _argument(0),
    ),
    **dict.fromkeys(("lang", "resize", "font color", "color", "linktext-lang", "rtl-para"), _argument(1)),
    **dict.fromkeys(("transl", "transliteration"), _last),
    **dict.fromkeys(("quote", "blockquote", "cquote", "quotation", "poemquote", "bquote", "block quote"), _quotation),
    **dict.fromkeys(("convert", "cvt"), _convert),
    **dict.fromkeys(("as of", "since"), _as_of),
    **dict.fromkeys(("frac", "fraction", "sfrac"), _fraction),
    **dict.fromkeys(("chem", "chem2", "su", "gaps"), _joined("")),
    **dict.fromkeys(("nuclide2", "simplenuclide2", "simplenuclide"), _joined("-")),
    **dict.fromkeys(("ship", "hlist-inline"), lambda positional, named: " ".join(positional[:2])),
    **dict.fromkeys(("sclass", "sclass-", "sclass2", "sclass2-"), _ship_class),
    **{name.lower(): _ship(name) for name in ("USS", "HMS", "SS", "RMS", "HMAS", "HMCS", "MV", "USCGC", "SMS", "INS")},
    "val": _value,
    **dict.fromkeys(("circa", "c.", "ca."), lambda positional, named: f"c. {' – '.join(positional)}".strip()),
    "e": lambda positional, named: f"×10^{_last(positional, named)}",
    "pow": lambda positional, named: "^".join(positional),
    "'s": _constant("'s"), "'": _constant("'"), "=": _constant("="), "pipe": _constant("|"),
    **dict.fromkeys(("ndash", "–", "nsndns", "en dash"), _constant("–")),
    **dict.fromkeys(("snd", "spnd", "spaced ndash", "spaced en dash", "dash", "snds"), _constant(" – ")),
    **dict.fromkeys(("mdash", "mdashb", "em dash", "—"), _constant("—")),
    **dict.fromkeys(("·", "dot", "•", "bullet", "middot"), _constant(" · ")),
    **dict.fromkeys(("nbsp", "spaces", "space", "thinsp", "thin space", "hsp", "sp"), _constant(" ")),
}  # fmt: skip
"""Template name, in lower case → its words, from the positional and the named arguments."""


def renderer(name: str) -> Renderer | None:
    """How to say the template called `name` in words; None where it carries none.

    `name` is as written in the page: case, underscores and white space around it don't matter. Parser functions come
    with their first argument, e.g. `formatnum:1234`.
    """
    key = " ".join(name.replace("_", " ").lower().split())
    if key.startswith("formatnum:"):
        return _constant(name.split(":", 1)[1].strip())
    if key.startswith("lang-") and len(key) < 16:
        return _argument(0)
    return RENDERERS.get(key)
