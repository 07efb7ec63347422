"""The index: README's lists by topic, level and milestone, and the table of source questions, made from the entries.

    python -m interview index            says what is out of date
    python -m interview index --write    brings it up to date

What is made stands between `<!-- index -->` and `<!-- /index -->`; what stands around it is written by hand.
`sources.json` gives every question of the five source collections its one home.
"""
from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from m0_basics.config import ConfigError
from m0_basics.tools.documents.factbook import read_json_file
from m0_basics.tools.documents.interview import LEVELS
from m0_basics.tools.testing.documents import anchor

from .library import FOLDER, LANGUAGES, Question, Topics, load_questions

BEGIN, END = "<!-- index -->", "<!-- /index -->"
_PART = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)
_TEXT = {
    "en": {"level": "Level", "id": "Id", "question": "Question", "topic": "Topic", "milestone": "Milestone",
           "all": "all", "by_topic": "By topic", "by_level": "By level and milestone", "source": "Source",
           "home": "Answered in", "also": "See also", "count": "{0} questions, {1} of them answered here.",
           "pending": "in preparation"},
    "zh-CN": {"level": "级别", "id": "编号", "question": "问题", "topic": "主题", "milestone": "Milestone",
              "all": "合计", "by_topic": "按主题", "by_level": "按级别和 milestone", "source": "来源",
              "home": "答案在", "also": "另见", "count": "{0} 个问题，其中 {1} 个已有答案。", "pending": "在写"},
}


def page(name: str, language: str, folder: Path = FOLDER) -> Path:
    """A page of this folder in a language."""
    return folder / (f"{name}.md" if language == "en" else f"{name}.{language}.md")


def link(question: Question, folder: Path = FOLDER) -> str:
    """A Markdown link from this folder to an entry."""
    heading = f"{question.id} · {question.level} · {question.entry.question}"
    path = Path(os.path.relpath(question.document, folder)).as_posix()
    return f"[{question.id}]({path}#{anchor(heading)})"


def index_text(language: str) -> str:
    """The lists of README: by level and milestone, then by topic."""
    text, questions, topics = _TEXT[language], load_questions(language), Topics.load()
    milestones = list(dict.fromkeys(q.milestone for q in questions))
    lines = [f"### {text['by_level']}", "", f"| {text['milestone']} | {' | '.join(LEVELS)} | {text['all']} |",
             "|---|" + "---|" * len(LEVELS) + "--:|"]
    for milestone in milestones:
        own = [q for q in questions if q.milestone == milestone]
        cells = [" ".join(link(q) for q in own if q.level == level) or "-" for level in LEVELS]
        lines.append(f"| {milestone} | {' | '.join(cells)} | {len(own)} |")
    counts = [sum(q.level == level for q in questions) for level in LEVELS]
    lines += [f"| {text['all']} | {' | '.join(map(str, counts))} | {len(questions)} |", "", f"### {text['by_topic']}"]
    for name, names in topics.names.items():
        own = [q for q in questions if q.topic == name]
        if own:
            lines += ["", f"#### {names[language]}", "", f"`--topic {name}`", "",
                      f"| {text['level']} | {text['id']} | {text['question']} |", "|---|---|---|"]
            ordered = sorted(own, key=lambda q: LEVELS.index(q.level))
            lines += [f"| {q.level} | {link(q)} | {_cell(q.entry.question)} |" for q in ordered]
    return "\n".join(lines)


def sources_text(language: str) -> str:
    """The table of source questions with their homes."""
    text, questions = _TEXT[language], {q.id: q for q in load_questions(language)}
    sources = load_sources()
    lines = [f"| {text['source']} | {text['question']} | {text['home']} | {text['also']} |", "|---|---|---|---|"]
    for name, source in sources.items():
        home = link(questions[source["home"]]) if source["home"] in questions else text["pending"]
        also = ", ".join(link(questions[i]) for i in source.get("also", ()) if i in questions)
        lines.append(f"| {name} | {_cell(source[language])} | {home} | {also} |")
    answered = sum(source["home"] in questions for source in sources.values())
    return "\n".join([text["count"].format(len(sources), answered), "", *lines])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


PARTS: Mapping[str, Callable[[str], str]] = {"README": index_text, "sources": sources_text}


def outdated(write: bool = False, folder: Path = FOLDER) -> list[str]:
    """Pages whose made part is not what it should be now; `write` mends them."""
    found = []
    for name, make in PARTS.items():
        for language in LANGUAGES:
            file = page(name, language, folder)
            text = file.read_text(encoding="utf-8")
            if len(_PART.findall(text)) != 1:
                raise ConfigError(f"{file.name} needs one line {BEGIN} and one line {END} for what is made")
            made = f"{BEGIN}\n\n{make(language)}\n\n{END}"
            new = _PART.sub(lambda _, made=made: made, text)        # type: ignore[misc]
            if new != text:
                found.append(file.name)
                if write:
                    file.write_text(new, encoding="utf-8")
    return found


def load_sources() -> dict[str, dict[str, str]]:
    """Source question -> its titles ("en", "zh-CN"), its `home`, and perhaps `also`."""
    sources: dict[str, dict[str, str]] = read_json_file(FOLDER / "sources.json")
    return sources


def check_sources(sources: Mapping[str, Mapping[str, str]], ids: Sequence[str]) -> list[str]:
    """Source questions without exactly one home that exists. A home in m7 may be missing while m7 has no page."""
    known, has_m7 = set(ids), any(i.startswith("m7-") for i in ids)
    problems = []
    for name, source in sources.items():
        home = source.get("home")
        if not isinstance(home, str):
            problems.append(f"{name} has the home {home!r}; allowed: one id of an entry")
        elif home not in known and not (home.startswith("m7-") and not has_m7):
            problems.append(f"{name} has its home in {home}, which is no entry")
        problems += [f"{name} also names {i}, which is no entry" for i in source.get("also", ())
                     if i not in known and not (i.startswith("m7-") and not has_m7)]
        problems += [f"{name} has no title in {language}" for language in LANGUAGES if not source.get(language)]
    return problems
