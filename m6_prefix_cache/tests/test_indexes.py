"""F6.1: both indexes find what a search through everything finds, and as fast in a full cache as in an empty one."""
from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m6_prefix_cache.block_hash import BlockHasher, HashIndex
from m6_prefix_cache.prefix_index import PrefixIndex
from m6_prefix_cache.radix_tree import Node, RadixTree, num_shared
from m6_prefix_cache.tests.test_kv_cache_manager import make_sequence

BLOCK = 3


def make(kind: str, block_size: int = BLOCK) -> PrefixIndex:
    return RadixTree(block_size) if kind == "radix" else HashIndex(BlockHasher(block_size, "model"))


def insert_whole(index: PrefixIndex, tokens: list[int], free: list[int], salt: str = "") -> list[int]:
    """Put all whole blocks of a text into the index; returns the blocks that it lies in."""
    sequence, table = make_sequence(tokens, salt), list[int]()
    for number in range(len(tokens) // index.block_size):
        block = free.pop()
        known = index.insert(sequence, number, table[-1] if table else None, block)
        assert known is not None
        if known != block:
            free.append(block)
        table.append(known)
    return table


texts = st.lists(st.integers(0, 2), min_size=0, max_size=14)


@pytest.mark.parametrize("kind", ["radix", "hash"])
@settings(max_examples=120, deadline=None)
@given(stored=st.lists(st.tuples(texts, st.sampled_from(["", "s"])), max_size=8), asked=texts,
       salt=st.sampled_from(["", "s"]), num_lost=st.integers(0, 5), seed=st.integers(0, 99))
def test_as_a_search_through_everything(kind: str, stored: list[tuple[list[int], str]], asked: list[int], salt: str,
                                        num_lost: int, seed: int) -> None:
    """What was stored, less what was removed and all that stands behind it."""
    index, free = make(kind), list(range(100))
    contents: dict[int, tuple[str, tuple[int, ...]]] = {}           # block -> salt, all tokens up to its end
    for tokens, own in stored:
        for number, block in enumerate(insert_whole(index, tokens, free, own)):
            contents[block] = own, tuple(tokens[:(number + 1) * BLOCK])
    dice = random.Random(seed)
    for _ in range(min(num_lost, len(contents))):
        leaves = [b for b, (own, text) in contents.items()
                  if not any(o == own and len(t) > len(text) and t[:len(text)] == text for o, t in contents.values())]
        lost = dice.choice(leaves)
        index.remove(lost)
        del contents[lost]
    assert len(index) == len(contents)
    match = index.match(make_sequence(asked, salt), len(asked))
    known = {text for own, text in contents.values() if own == salt}
    best = 0
    while best + BLOCK <= len(asked) and tuple(asked[:best + BLOCK]) in known:
        best += BLOCK
    assert [contents[b] for b in match.blocks] == [(salt, tuple(asked[:end])) for end in range(BLOCK, best + 1, BLOCK)]
    longer = [text for text in known if len(text) == best + BLOCK and list(text[:best]) == asked[:best]]
    partial = max((num_shared(text[best:], tuple(asked[best:])) for text in longer), default=0)
    assert match.num_partial == (partial if kind == "radix" else 0)
    if match.partial is not None:
        assert contents[match.partial][1][:best + match.num_partial] == tuple(asked[:best + match.num_partial])


@pytest.mark.parametrize("kind", ["radix", "hash"])
def test_the_root_of_a_chain_is_removed(kind: str) -> None:
    """What stood behind it is not found any more, and its blocks can be used again."""
    index, free = make(kind), list(range(20))
    table = insert_whole(index, [1] * 9, free)
    index.remove(table[0])
    assert not index.match(make_sequence([1] * 9), 9).blocks
    for block in table[1:]:
        index.remove(block)
    assert len(index) == 0
    assert len(insert_whole(index, [1] * 9, free)) == 3


def test_salts_leave_nothing_behind() -> None:
    tree, free = RadixTree(BLOCK), list(range(50))
    for i in range(10):
        for block in reversed(insert_whole(tree, [1, 2, 3, 4, 5, 6], free, f"salt {i}")):
            tree.remove(block)
            free.append(block)
    assert not tree.roots


def test_two_children_are_looked_at_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand prompts that part in their first block."""
    tree, free = RadixTree(BLOCK), list(range(1000))
    for i in range(1000):
        insert_whole(tree, [7, i, 0], free)
    looked_at = list[int]()
    monkeypatch.setattr("m6_prefix_cache.radix_tree.num_shared",
                        lambda a, b: looked_at.append(1) or num_shared(a, b))
    match = tree.match(make_sequence([7, 500, 1]), 3)
    assert match.num_partial == 2
    assert len(looked_at) <= 2


def test_hashes_are_worked_out_once_and_depend_on_everything() -> None:
    hasher = BlockHasher(BLOCK, "model")
    one = make_sequence([1, 2, 3, 4, 5, 6, 7])
    first = list(hasher.hashes(one, 1))
    assert hasher.hashes(one, 2)[:1] == first
    others = [make_sequence([1, 2, 3, 4, 5, 6], "salt"), make_sequence([0, 2, 3, 4, 5, 6])]
    assert len({hasher.hashes(s, 2)[1] for s in (one, *others)}) == 3
    assert BlockHasher(BLOCK, "another").hashes(make_sequence([1, 2, 3]), 1) != first
    assert hasher.root("a") != hasher.root("b") != BlockHasher(BLOCK, "modela").root("")


def test_a_node_keeps_its_children_in_order() -> None:
    node = Node(-1, None, ())
    for tokens in ((3, 1), (1, 2), (2, 2)):
        node.add(Node(0, node, tokens))
    assert node.keys == [(1, 2), (2, 2), (3, 1)]
    child = node.find((2, 2))
    assert child is not None
    node.drop(child)
    assert node.find((2, 2)) is None
    assert node.closest((3,)) == (node.children[1], 1)
