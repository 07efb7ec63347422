"""Beam search over blocks: children share their parent's cache until they write, instead of copying a row."""
from __future__ import annotations

from collections.abc import Callable

from m0_basics.config import ConfigError
from m0_basics.request import Sequence
from m2_continuous_batching.kv_cache_manager import SlotCopy

from .kv_cache_manager import PagedKVCacheManager


class BeamBlocks:
    """What `m1_offline.beam_search` asks of a cache, answered by a `PagedKVCacheManager`."""

    def __init__(self, manager: PagedKVCacheManager, copy_slots: Callable[[list[SlotCopy]], None]) -> None:
        self.manager = manager
        self.copy_slots = copy_slots

    @property
    def num_free(self) -> int:
        """Beams that there may be: each needs at least a block of its own."""
        return self.manager.pool.num_free

    def allocate(self, sequence: Sequence) -> None:
        """Nothing yet: blocks come with `reserve`."""

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Make room for the next tokens; copy what is shared and about to be written. ConfigError: out of blocks."""
        if not self.manager.allocate_slots(sequence, sequence.num_computed_tokens, num_tokens):
            raise ConfigError(f"the beams need more than the {self.manager.pool.num_blocks} blocks of the cache; "
                              "allowed: a smaller beam_width or max_tokens, or a larger num_blocks")
        self.copy_slots(self.manager.take_copies())

    def fork(self, parent: Sequence, child: Sequence) -> None:
        self.manager.fork(parent, child)

    def free(self, sequence: Sequence) -> None:
        self.manager.free(sequence)
