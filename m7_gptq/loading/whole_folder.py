"""A folder that is there as a whole or not at all.

    target                          appears by one rename, when every file in it is on the disk
    .target.writing-XXXX            what is being written; gone when that ends, however it ends
    .target.writing-XXXX.old        what is being replaced, between two renames

Who works on one of the last two holds its lock.
"""
from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from m0_basics.config import ConfigError
from m0_basics.loading.model_cache import flush_file, locked

_OLD = ".old"


def check_target(target: Path, force: bool, source: Path | None = None) -> None:
    """Raise ConfigError where `whole_folder` would refuse: better before the work than after it.

    `source` is a folder that is read meanwhile.
    """
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise ConfigError(f"folder={str(target)!r} is the model that is read, or holds it; allowed: another folder")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"folder={str(target)!r} is not a folder; allowed: a new folder")
    if target.is_dir() and any(target.iterdir()):
        if not force:
            raise ConfigError(f"folder={str(target)!r} exists; allowed: a new folder, or --force to replace it")
        if not (target / "config.json").is_file():
            raise ConfigError(f"folder={str(target)!r} holds no config.json, so it is no model, and is not replaced; "
                              "allowed: a new folder, or one that holds a model")
        if others := sorted(entry.name for entry in target.iterdir() if entry.is_dir()):
            raise ConfigError(f"folder={str(target)!r} holds other folders ({others[0]}), which would go too, and is "
                              "not replaced; allowed: a new folder, or one that holds a model alone")


@contextlib.contextmanager
def whole_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """Yield an empty folder; what is written into it appears as `target` at the end, and nothing does after an error.

    Raises ConfigError for a target that exists (`force` replaces one that holds a model), and for a disk that is full
    or cannot be written.
    """
    target = target.absolute()
    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_left(target)
        check_target(target, force)
        scratch = Path(tempfile.mkdtemp(prefix=_writing(target), dir=target.parent))
        with locked(scratch):
            yield scratch
            _flush(scratch)
            _move(scratch, target, force)
            flush_file(target.parent)
    except ConfigError:
        raise
    except Exception as error:
        if (reason := disk_error(error)) is None:
            raise
        raise ConfigError(f"{target} cannot be written: {reason}; nothing was changed there") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def disk_error(error: Exception) -> str | None:
    """What the system says, for an error of writing; None for any other. Safetensors has its own class for it."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if type(error).__name__ == "SafetensorError" and ("os error" in str(error) or "I/O error" in str(error)):
        return str(error)
    return None


def write_whole(path: Path, data: bytes) -> None:
    """The file is there as a whole, or as it was."""
    temporary = path.with_name(path.name + ".part")
    try:
        temporary.write_bytes(data)
        flush_file(temporary)
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _writing(target: Path) -> str:
    return f".{target.name}.writing-"


def _remove_left(target: Path) -> None:
    """What killed processes left behind. One that lives holds the lock of its own, or is about to take it."""
    for left in target.parent.glob(glob.escape(_writing(target)) + "*"):
        with contextlib.suppress(OSError), locked(left):
            if left.suffix == _OLD and not target.exists():
                left.rename(target)                         # killed between the two renames of `_move`
            elif time.time() - left.stat().st_mtime > 60:
                shutil.rmtree(left, ignore_errors=True)


def _flush(folder: Path) -> None:
    """To the disk: a rename may outlive a crash that data does not."""
    for file in folder.iterdir():
        flush_file(file)
    flush_file(folder)


def _move(scratch: Path, target: Path, force: bool) -> None:
    """Into its place. What is to be replaced steps aside first, and comes back if that fails.

    It is locked meanwhile, so that no other process takes it for one that was left behind.
    """
    check_target(target, force)                             # another process may have been faster
    aside = Path(f"{scratch}{_OLD}")
    with contextlib.ExitStack() as stack:
        if target.exists():
            try:
                stack.enter_context(locked(target))
            except BlockingIOError as error:
                raise ConfigError(f"folder={str(target)!r} is being replaced by another process; allowed: one at a "
                                  "time") from error
            target.rename(aside)
        try:
            scratch.chmod(0o777 & ~current_umask())                # mkdtemp made it the owner's alone
            scratch.rename(target)
        except BaseException:                               # Ctrl-C too
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)


def current_umask() -> int:
    """Permissions that this process takes away from files it makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
