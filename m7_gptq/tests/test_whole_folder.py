"""A folder that appears as a whole or not at all, and finished parts that survive an interruption."""
import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from m0_basics.config import ConfigError
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.loading import whole_folder as module
from m7_gptq.loading.part_store import PartStore
from m7_gptq.loading.whole_folder import check_target, whole_folder


def write_model(folder, text="new"):
    (folder / "config.json").write_text(text)


def everything_in(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_at_the_end(tmp_path):
    with whole_folder(tmp_path / "parent" / "model") as folder:
        write_model(folder)
        assert not (tmp_path / "parent" / "model").exists()
    assert everything_in(tmp_path / "parent") == ["model"]
    assert (tmp_path / "parent" / "model" / "config.json").read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "parent" / "model").stat().st_mode & 0o777 == 0o777 & ~mask


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_error(tmp_path, error):
    with pytest.raises(type(error)), whole_folder(tmp_path / "model") as folder:
        write_model(folder)
        raise error
    assert everything_in(tmp_path) == []


def test_a_full_disk_is_one_clear_error(tmp_path):
    with (pytest.raises(ConfigError, match=r"model cannot be written: No space left on device; nothing was changed"),
          whole_folder(tmp_path / "model") as folder):
        write_model(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert everything_in(tmp_path) == []


def test_a_disk_that_is_full_when_it_is_flushed(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(ConfigError, match="No space left"), whole_folder(tmp_path / "model") as folder:
        write_model(folder)
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("force", [False, True])
def test_what_is_refused_as_a_target(tmp_path, force):
    file, home, link = tmp_path / "file", tmp_path / "home", tmp_path / "link"
    file.write_text("")
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    link.symlink_to(home)
    for target, message in ((file, "is not a folder"), (link, "is not a folder"),
                            (home, "holds no config.json" if force else "exists; allowed: a new folder, or --force")):
        with pytest.raises(ConfigError, match=message):
            check_target(target, force)
        with pytest.raises(ConfigError, match=message), whole_folder(target, force):
            raise AssertionError("not reached")
    assert (home / "letter.txt").read_text() == "dear"
    with pytest.raises(ConfigError, match="is the model that is read"):
        check_target(home, force, home)


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "model").mkdir()
    with whole_folder(tmp_path / "model") as folder:
        write_model(folder)
    assert everything_in(tmp_path / "model") == ["config.json"]


def test_force_replaces_a_model(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    write_model(target, "old")
    (target / "old.bin").write_text("")
    with whole_folder(target, force=True) as folder:
        write_model(folder)
    assert everything_in(tmp_path) == ["model"] and everything_in(target) == ["config.json"]


def test_force_takes_nothing_with_it(tmp_path):
    """A folder that holds the model that is read, or any other folder, is not replaced."""
    target = tmp_path / "models"
    for folder in (target, target / "base"):
        folder.mkdir()
        write_model(folder)
    for source in (target, target / "base"):
        with pytest.raises(ConfigError, match="is the model that is read, or holds it"):
            check_target(target, True, source)
    with pytest.raises(ConfigError, match="holds other folders"), whole_folder(target, force=True):
        raise AssertionError("nothing is written")
    assert (target / "base" / "config.json").is_file()


def test_what_was_there_comes_back_where_the_rename_fails(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    write_model(target, "old")
    real = Path.rename

    def rename(self, new):
        if "writing" in self.name and self.suffix != ".old":
            raise OSError(errno.EIO, "Input/output error")
        return real(self, new)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(ConfigError, match="Input/output error"), whole_folder(target, force=True) as folder:
        write_model(folder)
    assert everything_in(tmp_path) == ["model"] and (target / "config.json").read_text() == "old"


def test_what_killed_processes_left_is_cleaned_up(tmp_path):
    """Old scratch folders go, a locked one stays, and a model that stood aside comes back."""
    dead, living, aside = (tmp_path / f".model.writing-{name}" for name in ("dead", "living", "x.old"))
    for folder in (dead, living, aside):
        folder.mkdir()
        write_model(folder, "old")
        os.utime(folder, (time.time() - 100,) * 2)
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="exists"), whole_folder(tmp_path / "model"):
            raise AssertionError("not reached")
    finally:
        os.close(handle)
    assert everything_in(tmp_path) == [".model.writing-living", "model"]
    assert (tmp_path / "model" / "config.json").read_text() == "old"


def test_a_model_that_stands_aside_is_left_to_who_replaces_it(tmp_path, monkeypatch):
    """Between the two renames another process comes: it finds the old model locked, and does not put it back."""
    target, real, seen = tmp_path / "model", Path.rename, []
    target.mkdir()
    write_model(target, "old")

    def rename(self, new):
        if self.suffix != ".old" and Path(new) == target:
            module._remove_left(target)                     # the other process, at the worst moment
            seen.append(everything_in(tmp_path))
        return real(self, new)

    monkeypatch.setattr(Path, "rename", rename)
    with whole_folder(target, force=True) as folder:
        write_model(folder)
    assert len(seen) == 1 and [name.endswith(".old") for name in sorted(seen[0], key=len)] == [False, True]
    assert everything_in(tmp_path) == ["model"] and (target / "config.json").read_text() == "new"


def test_two_processes_that_replace_one_model(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    write_model(target, "old")
    with (module.locked(target),
          pytest.raises(ConfigError, match="is being replaced by another process; allowed: one at a time"),
          whole_folder(target, force=True) as folder):
        write_model(folder)
    assert everything_in(tmp_path) == ["model"] and (target / "config.json").read_text() == "old"


# --- finished parts ------------------------------------------------------------------------------------------------

def matrix(seed=0, order=True):
    generator = torch.Generator().manual_seed(seed)
    return QuantizedMatrix(torch.randint(0, 16, (8, 64), generator=generator, dtype=torch.uint8),
                           torch.rand(8, 2, generator=generator), 4,
                           torch.randint(0, 16, (8, 2), generator=generator, dtype=torch.uint8),
                           order=torch.randperm(64, generator=generator) if order else None)


def same(a, b):
    return a.bits == b.bits and torch.equal(a.dequantise(), b.dequantise()) and (a.order is None) == (b.order is None)


def interrupted(tmp_path, run="run", **parts):
    """A run that finished some parts and was interrupted."""
    with pytest.raises(KeyboardInterrupt), PartStore(tmp_path / "model", run) as store:
        for part, matrices in parts.items():
            store.put(part, matrices)
        raise KeyboardInterrupt


def test_parts_of_an_interrupted_run_are_found_again(tmp_path):
    made = {"q": matrix(1), "k": matrix(2, order=False)}
    interrupted(tmp_path, first=made)
    with PartStore(tmp_path / "model", "run") as store:
        back = store.get("first")
        assert back is not None and store.get("second") is None and store.resumed == 1
        assert list(back) == ["q", "k"] and all(same(back[name], made[name]) for name in made)
    assert everything_in(tmp_path) == []                    # finished: nothing is left


def test_parts_of_another_run_are_dropped(tmp_path):
    interrupted(tmp_path, first={"q": matrix()})
    with PartStore(tmp_path / "model", "another") as store:
        assert store.get("first") is None
        assert everything_in(store.folder) == ["run.json"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), PartStore(tmp_path / "model", "run") as store:
        store.put("first", {"q": matrix()})
        raise RuntimeError
    assert everything_in(tmp_path) == []


@pytest.mark.parametrize("harm", ["cut", "flip", "empty", "text", "other shape"])
def test_damaged_parts_are_not_taken_up(tmp_path, harm):
    interrupted(tmp_path, first={"q": matrix()})
    file = tmp_path / ".model.quantizing" / "first.safetensors"
    data = bytearray(file.read_bytes())
    if harm == "cut":
        file.write_bytes(data[:-10])
    elif harm == "flip":
        data[-1] ^= 1
        file.write_bytes(data)
    elif harm == "other shape":
        assert data.count(b"[8,64]") == 1
        file.write_bytes(data.replace(b"[8,64]", b"[64,8]"))
    else:
        file.write_bytes(b"" if harm == "empty" else b"x" * 100)
    with PartStore(tmp_path / "model", "run") as store:
        assert store.get("first") is None and store.resumed == 0
        store.put("first", {"q": matrix(3)})
        assert same(store.get("first")["q"], matrix(3))


def test_damaged_notes_on_the_run_drop_its_parts(tmp_path):
    interrupted(tmp_path, first={"q": matrix()})
    (tmp_path / ".model.quantizing" / "run.json").write_bytes(b"\xff[")
    with PartStore(tmp_path / "model", "run") as store:
        assert store.get("first") is None


def test_a_full_disk_while_parts_are_kept(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with (pytest.raises(ConfigError, match="cannot be written: No space left on device; nothing was left at"),
          PartStore(tmp_path / "model", "run") as store):
        monkeypatch.setattr(Path, "write_bytes", full)
        store.put("first", {"q": matrix()})
    assert everything_in(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"), PartStore(tmp_path / "file" / "model", "run"):
        raise AssertionError("not reached")


def test_one_process_at_a_time(tmp_path):
    program = ("import sys; from pathlib import Path; from m7_gptq.loading.part_store import PartStore\n"
               "with PartStore(Path(sys.argv[1]), 'other'): pass")
    with PartStore(tmp_path / "model", "run") as store:
        store.put("first", {"q": matrix()})
        ran = subprocess.run([sys.executable, "-c", program, str(tmp_path / "model")], capture_output=True, text=True,
                             cwd=Path(__file__).parents[2])
        assert "is being written by another process; allowed: one at a time" in ran.stderr
        assert same(store.get("first")["q"], matrix())      # the other one did no harm
