"""The texts: what they hold, what they must not hold, and that none repeats another."""
from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from m0_basics.config import ConfigError
from m7_gptq.tools import texts
from m7_gptq.tools.texts import clean

FOLDER = Path(texts.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.txt"))
_PASSAGE = 60                               # characters


def read(name: str) -> str:
    return (FOLDER / f"{name}.txt").read_text(encoding="utf-8")


def test_every_text_has_a_use_and_a_place_in_the_provenance() -> None:
    assert sorted([*texts.CALIBRATION, *texts.EVALUATION.values()]) == NAMES
    provenance = (FOLDER / "PROVENANCE.md").read_text(encoding="utf-8")
    assert all(f"`{name}.txt`" in provenance for name in NAMES)
    assert all(archive in provenance for archive, _ in clean.ARCHIVES.values())


def passages(text: str) -> set[str]:
    flat = " ".join(text.split())
    return {flat[i:i + _PASSAGE] for i in range(len(flat) - _PASSAGE + 1)}


def test_no_text_shares_a_passage_with_another() -> None:
    """At any offset: so nothing that a model is judged by was calibrated on."""
    known = {name: passages(read(name)) for name in NAMES}
    for a, b in combinations(NAMES, 2):
        assert not known[a] & known[b], (a, b)


def test_nothing_of_the_sites_that_spread_them_is_left() -> None:
    for name in NAMES:
        text = read(name)
        for word in ("Gutenberg", "eBook", "http", "www.", "注释", "分节阅读", "书包网", "[A", "\r", "\ufeff"):
            assert word not in text, (name, word)


def test_sizes() -> None:
    assert 270_000 < len(texts.calibration_text().encode()) < 290_000
    assert 25_000 < len(texts.evaluation_text("dev").encode()) < 35_000
    assert len(texts.evaluation_text().encode()) > 2.5 * len(texts.evaluation_text("dev").encode())
    assert "的" in texts.evaluation_text("chinese")
    with pytest.raises(ConfigError, match=r"split='train'.*dev, test, chinese"):
        texts.evaluation_text("train")


def test_cleaning_by_hand() -> None:
    raw = ("PG header\n\nCHAPTER I. Down\n\nOne broken\nline.\n\n    A verse,\n    of two lines.\n\n  *   *   *\n\n"
           "Last words.\n\n  THE END\nlicence")
    assert clean.alice(raw) == ["CHAPTER I. Down", "One broken line.", "A verse,", "of two lines.", "Last words."]
    long = "word " * 14
    raw = (f"header\nBOTCHAN (MASTER DARLING)\nCHAPTER I\n{long}\nends here.[A]\n\nAnother[1].\n"
           "--(THE END)--\n[A: typo]\nEnd of Project Gutenberg's")
    assert clean.botchan(raw) == ["CHAPTER I", f"{long}ends here.", "Another."]
    raw = ("_分节阅读_1\n\n迅：呐喊\n  自序 \n ------\n 　　我在年青⑴\n_分节阅读_2\n时候。\n 　　□ 注释\n 　　⑴一注。\n"
           "\n  故乡 \n 　　我冒了严寒。\n 　　注释：\n 　　①又一注。\n <!--\n 书包网 -->")
    assert clean.call_to_arms(raw) == ["自序", "我在年青时候。", "故乡", "我冒了严寒。"]
