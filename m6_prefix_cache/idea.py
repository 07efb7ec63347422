"""The idea of this milestone: keys and values depend on what stands before them, so equal beginnings have equal ones.

    A   [ You are a helpful | assistant. Answer | in one word: why .. ]      computed
    B   [ You are a helpful | assistant. Answer | in one word: how .. ]      two blocks found, the rest computed

A block is named by its tokens and by the name of the block before it: one look-up finds it, and all before it is then
the same. Who ends leaves its blocks where they are; the one that nobody has used for longest goes when room is needed.
T tokens, D dimensions. Run me: python m6_prefix_cache/idea.py
"""
from __future__ import annotations

from hashlib import sha256

import torch
from torch import Tensor

D, VOCAB, BLOCK = 16, 11, 4
torch.manual_seed(0)
EMBED, WQ, WK, WV = torch.randn(VOCAB, D), torch.randn(D, D) / 4, torch.randn(D, D) / 4, torch.randn(D, D)


class Cache:
    """Blocks of keys and values by name, the least recently used first; at most `room` of them."""

    def __init__(self, room: int) -> None:
        self.room, self.blocks, self.num_computed = room, dict[bytes, tuple[Tensor, Tensor]](), 0

    @staticmethod
    def names(tokens: list[int]) -> list[bytes]:
        """Of the whole blocks: each is the hash of the one before it and of its own tokens."""
        names = [b"root"]
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            names.append(sha256(names[-1] + bytes(tokens[start:start + BLOCK])).digest())
        return names[1:]

    def find(self, tokens: list[int]) -> list[tuple[Tensor, Tensor]]:
        """The blocks of the longest known beginning; one token is left, for somebody has to say what comes next."""
        found = []
        for name in self.names(tokens[:-1]):
            if name not in self.blocks:
                break
            found.append(self.blocks[name])
        return found

    def keep(self, tokens: list[int], k: Tensor, v: Tensor) -> None:
        """Remember a text's blocks, the tail first: so the tail is older than what it stands on, and goes first."""
        for i, name in reversed(list(enumerate(self.names(tokens)))):
            self.blocks.pop(name, None)
            self.blocks[name] = k[i * BLOCK:(i + 1) * BLOCK], v[i * BLOCK:(i + 1) * BLOCK]
        while len(self.blocks) > self.room:
            del self.blocks[next(iter(self.blocks))]

    def answer(self, tokens: list[int]) -> int:
        """The token behind a text: computes what is not known, and keeps it."""
        found = self.find(tokens)
        start = len(found) * BLOCK
        x = EMBED[tokens[start:]]
        k, v = (torch.cat([*(block[i] for block in found), x @ w]) for i, w in enumerate((WK, WV)))
        self.num_computed += len(x)
        self.keep(tokens, k, v)
        out = torch.softmax((x[-1] @ WQ) @ k.T, dim=0) @ v
        return int((out @ EMBED.T).argmax())


if __name__ == "__main__":
    system = [int(t) for t in torch.randint(VOCAB, (20,))]
    questions = [[int(t) for t in torch.randint(VOCAB, (3,))] for _ in range(8)]
    warm, cold = Cache(room=64), Cache(room=0)
    for question in questions:
        assert warm.answer(system + question) == cold.answer(system + question)
    print(f"8 questions behind 20 equal tokens: {cold.num_computed} tokens computed without a cache, "
          f"{warm.num_computed} with one")
    small = Cache(room=5)
    small.answer(system)
    small.answer(questions[0] + questions[1])
    print(f"room for 5 blocks, 6 asked for: {len(small.find([*system, 0]))} of the 5 older ones are left")
    assert len(small.find([*system, 0])) == 4
