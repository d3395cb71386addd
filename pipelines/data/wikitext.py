"""Turn the wikitext of an encyclopedia's article into its prose.

>>> strip_wikitext("'''Apollo''' is the [[Greek god|god]]{{fn|1}} of music and of poetry.")
'Apollo is the god of music and of poetry.'
"""

import re
from collections.abc import Callable, Iterator

from mwparserfromhell import nodes, parse
from mwparserfromhell.nodes import Node, Tag, Template
from mwparserfromhell.wikicode import Wikicode

MIN_PARAGRAPH_CHARS = 40

_LIST_LINE = re.compile(r"^[*#:;].*$", re.MULTILINE)


def strip_wikitext(wikitext: str) -> str:
    """Return the prose paragraphs of an article, separated by empty lines."""
    # The parser would pair quotes across references, so they stay text until `_tidy`.
    code = parse(_LIST_LINE.sub(r"\g<0>\n", wikitext), skip_style_tags=True)
    rendered = "".join(_render_node(node) for node in _body(code))
    paragraphs = (_tidy(block) for block in re.split(r"\n\s*\n", rendered))
    return "\n\n".join(paragraph for paragraph in paragraphs if _is_prose(paragraph))


_BACK_MATTER = re.compile(
    r"(?:(?:selected|general|explanatory|primary|secondary|cited) )?"
    r"(?:references|notes|footnotes|citations|sources|bibliography|see also|external links|works|"
    r"further reading|reference literature|works cited|publications|filmography|discography)"
    r"(?: (?:and|or|&) .*)?",
    re.IGNORECASE,
)


def _body(code: Wikicode) -> Iterator[Node]:
    dropped_level = 0
    for node in code.nodes:
        if isinstance(node, nodes.Heading) and (not dropped_level or node.level <= dropped_level):
            is_back_matter = _BACK_MATTER.fullmatch(_render(node.title).strip())
            dropped_level = node.level if is_back_matter else 0
        if not dropped_level:
            yield node


def _render(code: Wikicode | None) -> str:
    return "".join(_render_node(node) for node in code.nodes) if code is not None else ""


# Files, categories and the same article in other languages are shown elsewhere on the page.
_UNSHOWN_LINK = re.compile(r"\s*(?:(?i:file|image|media|category)|[a-z]{2,3}(?:-[a-z]+)*):")


def _render_node(node: Node) -> str:
    match node:
        case nodes.Text():
            return node.value
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Wikilink() if not _UNSHOWN_LINK.match(str(node.title)):
            return _render(node.title).lstrip(":") if node.text is None else _render(node.text)
        case nodes.ExternalLink():
            return _render(node.title)
        case Tag():
            return _render_tag(node)
        case Template():
            return _render_template(node)
        case nodes.Heading():
            return "\n\n"
        case _:
            return ""


# Stands for content that cannot be written as text; its sentence is dropped.
_HOLE = "\ufffc"


def _render_tag(tag: Tag) -> str:
    contents = _render(tag.contents)
    match str(tag.tag).strip().lower():
        case "ref" | "references" | "table" | "gallery" | "timeline" | "imagemap":
            return ""
        case "source" | "syntaxhighlight" | "score" | "hiero" | "pre":
            return ""
        case "math" | "chem":
            return _HOLE
        case "br" | "hr":
            return " "
        case "li" | "dd" | "dt" | "blockquote" | "div" | "p" | "poem" | "center":
            return f"\n\n{contents}\n"
        case "sup" if re.match(r"[-\u2212]?\d", contents):
            return f"^{contents}"
        case _:
            return contents


def _render_template(template: Template) -> str:
    name = _render(template.name).strip().lower()
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    if name.startswith("formatnum:"):
        return name.partition(":")[2].strip()
    render = _argument(0) if name.startswith("lang-") else _TEMPLATES.get(name)
    if render is None:
        return ""
    arguments = [p.value for p in template.params if str(p.name).strip().isdigit()]
    return render([_render(argument).strip() for argument in arguments])


def _argument(index: int, before: str = "", after: str = "") -> Callable[[list[str]], str]:
    return lambda arguments: before + "".join(arguments[index:][:1]) + after


_UNITS = {"c": "\u00b0C", "f": "\u00b0F", "sqmi": "sq mi", "sqft": "sq ft", "acre": "acres"}
_RANGES = {"-": "\u2013", "to": " to ", "and": " and ", "by": " by ", "x": " x "}


