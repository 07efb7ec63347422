"""A server that comes back: is a known prompt sooner read from disk, or computed again?

  recompute     nothing is read
  in memory     files that the operating system still holds in memory
  disk          files that it has let go of: they come from the disk
  N MB/s        a slower disk: each read takes as long as it would there

Each way is forced; then the engine decides for itself, by what a read took when the tier opened and by what steps took.
"""
from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.bench import Series, line_plot

from ..block_hash import BlockHash
from ..block_store import BlockStore, drop_from_memory
from ..disk_tier import DiskTier
from ..kv_cache_manager import PrefixKVCacheManager
from ..llm import LLM
from ..prefix_index import Tokens

LENGTHS = (17, 65, 257, 513, 1025, 1921)        # the last token is run in any case: whole blocks before it
SLOW_DISKS = (100.0, 10.0)                      # MB/s
RECOMPUTE, IN_MEMORY, DISK = "recompute", "in memory", "disk"


class SlowStore(BlockStore):
    """A store whose reads take as long as on a disk of so many bytes per second."""

    def __init__(self, folder: Path, fingerprint: str, max_bytes: int, bytes_per_second: float) -> None:
        super().__init__(folder, fingerprint, max_bytes)
        self.bytes_per_second = bytes_per_second

    def get(self, block_hash: BlockHash, tokens: Tokens, num_bytes: int) -> bytes | None:
        start = time.perf_counter()
        data = super().get(block_hash, tokens, num_bytes)
        time.sleep(max(0.0, num_bytes / self.bytes_per_second - (time.perf_counter() - start)))
        return data

    def seconds_per_block(self, num_bytes: int) -> float:
        return max(super().seconds_per_block(num_bytes), num_bytes / self.bytes_per_second)


def measure(options: dict[str, Any], rounds: int, lengths: Sequence[int] = LENGTHS,
            slow: Sequence[float] = SLOW_DISKS) -> dict[str, Any]:
    """For each length the ms of each way and what the engine chose with each disk; from where on reading is quicker."""
    rng = random.Random("restart")
    with TemporaryDirectory() as folder:
        llm = LLM(**options | {"prefix_cache_dir": folder})
        text = [rng.randrange(min(100, llm.spec.vocab_size - 1), llm.spec.vocab_size) for _ in range(max(lengths))]
        _ask(llm, text)
        _disk_of(llm)                                       # the server ends
        llm = LLM(**options | {"prefix_cache_dir": folder})     # and comes back
        disk = _disk_of(llm)
        stores = {f"{speed:.0f} MB/s": SlowStore(disk.store.folder.parent, disk.store.folder.name,
                                                 disk.store.max_bytes, 1e6 * speed) for speed in slow}
        ways = _Ways(llm, disk, stores)
        entries = [ways.entry(text[:length], rounds) for length in lengths]
        return {"lengths": entries, "block_bytes": disk.num_bytes, "block_tokens": disk.hasher.block_size,
                "read_block_ms": 1e3 * disk.seconds_to_read,
                "pays_from": {way: next((e["tokens"] for e in entries if e["ms"][way] < e["ms"][RECOMPUTE]), None)
                              for way in entries[0]["ms"] if way != RECOMPUTE}}


class _Ways:
    """One engine, and the disks that it is given one after the other."""

    def __init__(self, llm: LLM, disk: DiskTier, slow: dict[str, SlowStore]) -> None:
        self.llm, self.disk, self.slow = llm, disk, slow
        self.own_store, self.own_estimate = disk.store, disk.seconds_to_compute

    def entry(self, prompt: list[int], rounds: int) -> dict[str, Any]:
        always: dict[str, BlockStore] = {IN_MEMORY: self.own_store, DISK: self.own_store, **self.slow}
        times: dict[str, list[float]] = {way: [] for way in (RECOMPUTE, *always)}
        for _ in range(rounds):
            times[RECOMPUTE].append(self._time(prompt, self.own_store, lambda *_: 0.0))
            for way, store in always.items():
                if way == DISK:
                    for path in self.own_store.folder.iterdir():
                        drop_from_memory(path)
                times[way].append(self._time(prompt, store, lambda *_: float("inf")))
        chosen = {}
        for way, store in {DISK: self.own_store, **self.slow}.items():
            before = self.disk.num_read_blocks
            self.disk.seconds_to_read = store.seconds_per_block(self.disk.num_bytes)
            self._time(prompt, store, self.own_estimate)
            chosen[way] = "read" if self.disk.num_read_blocks > before else RECOMPUTE
        return {"tokens": len(prompt), "ms": {way: median(own) for way, own in times.items()}, "chosen": chosen}

    def _time(self, prompt: list[int], store: BlockStore, estimate: Callable[[int, int], float | None]) -> float:
        """Milliseconds to the first token, with nothing on the device."""
        self.llm.reset_prefix_cache()
        self.disk.store, self.disk.seconds_to_compute = store, estimate
        return _ask(self.llm, prompt)


def _ask(llm: LLM, prompt: list[int]) -> float:
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    metrics = output.metrics
    assert metrics is not None
    assert metrics.first_token_time is not None
    return 1e3 * (metrics.first_token_time - metrics.arrival_time)


def _disk_of(llm: LLM) -> DiskTier:
    assert isinstance(llm.manager, PrefixKVCacheManager)
    assert isinstance(llm.manager.below, DiskTier)
    llm.manager.below.flush()
    return llm.manager.below


def draw(found: dict[str, Any], path: Path) -> Path:
    """Time to the first token over the length, one line for each way."""
    entries = found["lengths"]
    lines = {way: Series([e["tokens"] for e in entries], [e["ms"][way] for e in entries]) for way in entries[0]["ms"]}
    return line_plot(lines, path, title="A server that comes back: read a known prompt, or compute it again",
                     xlabel="tokens of the prompt, all but one known", ylabel="time to the first token, ms",
                     log_y=True, unit=" ms")
