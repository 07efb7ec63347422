"""Flash cards: the same every time, an identity that text does not change, and HTML that shows what was meant."""
from __future__ import annotations

import sqlite3
import sys
import zipfile
from pathlib import Path

import pytest

from interview.anki import build_package, html, note_guid, write_package
from interview.library import Correction
from interview.tests.helpers import question
from m0_basics.config import ConfigError

NOW = 1_700_000_000.0
STABLE = {"en": "izr[r?#4<2", "zh-CN": "cCSSr)%R?:"}       # written down when the first deck was made


def rows(path: Path, query: str) -> list[tuple[object, ...]]:
    with zipfile.ZipFile(path) as package:
        database = Path(package.extract("collection.anki2", path.parent / path.stem))
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def write(path: Path, *questions: object, language: str = "en", **options: object) -> Path:
    write_package(build_package(questions, language, **options), path, NOW)     # type: ignore[arg-type]
    return path


def test_two_runs_write_the_same_cards(tmp_path: Path) -> None:
    questions = [question("m1-q01"), question("m3-q02"), question("d-q01")]
    first, second = (write(tmp_path / f"{name}.apkg", *questions) for name in ("a", "b"))
    for query in ("select id, guid, mid, tags, flds from notes", "select id, nid, did, ord from cards",
                  "select decks from col"):
        assert rows(first, query) == rows(second, query)
    assert len(rows(first, "select * from notes")) == 3


def test_an_identity_is_the_id_s_and_not_the_text_s(tmp_path: Path) -> None:
    before = write(tmp_path / "a.apkg", question("m1-q01"))
    after = write(tmp_path / "b.apkg", question("m0-q01"), question("m1-q01", short="A better answer."))
    guids = {str(guid): str(text) for guid, text in rows(after, "select guid, flds from notes")}
    [(guid,)] = rows(before, "select guid from notes")
    assert "A better answer." in guids[str(guid)]
    assert guid == note_guid("m1-q01", "en") != note_guid("m1-q01", "zh-CN")


def test_identities_never_change() -> None:
    """What learners have in their collections. If this fails, every card would come twice."""
    assert note_guid("m3-q04", "en") == STABLE["en"]
    assert note_guid("m3-q04", "zh-CN") == STABLE["zh-CN"]


def test_decks_fields_and_corrections(tmp_path: Path) -> None:
    correction = Correction("c-01", "It is *so*", "It is not.", "`python -m m0_basics facts`")
    path = write(tmp_path / "a.apkg", question("m3-q01", short="a < b, 16<!-- fact: x --> and `k_v`"),
                 corrections=[correction])
    [(decks,)] = rows(path, "select decks from col")
    assert "LLM inference lab::m3" in str(decks) and "LLM inference lab::corrections" in str(decks)
    texts = [str(text).split("\x1f") for (text,) in rows(path, "select flds from notes order by id")]
    assert texts[0][0] == "m3-q01 · Mid"
    assert texts[0][2] == "<p>a &lt; b, 16 and <code>k_v</code></p>"
    assert "<strong>5</strong> the second" in texts[0][3]
    assert texts[1][2] == "<p>It is not.</p>"


def test_tables_and_angle_brackets() -> None:
    assert "<td>1</td>" in html("| a |\n|---|\n| 1 |")
    assert html("<script>x</script>") == "<p>&lt;script&gt;x&lt;/script&gt;</p>"


def test_what_cannot_be_done_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no question is left"):
        build_package([], "en")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write(tmp_path / "file" / "a.apkg", question())
    monkeypatch.setitem(sys.modules, "genanki", None)
    with pytest.raises(ConfigError, match=r'pip install "llm-inference-lab\[anki\]"'):
        build_package([question()], "en")
