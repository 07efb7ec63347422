"""A block allocator with copy-on-write: sequences grow token by token, forks share their blocks.

Every block has a reference count. A table lists a sequence's blocks in order. Nothing is copied when a sequence is
forked; the copy comes with the first write to a block that somebody else holds too.
"""
from __future__ import annotations


class OutOfBlocksError(Exception):
    """No block is free. The caller preempts somebody and tries again; nothing has changed."""


class BlockAllocator:
    """`num_blocks` blocks of `block_size` tokens; block ids begin at 0."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.free_ids = list(range(num_blocks - 1, -1, -1))         # a stack: the last one is taken next
        self.counts = [0] * num_blocks

    def append_token(self, table: list[int], num_tokens: int) -> tuple[int, tuple[int, int] | None]:
        """Make room for token number `num_tokens` (from 0) of the sequence with `table`, which holds that many tokens.

        Returns its slot, block * block_size + offset, and the copy (from block, to block) that the device has to make
        before it writes, or None. Cases:

        - the last block is full, or there is none: take a free block, append it to `table`;
        - the last block has room and is the sequence's alone (count 1): nothing to do;
        - the last block has room and is shared: take a free block, let it stand in the old one's place in `table`,
          and give up one reference to the old one.

        Raises OutOfBlocksError if a free block is needed and there is none; then nothing has changed. O(1).
        """
        index, offset = divmod(num_tokens, self.block_size)
        if offset and self.counts[table[index]] == 1:
            return table[index] * self.block_size + offset, None
        if not self.free_ids:
            raise OutOfBlocksError
        block = self.free_ids.pop()
        self.counts[block] = 1
        copy = None
        if offset:
            copy = (table[index], block)
            self.counts[table[index]] -= 1
            table[index] = block
        else:
            table.append(block)
        return block * self.block_size + offset, copy

    def fork(self, table: list[int]) -> list[int]:
        """A second table over the same blocks. Nothing is copied."""
        for block in table:
            self.counts[block] += 1
        return list(table)

    def free(self, table: list[int]) -> None:
        """Give up all blocks of `table`, which is empty afterwards.

        A block whose count falls to 0 is free. The tail is freed first, so that the head of the sequence is the one
        that is taken next. Raises ValueError for a block that nobody holds; then nothing has changed.
        """
        if any(self.counts[block] < table.count(block) for block in set(table)):
            raise ValueError(f"a block of {table} is free already")
        while table:
            block = table.pop()
            self.counts[block] -= 1
            if not self.counts[block]:
                self.free_ids.append(block)
