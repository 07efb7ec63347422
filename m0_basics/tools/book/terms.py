"""The glossary: its terms, and links to them where a page uses one for the first time.

    ### TTFT                                        the term, as documents write it
    Time to first token: how long ...               its meaning, the first sentence of which is shown on hovering
"""
from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from ..testing.documents import anchor

_ENTRY = re.compile(r"^### (?P<term>.+?)[ ]*\n+(?P<meaning>.+?)(?=\n#|\Z)", re.MULTILINE | re.DOTALL)
# What is no prose: tags, and all inside of code, links, headings, summaries and what a notebook drew.
_NO_PROSE = re.compile(r"<(pre|code|a|h1|h2|h3|h4|script|style|summary|figure)\b.*?</\1>|<[^>]+>", re.DOTALL)
# An abbreviation, in prose: capitals, perhaps with digits, of two letters or more, also with a plural s.
ABBREVIATION = re.compile(r"(?<![\w./_-])(?:[A-Z]{2,}[A-Z0-9]*|[A-Z]+\d+[A-Z]*)s?(?![\w_]|\.\w)")


@dataclass(frozen=True)
class Term:
    """One entry of the glossary."""

    name: str
    meaning: str

    @property
    def spellings(self) -> list[str]:
        """The term as prose may write it: each of "A, B"; a plain word also in small letters."""
        names = self.name.split(", ")
        return names + [n[0].lower() + n[1:] for n in names if n[1:2].islower() and n[0].isupper()]

    @property
    def anchor(self) -> str:
        return anchor(self.name)

    @property
    def brief(self) -> str:
        """The first sentence, without markup."""
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", lambda m: m[1] or "", self.meaning)
        return re.split(r"(?<=[.。])\s|(?<=。)", " ".join(plain.split()))[0]


def read_terms(file: Path) -> list[Term]:
    """The entries of a glossary."""
    return [Term(m["term"].strip(), m["meaning"].strip()) for m in _ENTRY.finditer(file.read_text(encoding="utf-8"))]


def link_terms(page: str, terms: list[Term], address: str) -> str:
    """HTML of a page with a link to the glossary, which is at `address`, where each term comes first in its prose."""
    left = {name: term for term in terms for name in term.spellings}
    if not left:
        return page
    names = sorted(map(re.escape, left), key=len, reverse=True)
    pattern = re.compile(rf"(?<![\w/_-])(?:{'|'.join(names)})(?=s?(?![\w_/-]))")

    def link(match: re.Match[str]) -> str:
        term = left.get(match[0])
        if term is None:
            return match[0]
        for name in term.spellings:
            del left[name]
        return (f'<a class="term" href="{address}#{term.anchor}" title="{html.escape(term.brief, quote=True)}">'
                f"{match[0]}</a>")

    parts, at = [], 0
    for match in _NO_PROSE.finditer(page):
        parts += [pattern.sub(link, page[at:match.start()]), match[0]]
        at = match.end()
    return "".join([*parts, pattern.sub(link, page[at:])])
