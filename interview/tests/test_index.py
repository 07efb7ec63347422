"""The made parts of the pages, and the homes of the source questions."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from interview.index import PARTS, check_sources, load_sources, outdated, page
from interview.library import FOLDER, LANGUAGES, load_questions
from m0_basics.config import ConfigError
from m0_basics.tools.testing.documents import anchor

IDS = [q.id for q in load_questions()]


def test_every_source_question_has_exactly_one_home() -> None:
    sources = load_sources()
    assert len(sources) == 153
    assert sum(1 for name in sources if re.search(r"\.(f\d|deep)$|^S4-f", name)) == 58        # follow-ups
    assert {name[:2] for name in sources} == {"S0", "S1", "S2", "S3", "S4"}
    assert check_sources(sources, IDS) == []


def test_no_source_is_listed_twice() -> None:
    """JSON keeps the last of two equal names, silently."""
    pairs: list[tuple[str, object]] = []
    json.loads((FOLDER / "sources.json").read_text(encoding="utf-8"), object_pairs_hook=pairs.extend)   # type: ignore[arg-type]
    names = [name for name, _ in pairs if re.fullmatch(r"S\d-.+", name)]
    assert len(names) == len(set(names)) == 153


@pytest.mark.parametrize(("change", "complaint"), [
    ({"home": "m3-q99"}, "S0-Q1 has its home in m3-q99, which is no entry"),
    ({"home": ["m2-q01", "m2-q02"]}, "S0-Q1 has the home ['m2-q01', 'm2-q02']; allowed: one id of an entry"),
    ({"home": None}, "S0-Q1 has the home None"),
    ({"also": ["x-q01"]}, "S0-Q1 also names x-q01, which is no entry"),
    ({"zh-CN": ""}, "S0-Q1 has no title in zh-CN"),
])
def test_planted_errors_of_sources(change: dict[str, object], complaint: str) -> None:
    source = {"en": "What?", "zh-CN": "什么？", "home": "m2-q01"} | change
    problems = check_sources({"S0-Q1": source}, ["m2-q01", "m7-q01"])         # type: ignore[dict-item]
    assert len(problems) == 1 and complaint in problems[0]


def test_a_home_in_m7_may_be_missing_only_while_m7_has_no_page() -> None:
    source = {"S4-Q10": {"en": "a", "zh-CN": "b", "home": "m7-q99"}}
    assert check_sources(source, ["m6-q01"]) == []
    assert check_sources(source, ["m6-q01", "m7-q01"]) == ["S4-Q10 has its home in m7-q99, which is no entry"]


def test_pages_are_up_to_date() -> None:
    assert outdated() == [], "bring them up to date with: python -m interview index --write"


def test_what_is_out_of_date_is_found_and_mended(tmp_path: Path) -> None:
    for name in PARTS:
        for language in LANGUAGES:
            shutil.copy(page(name, language), tmp_path)
    readme = tmp_path / "README.md"
    good = readme.read_text(encoding="utf-8")
    head, made = good.split("<!-- index -->")
    readme.write_text(f"{head}<!-- index -->{made.replace('[m3-q01]', '[m3-q00]')}", encoding="utf-8")
    assert outdated(folder=tmp_path) == ["README.md"]
    assert outdated(write=True, folder=tmp_path) == ["README.md"]
    assert readme.read_text(encoding="utf-8") == good
    readme.write_text(good.replace("<!-- index -->", ""), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"README.md needs one line <!-- index -->"):
        outdated(folder=tmp_path)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_index_leads_to_every_question(language: str) -> None:
    """Twice: by milestone and level, and by topic; each link's anchor is that of a heading in its file."""
    text = page("README", language).read_text(encoding="utf-8")
    made = text[text.index("<!-- index -->"):text.index("<!-- /index -->")]
    links = re.findall(r"\[([a-z]\d?-q\d\d)\]\(([^)#]+)#([^)]+)\)", made)
    assert sorted(i for i, _, _ in links) == sorted(IDS * 2)
    headings: dict[str, set[str]] = {}
    for _, file, target in links:
        if file not in headings:
            lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
            headings[file] = {anchor(line.lstrip("# ")) for line in lines if line.startswith("### ")}
        assert target in headings[file]
