"""Which numbers of a document are facts, written down beside the document and not inside it.

    README.md                      Four outputs fill 47% of their static batch.
    tools/quoted/README.tsv        Four outputs fill <tab> 47% <tab> s0.static.utilisation <tab>

Each row says which words come right before a number, the number, its fact and the factor between the two. Rows are in
the order of the text, and white space may change, so a paragraph can be wrapped anew or moved. `read_document` puts
both together again: the text with a marker `<!-- fact: name -->` behind each number, which is what the checks read,
and how an author writes a new quote. `write_document` takes them apart.
"""
from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

MARKER = re.compile(r"<!--\s*fact:\s*(?P<name>[^\s>]+)\s*(?P<factor>[*/]\s*[^\s>]+?)?\s*-->")
_NUMBER = re.compile(r"(?:(?<!\w)[-+−])?\d[\d,]*(?:\.\d+)?\s?%?[*_`]*$")
_WORD = re.compile(r"\w+[*_`]*$")
FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})[^\n]*\n.*?(?:^[ ]{0,3}\1[`~]*[ ]*$|\Z)", re.MULTILINE | re.DOTALL)
INLINE_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_COLUMNS = ("after the words", "number", "fact", "factor")
_REACHES = (14, 28, 56, 112, 224, 448, 896, 1792)       # characters of context that are tried


@dataclass(frozen=True)
class Quote:
    """One row: behind `words` and `number` belongs the marker of `fact`, times or divided by `factor` ("/1e9")."""

    words: str
    number: str
    fact: str
    factor: str = ""

    @property
    def marker(self) -> str:
        return f"<!-- fact: {self.fact}{f' {self.factor}' if self.factor else ''} -->"


def map_file(document: Path) -> Path:
    """Where the quotes of a document stand: in the `tools/quoted/` beside it, or `quoted/` where there are no tools."""
    tools = document.parent / "tools"
    return (tools if tools.is_dir() else document.parent) / "quoted" / f"{document.name.removesuffix('.md')}.tsv"


def read_document(document: Path) -> str:
    """The text with a marker behind every quoted number. A quote whose place is gone is left out: see `lost_quotes`."""
    text, _ = _weave(document.read_text(encoding="utf-8"), read_quotes(map_file(document)))
    return text


def lost_quotes(document: Path) -> list[Quote]:
    """Quotes of the map that are no longer in the text: the words or the number were changed by hand."""
    return _weave(document.read_text(encoding="utf-8"), read_quotes(map_file(document)))[1]


def write_document(document: Path, woven: str, split: bool | None = None) -> None:
    """Write a text with markers. `split`: its markers go to the map (None: if there is one already)."""
    file = map_file(document)
    if split is None:
        split = file.is_file()
    text, quotes = split_text(woven) if split else (woven, [])
    if document.read_text(encoding="utf-8") != text:
        document.write_text(text, encoding="utf-8")
    if quotes:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(format_quotes(quotes), encoding="utf-8")
    elif split:
        file.unlink(missing_ok=True)


def split_text(woven: str) -> tuple[str, list[Quote]]:
    """A text with markers -> the text without them, and its quotes. Markers inside of code stay: they are examples."""
    plain, places, at = "", [], 0
    for match in MARKER.finditer(mask_code(woven)):
        plain += woven[at:match.start()]
        places.append((len(plain), match["name"], re.sub(r"\s", "", match["factor"] or "")))
        at = match.end()
    plain += woven[at:]
    masked, quotes, cursor = mask_code(plain), [], 0
    for place, name, factor in places:
        words, number = _context(masked, place, cursor)
        quotes.append(Quote(words, number, name, factor))
        cursor = place
    return plain, quotes


def read_quotes(file: Path) -> list[Quote]:
    """The rows of a map; none where there is no such file."""
    if not file.is_file():
        return []
    rows = csv.reader(io.StringIO(file.read_text(encoding="utf-8")), delimiter="\t")
    return [Quote(*row) for row in list(rows)[1:]]


def format_quotes(quotes: Iterable[Quote]) -> str:
    """The text of a map."""
    out = io.StringIO()
    writer = csv.writer(out, delimiter="\t", lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows((q.words, q.number, q.fact, q.factor) for q in quotes)
    return out.getvalue()


def without_markers(text: str) -> str:
    """A text as a reader sees it."""
    return MARKER.sub("", text)


def mask_code(text: str) -> str:
    """The text with fenced blocks, and inline code that holds a comment, blanked out; every offset stays."""
    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    def blank_comment(match: re.Match[str]) -> str:
        return blank(match) if "<!--" in match[2] else match[0]

    return INLINE_CODE.sub(blank_comment, FENCE.sub(blank, text))


def _weave(text: str, quotes: list[Quote]) -> tuple[str, list[Quote]]:
    """The markers of `quotes` put into `text`, and the quotes that have no place in it."""
    masked, places, lost, cursor = mask_code(text), [], [], 0
    for quote in quotes:
        pattern = _pattern(quote.words, quote.number)
        match = pattern.search(masked, cursor)
        if match is None:                           # moved to an earlier place: it has to be the only one
            found = list(pattern.finditer(masked))
            match = found[0] if len(found) == 1 else None
        else:
            cursor = match.end()
        if match is None:
            lost.append(quote)
        else:
            places.append((match.end(), quote.marker))
    for place, marker in sorted(places, reverse=True, key=lambda p: p[0]):
        text = text[:place] + marker + text[place:]
    return text, lost


def _context(masked: str, place: int, cursor: int) -> tuple[str, str]:
    """The fewest words before the number that end at `place` whose first match after `cursor` is there."""
    line = max(cursor, masked.rfind("\n", 0, place))
    shown = _NUMBER.search(masked, line, place) or _WORD.search(masked, line, place)
    start = shown.start() if shown else place
    number = masked[start:place]
    paragraph = max(cursor, masked.rfind("\n\n", 0, start))
    for limit, reach in [(paragraph, reach) for reach in _REACHES] + [(cursor, reach) for reach in _REACHES]:
        begin = max(limit, start - reach)
        while begin > cursor and _inside_word(masked, begin):
            begin -= 1
        while begin < start and _inside_word(masked, begin):
            begin += 1
        words = re.sub(r"\s+", " ", masked[begin:start]).strip()
        match = _pattern(words, number).search(masked, cursor)
        if match is not None and match.end() == place:
            return words, number
    raise AssertionError(f"no words tell the number {number!r} from others")


def _inside_word(text: str, place: int) -> bool:
    """A text without spaces, as Chinese is, may be cut anywhere."""
    return place > 0 and bool(re.match(r"[A-Za-z0-9_]{2}", text[place - 1:place + 1]))


@lru_cache(maxsize=8192)
def _pattern(words: str, number: str) -> re.Pattern[str]:
    before = r"\s+".join(re.escape(word) for word in words.split())
    edge = r"(?<![A-Za-z0-9_])" if re.match(r"[A-Za-z0-9_]", words or number) else ""
    return re.compile(edge + before + (r"\s*" if words else "") + re.escape(number) + r"(?!\d|[.,]\d)")
