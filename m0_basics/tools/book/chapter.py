"""What stands around a milestone's page in the book: what it takes, what one can do afterwards, what to take away.

    mN/tools/chapter.toml       [en] and [zh-CN], each: prerequisites, able = [...], takeaways = [three]

How long it takes is counted, not guessed: words of the page and of its notebook, and the exercises.
"""
from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from m0_basics.config import ConfigError

LANGUAGES = ("en", "zh-CN")
_WORDS_PER_MINUTE, _CHARACTERS_PER_MINUTE, _MINUTES_PER_EXERCISE = 150, 300, 20    # text that is to be understood
_LABELS = {
    "en": ("Before you begin", "It takes", "{read} minutes to read, {exercises} exercises of some {each} minutes",
           "Afterwards you can", "Three things to take away"),
    "zh-CN": ("需要先会", "需要时间", "阅读约 {read} 分钟；{exercises} 个练习，每个约 {each} 分钟", "学完之后，你能",
              "记住三件事"),
}


@dataclass(frozen=True)
class Chapter:
    """The notes of one milestone in one language."""

    prerequisites: str
    able: tuple[str, ...]
    takeaways: tuple[str, ...]


def read_chapter(folder: Path, lang: str) -> Chapter | None:
    """The notes, or None where a milestone has none. Raises ConfigError for a file that lacks something."""
    file = folder / "tools" / "chapter.toml"
    if not file.is_file():
        return None
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))[lang]
        chapter = Chapter(data["prerequisites"], tuple(data["able"]), tuple(data["takeaways"]))
    except (tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is not valid: {error}; allowed: {', '.join(LANGUAGES)}, each with prerequisites, "
                          "able and takeaways") from error
    if len(chapter.takeaways) != 3 or not chapter.able:
        raise ConfigError(f"{file}: {len(chapter.takeaways)} takeaways; allowed: three, and what one is able to do")
    return chapter


def around(text: str, chapter: Chapter, lang: str, minutes: int, exercises: int) -> str:
    """A milestone's page with its notes: below the title, and at the end."""
    before, takes, how_long, able, three = _LABELS[lang]
    how_long = how_long.format(read=minutes, exercises=exercises, each=_MINUTES_PER_EXERCISE)
    skills = "\n".join(f"- {skill}" for skill in chapter.able)
    head = (f'<div class="chapter">\n\n**{before}:** {chapter.prerequisites}\n\n**{takes}:** {how_long}\n\n'
            f"**{able}**\n\n{skills}\n\n</div>\n")
    foot = "\n".join(f"{i}. {text}" for i, text in enumerate(chapter.takeaways, 1))
    title, _, rest = text.partition("\n")
    return f'{title}\n\n{head}\n{rest.rstrip()}\n\n<div class="takeaways">\n\n**{three}**\n\n{foot}\n\n</div>\n'


def reading_minutes(*texts: str) -> int:
    """Minutes to read Markdown with understanding: words, or characters of Chinese; code counts as words too."""
    text = " ".join(texts)
    chinese = len(re.findall(r"[\u4e00-\u9fff]", text))
    words = len(re.findall(r"[A-Za-z][A-Za-z'-]*", text))
    minutes = words / _WORDS_PER_MINUTE + chinese / _CHARACTERS_PER_MINUTE
    return max(5, 5 * round(minutes / 5))
