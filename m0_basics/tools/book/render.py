"""Markdown as GitHub shows it -> HTML, with the anchors that GitHub gives to headings and code in colours.

The site's own Markdown dialect would show the same files differently (lists, fences inside of lists, details), so the
documents are rendered here and handed over as HTML.
"""
from __future__ import annotations

import html
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from m0_basics.config import require

from ..testing.documents import anchor

# Tags of raw HTML whose addresses have to be followed too.
_ADDRESS = re.compile(r"""(?P<head><(?:a|img|source)\b[^>]*?\b(?:href|src)=")(?P<target>[^"]+)(?P<tail>")""")
_PICTURE = re.compile(r"""(?P<link><a\b[^>]*>\s*)?(?P<picture><img\b[^>]*?\bsrc="(?P<address>[^"]+)"[^>]*>)""")
_CELL = re.compile(r"<td(?P<style>[^>]*)>(?P<body>.*?)</td>", re.DOTALL)
_INLINE_CODE = re.compile(r"<code>.*?</code>", re.DOTALL)       # a block's has a class


@dataclass(frozen=True)
class Heading:
    """One entry of a page's table of contents."""

    level: int
    id: str
    text: str


def render(text: str, follow: Callable[[str], str]) -> tuple[str, list[Heading]]:
    """Markdown -> HTML and its headings. `follow` maps the target of a link or picture to one that the site has."""
    parser = _parser()
    tokens = parser.parse(text)
    headings = _number_headings(tokens)
    for token in tokens:
        for child in [token, *(token.children or ())]:
            for name in ("href", "src"):
                if isinstance(target := child.attrGet(name), str):
                    child.attrSet(name, follow(target))
            if child.type in ("html_block", "html_inline"):
                child.content = _ADDRESS.sub(lambda m: m["head"] + follow(m["target"]) + m["tail"], child.content)
            if child.type == "image":
                child.attrSet("loading", "lazy")
    body: str = parser.renderer.render(tokens, parser.options, {})
    wide = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    return _PICTURE.sub(_opens, _INLINE_CODE.sub(_breakable, _CELL.sub(_roomy, wide))), headings


def _roomy(cell: re.Match[str]) -> str:
    """A cell with a sentence in it gets room for some words a line: its table scrolls where that is too wide."""
    text = re.sub(r"<[^>]+>", "", cell["body"])
    if len(text.encode()) <= 40 or "class=" in cell["style"]:
        return cell[0]
    return f'<td class="prose"{cell["style"]}>{cell["body"]}</td>'


def _breakable(code: re.Match[str]) -> str:
    """Where a narrow line or cell may break a path or a name: behind its slashes, colons, dots and underscores."""
    return re.sub(r"(?<=\w)(::|/|_|\.)(?=[A-Za-z_])", r"\1<wbr>", code[0])


def _opens(match: re.Match[str]) -> str:
    """A picture opens by itself when one taps it: on a phone it is small in the page. One within a link keeps that."""
    return match[0] if match["link"] else f'<a class="picture" href="{match["address"]}">{match["picture"]}</a>'


def _number_headings(tokens: list[Any]) -> list[Heading]:
    """Give each heading its anchor: as GitHub does, -1, -2 ... for the second and third of a name."""
    seen: dict[str, int] = {}
    headings = []
    for opening, inline in pairwise(tokens):
        if opening.type != "heading_open":
            continue
        plain = "".join(child.content for child in inline.children if child.type in ("text", "code_inline"))
        name = anchor(plain)
        count = seen[name] = seen.get(name, -1) + 1
        name += f"-{count}" if count else ""
        opening.attrSet("id", name)
        headings.append(Heading(int(opening.tag[1]), name, plain))
    return headings


@lru_cache(maxsize=1)
def _parser() -> Any:
    return require("markdown_it", "the book", extra="book").MarkdownIt(
        "commonmark", {"highlight": highlight}).enable(["table", "strikethrough"])


def highlight(code: str, language: str, _attributes: str = "") -> str:
    """Code in colours; text whose language is not known stays as it is."""
    pygments = require("pygments", "the book", extra="book")
    lexers, formatters = require("pygments.lexers", "the book"), require("pygments.formatters", "the book")
    try:
        lexer = lexers.get_lexer_by_name(language or "text", stripnl=False)
    except pygments.util.ClassNotFound:
        lexer = lexers.get_lexer_by_name("text")
    inner = pygments.highlight(code, lexer, formatters.HtmlFormatter(nowrap=True))
    return f'<pre class="highlight"><code class="language-{html.escape(language or "text")}">{inner}</code></pre>'
