"""Blocks on disk: what one process has computed, the next one finds.

    folder / model's fingerprint / hash of the block        one file for each block of one chain

    "LAB6KV01" | length of the tokens | tokens, 8 bytes each | checksum of the rest | keys and values

The fingerprint stands for everything that the numbers depend on: weights, type, block size, layout. A file is written
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
from pathlib import Path
from statistics import median

from .block_hash import BlockHash
from .prefix_index import Tokens

logger = logging.getLogger(__name__)
_MAGIC = b"LAB6KV01"
_PARTIAL = ".partial"               # the ending of a file that is being written
_TRIALS = 5


class BlockStore:
    """The blocks of one model in a folder, the least recently used first; at most `max_bytes` of them."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int) -> None:
        """Finds what is there, and takes away what an interrupted process has left half written.

        A folder that cannot be used costs a warning: then nothing is found, and nothing is kept.
        """
        self.folder, self.max_bytes = folder / fingerprint, max_bytes
        self.num_bytes = 0
        self.is_writable = True
        self._lock = threading.RLock()      # one thread writes while another reads
        self._sizes = OrderedDict[BlockHash, int]()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._scan()
        except OSError as error:
            self._give_up(f"{self.folder} cannot be used", error)

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, block_hash: BlockHash) -> bool:
        return block_hash in self._sizes

    def put(self, block_hash: BlockHash, tokens: Tokens, data: bytes) -> bool:
        """Keep a block. False: it is there already, it is too large, or the disk does not take it."""
        if block_hash in self._sizes or not self.is_writable:
            return False
        content = _pack(tokens, data)
        if len(content) > self.max_bytes:
            return False
        with self._lock:
            while self.num_bytes + len(content) > self.max_bytes:
                self._remove(next(iter(self._sizes)))
        try:
            self._write(self._path(block_hash), content)
        except OSError as error:
            self._give_up("a block could not be written", error)
            return False
        with self._lock:
            self._sizes[block_hash] = len(content)
            self.num_bytes += len(content)
        return True

    def get(self, block_hash: BlockHash, tokens: Tokens, num_bytes: int) -> bytes | None:
        """The `num_bytes` bytes of a block that holds these tokens; None where there is none, or it is not whole."""
        if block_hash not in self._sizes:
            return None
        path = self._path(block_hash)
        try:
            data = _unpack(path.read_bytes(), tokens, num_bytes)
        except (OSError, ValueError) as error:
            logger.warning("%s is left out and removed: %s", path, error)
            self._remove(block_hash)
            return None
        with self._lock:
            if block_hash in self._sizes:
                self._sizes.move_to_end(block_hash)
        return data

    def seconds_per_block(self, num_bytes: int) -> float:
        """What reading a block of so many bytes takes, measured now; infinite where nothing can be written."""
        if not self.is_writable:
            return float("inf")
        path, seconds = self.folder / f"trial{_PARTIAL}", []
        try:
            self._write(path, _pack((), os.urandom(num_bytes)))
            for _ in range(_TRIALS):
                start = time.perf_counter()
                _unpack(path.read_bytes(), (), num_bytes)
                seconds.append(time.perf_counter() - start)
            path.unlink()
        except (OSError, ValueError) as error:
            self._give_up("reading could not be measured", error)
            return float("inf")
        return median(seconds)

    def _scan(self) -> None:
        found = []
        for path in self.folder.iterdir():
            if path.name.endswith(_PARTIAL):
                path.unlink(missing_ok=True)
                continue
            try:
                state = path.stat()
                found.append((state.st_mtime, bytes.fromhex(path.name), state.st_size))
            except (OSError, ValueError):           # it has just gone, or it is none of ours
                continue
        for _, block_hash, size in sorted(found):
            self._sizes[block_hash] = size
            self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            self._remove(next(iter(self._sizes)))

    def _write(self, path: Path, content: bytes) -> None:
        """Whole or not at all, also for a process that writes the same block at the same time."""
        handle, name = tempfile.mkstemp(_PARTIAL, dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise

    def _remove(self, block_hash: BlockHash) -> None:
        with self._lock:
            self.num_bytes -= self._sizes.pop(block_hash, 0)
        try:
            self._path(block_hash).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s could not be removed: %s", self._path(block_hash), error)

    def _path(self, block_hash: BlockHash) -> Path:
        return self.folder / block_hash.hex()

    def _give_up(self, what: str, error: Exception) -> None:
        """Once: nothing is written from now on."""
        if self.is_writable:
            logger.warning("the prefix cache on disk keeps nothing from now on: %s (%s)", what, error)
        self.is_writable = False


def _pack(tokens: Tokens, data: bytes) -> bytes:
    names = array("q", tokens).tobytes()
    checksum = zlib.crc32(names + data)
    return b"".join([_MAGIC, len(names).to_bytes(8, "little"), names, checksum.to_bytes(4, "little"), data])


def _unpack(content: bytes, tokens: Tokens, num_bytes: int) -> bytes:
    """The data behind a header that says these tokens. Raises ValueError for any other file."""
    expected = _pack(tokens, b"")
    start = len(expected)
    if content[:start - 4] != expected[:-4]:
        raise ValueError("it is not of this format, or holds other tokens")
    data = content[start:]
    if len(data) != num_bytes:
        raise ValueError(f"it holds {len(data)} bytes instead of {num_bytes}")
    if content[start - 4:start] != zlib.crc32(expected[16:-4] + data).to_bytes(4, "little"):
        raise ValueError("its checksum is wrong")
    return data
