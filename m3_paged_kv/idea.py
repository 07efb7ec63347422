"""The idea of this milestone: the cache in blocks. A sequence takes one when it needs it, and a table says where.

    table of A   [ 0 | 1 | 2 ]       token i lies in block table[i // 4], at place i % 4    (blocks of 4 tokens)
    table of B   [ 0 | 1 | 3 ]       forked from A: the same memory, until one of them writes

A block that two sequences hold is only read. Whoever is about to write into one takes a copy first (copy-on-write).
L tokens of a sequence, W numbers that are kept for a token. Run me: python m3_paged_kv/idea.py
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sequence:
    table: list[int] = field(default_factory=list)      # its blocks, in order
    length: int = 0                                     # its tokens


class PagedCache:
    """`num_blocks` blocks of `block_size` tokens, and how many sequences hold each; 0 means that it is free."""
    def __init__(self, num_blocks: int, block_size: int, width: int) -> None:
        self.memory = torch.full((num_blocks, block_size, width), float("nan"))
        self.free = list(range(num_blocks - 1, -1, -1))         # a stack, the lowest on top
        self.holders = [0] * num_blocks

    def append(self, sequence: Sequence, token: Tensor) -> None:
        """Keep one more token [W] of the sequence."""
        index, place = divmod(sequence.length, self.memory.shape[1])
        if index == len(sequence.table):                        # the last block is full
            sequence.table.append(self._take())
        elif self.holders[shared := sequence.table[index]] > 1:
            sequence.table[index] = own = self._take()
            self.memory[own] = self.memory[shared]
            self.holders[shared] -= 1
        self.memory[sequence.table[index], place] = token
        sequence.length += 1

    def fork(self, parent: Sequence) -> Sequence:
        """A second sequence that begins as the parent does. Nothing is copied but the table."""
        for block in parent.table:
            self.holders[block] += 1
        return Sequence(parent.table.copy(), parent.length)

    def release(self, sequence: Sequence) -> None:
        for block in sequence.table:
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free.append(block)

    def gather(self, sequence: Sequence) -> Tensor:
        """[L, W]: what attention reads, in order, wherever it lies."""
        return self.memory[sequence.table].flatten(0, 1)[:sequence.length]

    def _take(self) -> int:
        block = self.free.pop()                                 # an engine makes sure before that there is one
        self.holders[block] = 1
        return block


if __name__ == "__main__":
    cache, tokens, a, other = PagedCache(16, block_size=4, width=2), torch.randn(40, 2), Sequence(), Sequence()
    for i in range(10):
        cache.append(a, tokens[i])
        cache.append(other, -tokens[i])                         # they take turns, so their blocks are scattered
    b = cache.fork(a)
    print("forked:    A", a.table, " B", b.table, " holders of A's last block:", cache.holders[a.table[-1]])
    cache.append(b, tokens[30])
    cache.append(a, tokens[10])
    print("written:   A", a.table, " B", b.table, " holders of A's last block:", cache.holders[a.table[-1]])
    assert torch.equal(cache.gather(a), tokens[:11]) and torch.equal(cache.gather(other), -tokens[:10])
    assert torch.equal(cache.gather(b), torch.cat((tokens[:10], tokens[30:31]))) and a.table[:2] == b.table[:2]
    used = 16 - len(cache.free)
    print(f"A, B and one more: 32 tokens in {used} blocks, {used * 4} slots; three rows of 40 would reserve 120 slots")
    for sequence in (a, b, other):
        cache.release(sequence)
    assert sorted(cache.free) == list(range(16))
