"""A radix tree over blocks: sequences that begin alike share a path from the root, and part where they part.

    root ── [The quick .. jumps] ─┬─ [over the .. dog] ── [and then ..]
      7            7              ├─ [over a .. fence]                       3 blocks that begin with "over"
                                  └─ [across the ..]

Every edge is one block of tokens. Children are kept in the order of their tokens, so those that share most with a
prompt are neighbours: two of them are looked at, however many there are. A prompt that parts amid a block can use the
block's first tokens: they are copied (copy-on-write), which a table of whole blocks' hashes cannot do.
"""
from __future__ import annotations

from bisect import bisect_left

from m0_basics.request import Sequence

from .prefix_index import NOTHING, Match, PrefixIndex, Tokens


class Node:
    """A block, behind its parent's; or the root of a salt, which holds none."""

    __slots__ = ("block", "children", "keys", "parent", "salt", "serial", "tokens")

    def __init__(self, block: int, parent: Node | None, tokens: Tokens, salt: str = "", serial: int = 0) -> None:
        self.block, self.parent, self.tokens, self.salt, self.serial = block, parent, tokens, salt, serial
        self.keys: list[Tokens] = []            # the children's tokens, sorted
        self.children: list[Node] = []          # in the same order

    def find(self, tokens: Tokens) -> Node | None:
        """The child that holds exactly these tokens."""
        place = bisect_left(self.keys, tokens)
        return self.children[place] if place < len(self.keys) and self.keys[place] == tokens else None

    def closest(self, tokens: Tokens) -> tuple[Node | None, int]:
        """The child that shares most of the first `tokens`, and how many."""
        place, best, most = bisect_left(self.keys, tokens), None, 0
        for i in (place - 1, place):
            if 0 <= i < len(self.keys) and (shared := num_shared(self.keys[i], tokens)) > most:
                best, most = self.children[i], shared
        return best, most

    def add(self, child: Node) -> None:
        place = bisect_left(self.keys, child.tokens)
        self.keys.insert(place, child.tokens)
        self.children.insert(place, child)

    def drop(self, child: Node) -> None:
        place = bisect_left(self.keys, child.tokens)
        del self.keys[place], self.children[place]


def num_shared(a: Tokens, b: Tokens) -> int:
    """How many of their first tokens are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class RadixTree(PrefixIndex):
    """Cached blocks as a tree, with a root for each salt."""

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.roots: dict[str, Node] = {}
        self._nodes: dict[int, Node] = {}               # by block

    def __len__(self) -> int:
        return len(self._nodes)

    def serial(self, block: int) -> int | None:
        return node.serial if (node := self._nodes.get(block)) else None

    def match(self, sequence: Sequence, max_tokens: int, earlier: Match = NOTHING) -> Match:
        blocks = self._still_known(earlier)
        num_kept = len(blocks)
        node = self._nodes[blocks[-1]] if blocks else self.roots.get(sequence.cache_salt)
        while node is not None:
            start = len(blocks) * self.block_size
            tokens = tuple(sequence.data.token_slice(start, min(start + self.block_size, max_tokens)))
            child = node.find(tokens) if len(tokens) == self.block_size else None
            if child is None:
                partial, num_partial = node.closest(tokens)
                return self._matched(blocks, earlier, num_kept, partial.block if partial else None, num_partial)
            blocks.append(child.block)
            node = child
        return self._matched(blocks, earlier, num_kept)

    def insert(self, sequence: Sequence, number: int, parent: int | None, block: int) -> int | None:
        if parent is None:
            node = self.roots.setdefault(sequence.cache_salt, Node(-1, None, (), sequence.cache_salt))
        elif parent in self._nodes:
            node = self._nodes[parent]
        else:
            return None
        tokens = self.tokens_of(sequence, number)
        if (known := node.find(tokens)) is not None:
            return known.block
        self._nodes[block] = child = Node(block, node, tokens, serial=self._next_serial())
        node.add(child)
        return block

    def remove(self, block: int) -> None:
        if (node := self._nodes.pop(block, None)) is None:
            return
        parent = node.parent
        assert parent is not None
        parent.drop(node)
        if parent.parent is None and not parent.children:
            del self.roots[parent.salt]
        behind = list(node.children)
        while behind:                                   # leaves go first, so there is nothing here as a rule
            lost = behind.pop()
            del self._nodes[lost.block]
            behind += lost.children
        self.version += 1
