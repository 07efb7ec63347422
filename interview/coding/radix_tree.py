"""A radix tree over token ids with LRU eviction: the index of a prefix cache, without the cache.

An edge holds a run of tokens, so a long prompt is one node. Inserting a prompt that leaves an edge in its middle
splits it. Eviction takes whole leaves, the least recently used first, and never one that is in use.
"""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(eq=False)
class Node:
    """A run of tokens behind its parent's. `users` counts running requests that end at this node or below it."""

    tokens: tuple[int, ...]
    parent: Node | None
    children: dict[int, Node] = field(default_factory=dict)         # first token of the child's run -> child
    users: int = 0
    last_used: int = 0


class RadixTree:
    """Tokens that are cached. `clock` grows with each call of `insert`."""

    def __init__(self) -> None:
        self.root = Node((), None)
        self.clock = 0

    def match(self, tokens: tuple[int, ...]) -> tuple[Node, int, int]:
        """The deepest node on the path of `tokens`, how many of its own tokens agree, and how many agree in all."""
        node, common, total = self.root, 0, 0
        while total < len(tokens) and common == len(node.tokens):
            child = node.children.get(tokens[total])
            if child is None:
                break
            node, common = child, 0
            while common < len(node.tokens) and total < len(tokens) and node.tokens[common] == tokens[total]:
                common, total = common + 1, total + 1
        return node, common, total

    def insert(self, tokens: tuple[int, ...]) -> int:
        """Add `tokens`; return how many were there before. Advances the clock, and stamps every node on the path.

        - The path leaves an edge in its middle: split the edge. The upper part is a new node with the edge's first
          tokens, in the parent's place; the old node keeps the rest, its children, its users and its stamp. The new
          node has the old one's users.
        - What is left of `tokens` becomes one new leaf. If nothing is left, there is none: the end of `tokens` is a
          node of its own all the same, after a split.
        - `last_used` of every node from the root to the end of `tokens` is the new clock.

        No tokens: nothing is added, and 0 is returned.
        """
        node, common, total = self.match(tokens)
        if node is not self.root and common < len(node.tokens):
            assert node.parent is not None
            upper = Node(node.tokens[:common], node.parent, {node.tokens[common]: node}, node.users)
            node.parent.children[upper.tokens[0]] = upper
            node.tokens, node.parent = node.tokens[common:], upper
            node = upper
        if total < len(tokens):
            leaf = Node(tokens[total:], node)
            node.children[tokens[total]] = leaf
            node = leaf
        self.clock += 1
        end: Node | None = node
        while end is not None:
            end.last_used = self.clock
            end = end.parent
        return total

    def evict(self, num_tokens: int) -> int:
        """Remove leaves until at least `num_tokens` tokens are gone or nothing may go; return how many went.

        A leaf may go if it has no users. The least recently used goes first. A parent that has lost its last child is
        a leaf from then on, and competes with its own stamp. The root stays. A leaf goes as a whole, so more tokens
        than asked for may go.

        Aim at O(n log n) for n nodes: do not search the whole tree again for each leaf.
        """
        import heapq
        heap, stack = [], [self.root]
        while stack:
            node = stack.pop()
            stack += node.children.values()
            if not node.children and not node.users and node is not self.root:
                heap.append((node.last_used, id(node), node))
        heapq.heapify(heap)
        gone = 0
        while heap and gone < num_tokens:
            _, _, node = heapq.heappop(heap)
            parent = node.parent
            assert parent is not None
            del parent.children[node.tokens[0]]
            gone += len(node.tokens)
            if not parent.children and not parent.users and parent is not self.root:
                heapq.heappush(heap, (parent.last_used, id(parent), parent))
        return gone

    def use(self, tokens: tuple[int, ...], by: int = 1) -> None:
        """Count a running request in (by=1) or out (by=-1) along the path of `tokens`, which ends at a node."""
        node, common, total = self.match(tokens)
        assert total == len(tokens) and common == len(node.tokens)
        current: Node | None = node
        while current is not None:
            current.users += by
            current = current.parent