def _measure(arguments: list[str]) -> str:
    """Return the quantity that `{{convert}}` is given, without the one it computes."""
    match arguments:
        case [low, range_word, high, unit, *_] if range_word in _RANGES:
            return f"{low}{_RANGES[range_word]}{high} {_UNITS.get(unit.lower(), unit)}"
        case [number, unit, *_]:
            return f"{number} {_UNITS.get(unit.lower(), unit)}"
        case _:
            return _HOLE


# Templates that carry words of a sentence; any other is a note, a box or a table, and is dropped.
_SYMBOLS = {
    **dict.fromkeys(["mdash", "mdashb", "em dash"], "\u2014"),
    **dict.fromkeys(["snd", "snds", "spaced ndash", "ndash"], " \u2013 "),
    **dict.fromkeys(["nbsp", "spaces", "space"], " "),
    **{"'s": "\u2019s", "'": "\u2019", "' \"": '\u2019"', '-"': '"', "=": "=", "!": "|"},
    **dict.fromkeys(["age", "bibleref", "chart", "coord", "currentyear", "e", "eqm"], _HOLE),
    **dict.fromkeys(["format price", "frac", "hms", "inflation", "music", "nuclide2"], _HOLE),
    **dict.fromkeys(["pop density", "sfrac", "uss"], _HOLE),
}
_TEMPLATES: dict[str, Callable[[list[str]], str]] = {
    **dict.fromkeys(["angbr", "flag", "ipa", "linktext", "nihongo", "nobr"], _argument(0)),
    **dict.fromkeys(["nowrap", "railgauge", "resize", "sc", "small"], _argument(0)),
    **dict.fromkeys(["smaller", "sub", "sup", "val", "vanchor", "vr"], _argument(0)),
    **dict.fromkeys(["lang", "rtl-lang", "script"], _argument(1)),
    **dict.fromkeys(["bquote", "quotation", "quote"], _argument(0, "\n\n", "\n\n")),
    **dict.fromkeys(["convert", "cvt"], _measure),
    "as of": _argument(0, "as of "),
    "chem": "".join,
    "circa": _argument(0, "c. "),
    "transl": _argument(-1),
}

_TABLE_LINE = re.compile(r"^\s*(?:[|!]|\{\|).*$", re.MULTILINE)
_REPAIRS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"(?<!')''([^'\n]+)'''s\b", r"\1's"),  # italics, then a possessive
        (r"''+", ""),  # bold and italics
        (r"[\u200b-\u200f\u202a-\u202e\u2060\ufeff]", ""),  # invisible
        (r"\s+", " "),
        (r"\(\s*(?:[,;:]\s*)+", "("),  # what a pronunciation leaves
        (r"(?:\s*[,;:])*\s*\)", ")"),
        (r"\s*\(\)|\s*\[\]", ""),
        (r"([,;])(?:\s*[,;])+", r"\1"),
        (r"\.(?:\s*\.){2,}", "..."),
        (r"(?<!\.)\.\.(?!\.)", "."),
        (r"\s+([,;)\]](?:\s|$)|[.:!?](?:\s|$))", r"\1"),
        (r"([(\[])\s+", r"\1"),
        (r"(^|[\s(])\^(?=\w)", r"\1"),  # raised before its word
        (r"(^|[.!?] )as of\b", r"\1As of"),
    ]
]
_SENTENCE_START = r"\s+(?=[\"'(\[\u201c]?[A-Z])"
_SENTENCE_GAP = re.compile(
    rf"(?<=[^A-Z][.!?]){_SENTENCE_START}|(?<=[.!?][\"')\]\u201d]){_SENTENCE_START}"
)
_ENDED = re.compile(r".*[.!?\u2026][\"')\]\u201d\u2019]*")


def _tidy(block: str) -> str:
    """Return the whole sentences of a block on one line."""
    text = _TABLE_LINE.sub("", block)
    for pattern, replacement in _REPAIRS:
        text = pattern.sub(replacement, text)
    sentences = [part for part in _SENTENCE_GAP.split(text.strip()) if _HOLE not in part]
    if sentences and not _ENDED.fullmatch(sentences[-1]):
        sentences.pop()
    return " ".join(sentences)


_NO_PROSE = re.compile(
    r"[a-z]|(?i:main article|further information|for other uses|see):? |.*\bISBN[\s\d]"
)


def _is_prose(paragraph: str) -> bool:
    return len(paragraph) >= MIN_PARAGRAPH_CHARS and not _NO_PROSE.match(paragraph)
