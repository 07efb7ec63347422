"""Block tables: which blocks hold a sequence's keys and values, in order.

    table of A   [ 4 | 1 | 7 ]      token i lies in slot  table[i // block_size] * block_size + i % block_size
    table of B   [ 4 | 1 | 2 ]      B was forked from A: blocks 4 and 1 are the same memory

A shared block is only read. Before a sequence writes into one, it gets a copy of its own (copy-on-write). An eviction
plugin may take blocks from the middle: later tokens then lie that much further to the front of the table.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from m0_basics.request import Sequence
from m2_continuous_batching.kv_cache_manager import SlotCopy

from .block_pool import Pool


class BlockTables:
    """The tables of the sequences on the device, over one pool of blocks."""

    def __init__(self, pool: Pool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self.copies: list[SlotCopy] = []                # that writing asks for, in order, until somebody takes them
        self._tables: dict[int, list[int]] = {}         # by seq_id
        self._num_dropped: dict[int, int] = {}          # by seq_id: tokens of sequences that have forgotten some

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence.seq_id in self._tables

    def __len__(self) -> int:
        return len(self._tables)

    def __getitem__(self, sequence: Sequence) -> list[int]:
        """The sequence's blocks, in order. Read only."""
        return self._tables[sequence.seq_id]

    def num_blocks_of(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def place(self, sequence: Sequence, position: int) -> int:
        """Where in its table a sequence's token lies: at its position, less what was forgotten before it."""
        return position - self._num_dropped.get(sequence.seq_id, 0)

    def open(self, sequence: Sequence, blocks: Iterable[int] = ()) -> None:
        """Give a sequence a table that begins with `blocks`; it takes over the caller's hold on them."""
        assert sequence not in self
        self._tables[sequence.seq_id] = list(blocks)

    def grow(self, sequence: Sequence, start: int, num_tokens: int) -> bool:
        """Make places [start, start + num_tokens) of the table writable: blocks of the sequence's own for all of them.

        False: too few blocks are free, and nothing has changed.
        """
        table = self._tables[sequence.seq_id]
        num_new = self.num_blocks_of(start + num_tokens) - len(table)
        first = start // self.block_size                        # the block that the first new token goes into
        must_copy = first < len(table) and self.pool.ref_count(table[first]) > 1
        if num_new <= 0 and not must_copy:
            return True                                         # most steps: the last block has room
        if num_new + must_copy > self.pool.num_free:
            return False
        if must_copy:
            own = self.pool.allocate()
            self.copies.append(SlotCopy(table[first] * self.block_size, own * self.block_size,
                                        start % self.block_size))
            self.pool.release(table[first])
            table[first] = own
        table += [self.pool.allocate() for _ in range(num_new)]
        return True

    def replace(self, sequence: Sequence, number: int, block: int) -> None:
        """Let a sequence use another block with the same contents; the caller's hold on it is taken over."""
        table = self._tables[sequence.seq_id]
        self.pool.release(table[number])
        table[number] = block

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Let `child` share the blocks of what `parent` has computed."""
        blocks, _ = self.split(parent)
        for block in blocks:
            self.pool.share(block)
        self.open(child, blocks)
        if parent.seq_id in self._num_dropped:
            self._num_dropped[child.seq_id] = self._num_dropped[parent.seq_id]

    def split(self, sequence: Sequence) -> tuple[list[int], list[int]]:
        """Blocks of the tokens that have run, and those allocated for tokens that have not."""
        table = self._tables[sequence.seq_id]
        num_ran = self.num_blocks_of(self.place(sequence, sequence.num_computed_tokens))
        return table[:num_ran], table[num_ran:]

    def drop(self, sequence: Sequence, indices: Iterable[int]) -> None:
        """Let a sequence forget the tokens in some of its blocks, named by their index in its table.

        They have all run, and the newest token is not among them.
        """
        chosen = sorted(set(indices), reverse=True)
        if not chosen:
            return
        num_kept = self.place(sequence, sequence.num_computed_tokens)
        assert chosen[-1] >= 0 and (chosen[0] + 1) * self.block_size < num_kept
        for index in chosen:
            self.pool.release(self._tables[sequence.seq_id].pop(index))
        dropped = self._num_dropped.get(sequence.seq_id, 0)
        self._num_dropped[sequence.seq_id] = dropped + len(chosen) * self.block_size

    def close(self, sequence: Sequence) -> list[int]:
        """Take a sequence's table away and return it: the hold on its blocks is the caller's. [] if it has none."""
        return self._tables.pop(sequence.seq_id, [])

    def forget(self, seq_id: int) -> None:
        """The sequence keeps nothing: if it runs again, it is computed anew, with all its tokens."""
        self._num_dropped.pop(seq_id, None)

    def release(self, blocks: list[int]) -> None:
        """Let go of blocks, the tail first: the head of a sequence is what others are likeliest to share."""
        for block in reversed(blocks):
            self.pool.release(block)


Place = tuple[str, int]             # ("device", block) or ("host", block)


class HasBlocks(ABC):
    """A KV cache manager whose cache consists of blocks: what plugins and tools ask of it."""

    tables: BlockTables

    @abstractmethod
    def places_of(self, sequence: Sequence) -> list[Place]:
        """Where a sequence's blocks lie, in order; [] if it holds none. Those of a running one are on the device."""
