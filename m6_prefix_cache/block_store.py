"""Blocks on disk: what one process has computed, the next one finds.

    folder / model's fingerprint / hash of the block        one file for each block of one chain

    "LAB6KV01" | length of the tokens | tokens, 8 bytes each | checksum of the rest | keys and values

The fingerprint stands for everything that the numbers depend on: weights, type, block size, kernels. A file is written
under another name and renamed, so it is whole or not there; what is read is checked against the tokens that were asked
for. Whatever is wrong with a file, or with the disk, costs a warning and the block: nothing here ever fails a request.
"""
from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from statistics import median

from .block_hash import BlockHash
from .prefix_index import Tokens

logger = logging.getLogger(__name__)
_MAGIC = b"LAB6KV01"
_PARTIAL = ".partial"               # the ending of a file that is being written
_ABANDONED = 3600                   # seconds after which nobody is writing it any more
_PACE = "seconds-per-token"         # a file beside the blocks: what computing took, on the machine that wrote them
_TRIALS = 5


class BlockStore:
    """The blocks of one model in a folder, those of other models beside them: at most `max_bytes` in all.

    The least recently used go first, whose ever they are. A process counts what it found and what it wrote: two that
    share a folder may each fill it.
    """

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        """Finds what is there, and takes away what an interrupted process has left half written.

        A folder that cannot be used costs a warning: then nothing is found, and nothing is kept.
        """
        self.root, self.folder, self.max_bytes = folder, folder / fingerprint, max_bytes
        self.num_bytes = 0
        self.is_writable = True
        self._lock = threading.RLock()      # one thread writes while another reads
        self._sizes = OrderedDict[str, int]()           # by path below the root, the least recently used first
        self._latest = 0                    # ns: the last use that was noted
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._scan()
        except OSError as error:
            self._give_up(f"{self.folder} cannot be used", error)

    def __len__(self) -> int:
        """Blocks of this model."""
        return sum(name.startswith(self.folder.name) for name in self._sizes)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return self._name(block_hash) in self._sizes

    def put(self, block_hash: BlockHash, tokens: Tokens, data: bytes) -> bool:
        """Keep a block. False: it is there already, it is too large, or the disk does not take it."""
        if block_hash in self or not self.is_writable:
            return False
        content = _pack(tokens, data)
        if len(content) > self.max_bytes:
            return False
        self._make_room(self.max_bytes - len(content))
        try:
            self._write(self.root / self._name(block_hash), content)
            self._note_use(self._name(block_hash))
        except OSError as error:
            self._give_up("a block could not be written", error)
            return False
        with self._lock:
            self._sizes[self._name(block_hash)] = len(content)
            self.num_bytes += len(content)
        return True

    def get(self, block_hash: BlockHash, tokens: Tokens, num_bytes: int) -> bytes | None:
        """The `num_bytes` bytes of a block that holds these tokens; None where there is none, or it is not whole."""
        if block_hash not in self:
            return None
        path = self.root / self._name(block_hash)
        try:
            return _unpack(path.read_bytes(), tokens, num_bytes)
        except FileNotFoundError:                       # it had to go meanwhile, here or in another process
            self._forget(self._name(block_hash))
        except OSError as error:
            logger.warning("%s could not be read: %s", path, error)
        except ValueError as error:
            logger.warning("%s is left out and removed: %s", path, error)
            self._remove(self._name(block_hash))
        return None

    def touch(self, block_hashes: Iterable[BlockHash]) -> None:
        """These were used, the last one last. Also for processes to come: files remember when they were used."""
        for block_hash in block_hashes:
            name = self._name(block_hash)
            with self._lock, suppress(OSError):
                if name in self._sizes:
                    self._sizes.move_to_end(name)
                    self._note_use(name)

    def _note_use(self, name: str) -> None:
        """A file's time is that of its last use. No two have the same: the system's clock stands still for some ms."""
        self._latest = max(time.time_ns(), self._latest + 1)
        os.utime(self.root / name, ns=(self._latest, self._latest))

    def seconds_per_block(self, num_bytes: int) -> float:
        """What it takes to read a block of so many bytes from the disk, measured now; infinite where that fails.

        Files that are there are read, or one that is written for it. The operating system is asked to forget them
        first: memory is not what a server that comes back reads from.
        """
        own = (self.root / name for name in self._sizes if name.startswith(self.folder.name))
        paths, trial = list(islice(own, _TRIALS)), None
        try:
            if not paths:
                paths = [trial := self._write_partial(os.urandom(num_bytes))] * _TRIALS
            return num_bytes * median(_seconds_per_byte(path) for path in paths)
        except OSError as error:
            self._give_up("reading could not be measured", error)
            return float("inf")
        finally:
            if trial is not None:
                trial.unlink(missing_ok=True)

    @property
    def pace(self) -> float | None:
        """Seconds that a token of a prompt took, as an earlier process has written down; None if none has."""
        try:
            return float((self.folder / _PACE).read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None

    def write_pace(self, seconds: float) -> None:
        """Write down what a token of a prompt takes."""
        if self.is_writable:
            try:
                self._write(self.folder / _PACE, repr(seconds).encode())
            except OSError as error:
                self._give_up("nothing can be written", error)

    def _name(self, block_hash: BlockHash) -> str:
        return f"{self.folder.name}/{block_hash.hex()}"

    def _scan(self) -> None:
        """The blocks of all models, by the time of their last use."""
        found = []
        for path in self.root.glob("*/*"):
            try:
                state = path.stat()
                if path.name.endswith(_PARTIAL) and time.time() - state.st_mtime > _ABANDONED:
                    path.unlink(missing_ok=True)
                if len(path.name) == 64 and len(bytes.fromhex(path.name)) == 32 and path.is_file():
                    found.append((state.st_mtime_ns, f"{path.parent.name}/{path.name}", state.st_size))
            except (OSError, ValueError):           # it has just gone, or it is none of ours
                continue
        for _, name, size in sorted(found):
            self._sizes[name] = size
            self.num_bytes += size
        self._make_room(self.max_bytes)

    def _make_room(self, most: int) -> None:
        with self._lock:
            while self.num_bytes > most:
                self._remove(next(iter(self._sizes)))

    def _write(self, path: Path, content: bytes) -> None:
        """Whole or not at all, also for a process that writes the same file at the same time."""
        partial = self._write_partial(content)
        try:
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise

    def _write_partial(self, content: bytes) -> Path:
        handle, name = tempfile.mkstemp(_PARTIAL, dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
        return Path(name)

    def _forget(self, name: str) -> None:
        with self._lock:
            self.num_bytes -= self._sizes.pop(name, 0)

    def _remove(self, name: str) -> None:
        self._forget(name)
        try:
            (self.root / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s could not be removed: %s", self.root / name, error)

    def _give_up(self, what: str, error: Exception) -> None:
        """Once: nothing is written from now on."""
        if self.is_writable:
            logger.warning("the prefix cache on disk keeps nothing from now on: %s (%s)", what, error)
        self.is_writable = False


def drop_from_memory(path: Path) -> None:
    """Ask the operating system to forget what it holds of a file (Linux; elsewhere it stays in memory)."""
    if hasattr(os, "posix_fadvise"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)                            # what is not on the disk yet cannot be forgotten
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _seconds_per_byte(path: Path) -> float:
    """Reading and checking a file that is not in memory."""
    drop_from_memory(path)
    start = time.perf_counter()
    content = path.read_bytes()
    zlib.crc32(content)
    return (time.perf_counter() - start) / max(1, len(content))


def _pack(tokens: Tokens, data: bytes) -> bytes:
    names = array("q", tokens).tobytes()
    checksum = zlib.crc32(data, zlib.crc32(names))
    return b"".join([_MAGIC, len(names).to_bytes(8, "little"), names, checksum.to_bytes(4, "little"), data])


def _unpack(content: bytes, tokens: Tokens, num_bytes: int) -> bytes:
    """The data behind a header that says these tokens. Raises ValueError for any other file."""
    names = array("q", tokens).tobytes()
    header = _MAGIC + len(names).to_bytes(8, "little") + names
    start = len(header) + 4
    if content[:len(header)] != header:
        raise ValueError("it is not of this format, or holds other tokens")
    data = content[start:]
    if len(data) != num_bytes:
        raise ValueError(f"it holds {len(data)} bytes instead of {num_bytes}")
    if content[len(header):start] != zlib.crc32(data, zlib.crc32(names)).to_bytes(4, "little"):
        raise ValueError("its checksum is wrong")
    return data
