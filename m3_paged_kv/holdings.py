"""What sequences that gave way keep: their blocks in host memory, until they start again.

    runs    table      [ 4 | 1 | 7 ]            block 4 is shared with another sequence
    waits   holdings   [ 4 | h0 | h1 ]          so it stays on the device; the others were copied to host blocks 0 and 1
    runs    table      [ 4 | 2 | 9 ]            and come back wherever there is room

Slots [0, num_blocks * block_size) are the device's; the host's follow, so that a swap is a copy like any other.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from m0_basics.request import Sequence
from m2_continuous_batching.kv_cache_manager import SlotCopy

from .block_pool import Pool
from .block_tables import BlockTables, Place


@dataclass(frozen=True)
class Holdings:
    """What a sequence that is not running brings when it starts: computed tokens, and its blocks in order."""

    num_tokens: int = 0
    blocks: list[Place] = field(default_factory=list)


def blocks_to_start(tables: BlockTables, holdings: Holdings, start: int, num_tokens: int,
                    gone: Mapping[int, int]) -> int:
    """Free blocks that a sequence takes as it comes in: for what is on the host, for what is new, for a copy.

    Places [start, start + num_tokens) of its table are to be written. `gone` says of blocks how many of their holders
    will have let go by then.
    """
    num_on_device = sum(place == "device" for place, _ in holdings.blocks)
    first = start // tables.block_size                      # the block that the first new token goes into
    place, block = holdings.blocks[first] if first < len(holdings.blocks) else ("host", 0)
    is_shared = place == "device" and tables.pool.ref_count(block) - gone.get(block, 0) > 1
    return tables.num_blocks_of(start + num_tokens) - num_on_device + is_shared


class SwapSpace:
    """The holdings of sequences that were swapped out, over a pool of host blocks; none, if the pool is empty."""

    def __init__(self, tables: BlockTables, host_pool: Pool) -> None:
        """Copies are written down where those of `tables` are."""
        self.tables = tables
        self.host_pool = host_pool
        self._holdings: dict[int, Holdings] = {}            # by seq_id, the latest last

    def __len__(self) -> int:
        return len(self._holdings)

    def __getitem__(self, sequence: Sequence) -> Holdings:
        """What a sequence holds here: nothing, unless it was swapped out."""
        return self._holdings.get(sequence.seq_id, Holdings())

    def takes(self, num_private: int, num_free: int | None = None) -> bool:
        """Whether there is room for that many blocks that nobody else uses; `num_free`: if so many were free."""
        num_free = self.host_pool.num_free if num_free is None else num_free
        return self.host_pool.num_blocks > 0 and num_private <= num_free

    def swap_out(self, sequence: Sequence, blocks: list[int]) -> bool:
        """Take over a sequence's hold on its computed blocks. False: there is no room, and nothing has changed.

        They move to host memory, from the tail to the head; blocks that others use too stay where they are.
        """
        pool = self.tables.pool
        if not self.takes(sum(pool.ref_count(block) == 1 for block in blocks)):
            return False
        places: list[Place] = []
        for block in reversed(blocks):
            if pool.ref_count(block) > 1:
                places.append(("device", block))
                continue
            places.append(("host", self.host_pool.allocate()))
            self._copy(("device", block), places[-1])
            pool.release(block)
        self._holdings[sequence.seq_id] = Holdings(sequence.num_computed_tokens, places[::-1])
        return True

    def swap_in(self, sequence: Sequence) -> list[int]:
        """Give a sequence its blocks back, all of them on the device; [] if it has none here."""
        blocks: list[int] = []
        for place, block in self._holdings.pop(sequence.seq_id, Holdings()).blocks:
            if place == "device":
                blocks.append(block)
                continue
            blocks.append(self.tables.pool.allocate())
            self._copy((place, block), ("device", blocks[-1]))
            self.host_pool.release(block)
        return blocks

    def hold(self, sequence: Sequence, holdings: Holdings) -> None:
        """Let a sequence that has nothing here bring these blocks; their hold is taken over from the caller."""
        assert sequence.seq_id not in self._holdings
        self._holdings[sequence.seq_id] = holdings

    def move_back(self, sequence: Sequence, index: int, block: int) -> None:
        """A block of what a sequence holds on the host is on the device as well: hold it there, its hold taken over."""
        blocks = self._holdings[sequence.seq_id].blocks
        place, host_block = blocks[index]
        assert place == "host"
        self.host_pool.release(host_block)
        blocks[index] = ("device", block)

    def drop(self, seq_id: int) -> None:
        """The sequence keeps nothing: if it runs again, it is computed anew."""
        self.tables.forget(seq_id)
        for place, block in reversed(self._holdings.pop(seq_id, Holdings()).blocks):
            (self.tables.pool if place == "device" else self.host_pool).release(block)

    def drop_latest(self, but: Sequence) -> bool:
        """Drop what was swapped out last, of anybody but one sequence. False: nobody else has anything here."""
        other = next((seq_id for seq_id in reversed(self._holdings) if seq_id != but.seq_id), None)
        if other is not None:
            self.drop(other)
        return other is not None

    def _copy(self, source: Place, target: Place) -> None:
        size = self.tables.block_size
        self.tables.copies.append(SlotCopy(self._first_slot(source), self._first_slot(target), size))

    def _first_slot(self, place: Place) -> int:
        """Host blocks are numbered after the device's."""
        return (place[1] + (self.tables.pool.num_blocks if place[0] == "host" else 0)) * self.tables.block_size
