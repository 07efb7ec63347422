"""Tidy documents: answers are folded away, and numbers are marked beside the text.

In an interview document each entry shows its question only. One fold holds the answer to speak, so that a reader can
try first; another all the rest:

    ### m0-q01 · Mid · How large is the KV cache of one token?
    <details> <summary>Answer in 30 seconds</summary>                       **30 seconds** ...            </details>
    <details> <summary>Deep answer, follow-ups, must-have points</summary>  **Deep answer** ... and so on </details>
"""
from __future__ import annotations

import re
from pathlib import Path

from .checks import find_markers
from .interview import ENTRY, FOLD, HEADING, LABELS, language
from .quotes import map_file, mask_code, read_document, write_document

SUMMARIES = {"en": ("Answer in 30 seconds", "Deep answer, follow-ups, wrong answers, code, numbers, must-have points"),
             "zh-CN": ("30 秒版答案", "深入回答、追问、常见误区、代码、数据、得分点")}


def tidy(path: Path) -> bool:
    """Tidy a document; return whether anything changed. Quotes that have lost their place leave the map."""
    before = path.read_text(encoding="utf-8"), _map_text(path)
    text = read_document(path)
    if is_interview(path):
        text = fold_answers(text, language(path))
    write_document(path, text, split=True)
    return before != (path.read_text(encoding="utf-8"), _map_text(path))


def untidy(path: Path) -> list[str]:
    """What `tidy` would change."""
    text = path.read_text(encoding="utf-8")
    problems = [f"{path.name}:{m.line}: the marker of {m.name} stands in the text" for m in find_markers(text)]
    if is_interview(path) and fold_answers(text, language(path)) != text:
        problems.append(f"{path.name}: answers that are not folded away")
    command = f"python -m m0_basics.tools.documents tidy {path.parent.name}/{path.name}"
    return [f"{problem}; mend it with: {command}" for problem in problems]


def is_interview(path: Path) -> bool:
    """A document with entries, or one that should have some."""
    headings = HEADING.finditer(mask_code(path.read_text(encoding="utf-8")))
    return path.name.startswith("INTERVIEW") or any(ENTRY.fullmatch(h[0].strip()) for h in headings)


def fold_answers(text: str, lang: str) -> str:
    """The text of an interview document with every entry's answers folded, whatever was folded before."""
    masked = mask_code(text)
    headings = list(HEADING.finditer(masked))
    stops = [*(h.start() for h in headings[1:]), len(text)]
    for heading, stop in reversed(list(zip(headings, stops, strict=True))):
        if ENTRY.fullmatch(heading[0].strip()):
            text = text[:heading.end()] + _fold(text[heading.end():stop], lang) + text[stop:]
    return text


def _fold(body: str, lang: str) -> str:
    """The body of one entry. One without both labels is left alone: the check of the form names it."""
    masked = mask_code(body)
    for fold in reversed(list(FOLD.finditer(masked))):
        body = body[:fold.start()] + body[fold.end():]
    short, deep = (re.search(rf"^\*\*{re.escape(label)}\*\*", mask_code(body), re.MULTILINE)
                   for label in LABELS[lang][:2])
    if short is None or deep is None or deep.start() < short.start():
        return body
    parts = body[:short.start()], body[short.start():deep.start()], body[deep.start():]
    intro, *answers = (re.sub(r"\n{3,}", "\n\n", part).strip() for part in parts)
    folds = [f"<details>\n<summary>{summary}</summary>\n\n{answer}\n\n</details>"
             for summary, answer in zip(SUMMARIES[lang], answers, strict=True)]
    return "\n\n" + "\n\n".join([intro, *folds] if intro else folds) + "\n\n"


def _map_text(path: Path) -> str:
    file = map_file(path)
    return file.read_text(encoding="utf-8") if file.is_file() else ""



