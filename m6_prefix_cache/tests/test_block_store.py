"""F6.8: blocks on disk are whole or not there, and whatever is wrong with a file or a disk costs a warning."""
from __future__ import annotations

import logging
import os
import time
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6_prefix_cache.block_store import BlockStore

ROOM = 10_000
TOKENS = (1, 2, 3)


def name_of(number: int) -> bytes:
    return sha256(bytes([number])).digest()


def test_what_one_process_has_kept_another_finds(tmp_path: Path) -> None:
    first = BlockStore(tmp_path, "model", ROOM)
    assert first.put(name_of(1), TOKENS, b"abc")
    assert not first.put(name_of(1), TOKENS, b"abc"), "once"
    second = BlockStore(tmp_path, "model", ROOM)
    assert name_of(1) in second
    assert second.get(name_of(1), TOKENS, 3) == b"abc"
    assert second.get(name_of(2), TOKENS, 3) is None


def test_another_model_finds_nothing(tmp_path: Path) -> None:
    BlockStore(tmp_path, "model", ROOM).put(name_of(1), TOKENS, b"abc")
    assert BlockStore(tmp_path, "another", ROOM).get(name_of(1), TOKENS, 3) is None


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), change=st.integers(1, 255), cut=st.none() | st.integers(0, 60))
def test_a_file_that_was_changed_is_left_out(tmp_path_factory: pytest.TempPathFactory, place: int, change: int,
                                             cut: int | None) -> None:
    """Any byte of it, or its end: a warning, and the block is computed anew."""
    folder = tmp_path_factory.mktemp("store")
    store = BlockStore(folder, "model", ROOM)
    store.put(name_of(1), TOKENS, b"some keys and values")
    [path] = store.folder.iterdir()
    content = bytearray(path.read_bytes())
    if cut is None:
        content[place % len(content)] ^= change
    else:
        content = content[:cut]
    path.write_bytes(content)
    assert store.get(name_of(1), TOKENS, 20) is None
    assert not path.exists()
    assert len(store) == store.num_bytes == 0
    assert store.put(name_of(1), TOKENS, b"some keys and values"), "it may be kept again"


@pytest.mark.parametrize(("tokens", "num_bytes"), [((1, 2, 4), 3), ((1, 2), 3), (TOKENS, 4), (TOKENS, 2)])
def test_other_tokens_or_another_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture, tokens: tuple[int, ...],
                                        num_bytes: int) -> None:
    """A collision of hashes, or a file of another version."""
    store = BlockStore(tmp_path, "model", ROOM)
    store.put(name_of(1), TOKENS, b"abc")
    assert store.get(name_of(1), tokens, num_bytes) is None
    assert "is left out and removed" in caplog.text


def test_the_oldest_go_where_room_is_short(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "model", 3 * (44 + 100))
    for number in range(3):
        assert store.put(name_of(number), TOKENS, bytes(100))
    assert store.get(name_of(0), TOKENS, 100) is not None
    time.sleep(0.02)                                                    # a file system's clock may be coarse
    store.touch([name_of(0)])                                           # used: the second is the oldest now
    time.sleep(0.02)
    assert store.put(name_of(3), TOKENS, bytes(100))
    assert [name_of(n) in store for n in range(4)] == [True, False, True, True]
    assert len(list(store.folder.iterdir())) == 3
    assert not store.put(name_of(9), TOKENS, bytes(1000)), "larger than all the room"
    smaller = BlockStore(tmp_path, "model", 2 * (44 + 100))
    assert [name_of(n) in smaller for n in range(4)] == [True, False, False, True], "files remember their use"


def test_the_limit_is_that_of_the_folder(tmp_path: Path) -> None:
    """What another model has left there counts, and goes first if it is older."""
    other = BlockStore(tmp_path, "another", 3 * (44 + 100))
    for number in range(3):
        other.put(name_of(number), TOKENS, bytes(100))
    store = BlockStore(tmp_path, "model", 3 * (44 + 100))
    assert (len(store), store.num_bytes) == (0, 3 * 144)
    assert store.put(name_of(0), TOKENS, bytes(100))
    assert (len(store), store.num_bytes) == (1, 3 * 144)
    assert [(other.folder / name_of(n).hex()).exists() for n in range(3)] == [False, True, True]


def test_a_file_that_has_gone_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another process, or another thread, needed the room."""
    store = BlockStore(tmp_path, "model", ROOM)
    store.put(name_of(1), TOKENS, b"abc")
    (store.folder / name_of(1).hex()).unlink()
    assert store.get(name_of(1), TOKENS, 3) is None
    assert len(store) == store.num_bytes == 0
    assert not caplog.records


def test_half_written_files_are_taken_away(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "model", ROOM)
    old = store.folder / "tmp123.partial"
    old.write_bytes(b"half")
    os.utime(old, (0, 0))
    for name in ("new.partial", "README", "cafe"):
        (store.folder / name).write_bytes(b"somebody else's")
    again = BlockStore(tmp_path, "model", ROOM)
    assert len(again) == again.num_bytes == 0
    assert sorted(path.name for path in store.folder.iterdir()) == ["README", "cafe", "new.partial"]


def test_a_full_disk_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlockStore(tmp_path, "model", ROOM)
    store.put(name_of(1), TOKENS, b"abc")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with caplog.at_level(logging.WARNING):
        assert not store.put(name_of(2), TOKENS, b"abc")
        assert not store.put(name_of(3), TOKENS, b"abc")
    assert caplog.text.count("keeps nothing from now on") == 1
    assert store.get(name_of(1), TOKENS, 3) == b"abc", "what is there is still found"
    assert len(list(store.folder.iterdir())) == 1, "nothing half written is left"


def test_a_folder_that_cannot_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = BlockStore(tmp_path / "file", "model", ROOM)
    assert not store.put(name_of(1), TOKENS, b"abc")
    assert store.get(name_of(1), TOKENS, 3) is None
    assert store.seconds_per_block(100) == float("inf")
    assert "cannot be used" in caplog.text


def test_reading_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By files that are there, which the operating system is asked to forget first; or by one written for it."""
    store, dropped = BlockStore(tmp_path, "model", ROOM), list[str]()
    monkeypatch.setattr("m6_prefix_cache.block_store.drop_from_memory", lambda path: dropped.append(path.name))
    assert 0 < store.seconds_per_block(1000) < 1
    assert dropped[0].endswith(".partial")
    assert not list(store.folder.iterdir())
    store.put(name_of(1), TOKENS, bytes(1000))
    dropped.clear()
    assert 0 < store.seconds_per_block(1000) < 1
    assert dropped == [name_of(1).hex()]
    monkeypatch.setattr("m6_prefix_cache.block_store._seconds_per_byte", lambda path: 0.001)
    assert store.seconds_per_block(4000) == 4


def test_the_pace_is_kept(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, "model", ROOM)
    assert store.pace is None
    store.write_pace(0.0025)
    assert BlockStore(tmp_path, "model", ROOM).pace == 0.0025
    (store.folder / "seconds-per-token").write_text("soon", encoding="ascii")
    assert store.pace is None
