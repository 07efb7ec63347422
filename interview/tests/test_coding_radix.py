"""The radix tree: splits and evictions by hand, and everything against a plain set of prefixes."""
from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from interview.coding.radix_tree import Node, RadixTree

Tokens = tuple[int, ...]


def shape(node: Node) -> dict[Tokens, object]:
    return {child.tokens: shape(child) for child in node.children.values()}


def tree_of(*sequences: Tokens) -> RadixTree:
    tree = RadixTree()
    for tokens in sequences:
        tree.insert(tokens)
    return tree


def test_an_edge_is_split_where_prompts_part() -> None:
    tree = RadixTree()
    assert [tree.insert(t) for t in [(1, 2, 3, 4), (1, 2, 5), (1, 2, 3, 4, 6), (1, 2), ()]] == [0, 2, 4, 2, 0]
    assert shape(tree.root) == {(1, 2): {(3, 4): {(6,): {}}, (5,): {}}}
    for node in (tree.root.children[1], tree.root.children[1].children[3]):
        assert all(child.parent is node for child in node.children.values())


def test_a_split_keeps_users_children_and_stamps() -> None:
    tree = tree_of((1, 2, 3), (1, 2, 3, 4))
    tree.use((1, 2, 3, 4))
    assert tree.insert((1, 9)) == 1
    upper = tree.root.children[1]
    lower = upper.children[2]
    assert (upper.tokens, upper.users, upper.last_used) == ((1,), 1, 3)
    assert (lower.tokens, lower.users, lower.last_used) == ((2, 3), 1, 2)
    assert lower.children[4].users == 1
    assert upper.children[9].users == 0
    tree.use((1, 2, 3, 4), by=-1)
    assert upper.users == lower.users == 0


def test_the_end_of_a_shorter_prompt_is_a_node() -> None:
    tree = tree_of((1, 2, 3))
    assert tree.insert((1, 2)) == 2
    assert shape(tree.root) == {(1, 2): {(3,): {}}}
    assert tree.root.children[1].last_used == 2


prompts = st.lists(st.integers(0, 2), max_size=8).map(tuple)


@given(st.lists(prompts, max_size=30))
def test_insert_equals_a_set_of_prefixes(steps: list[Tokens]) -> None:
    """Insert alone: what follows needs `evict` too."""
    tree, stamps = RadixTree(), dict[Tokens, int]()
    for clock, tokens in enumerate(steps, start=1):
        prefixes = [tokens[:i + 1] for i in range(len(tokens))]
        assert tree.insert(tokens) == sum(p in stamps for p in prefixes)
        stamps |= dict.fromkeys(prefixes, clock)
        assert tree.match(tokens)[2] == len(tokens)
    stack, seen = [(tree.root, ())], dict[Tokens, int]()
    while stack:
        node, above = stack.pop()
        seen |= {above + node.tokens[:i + 1]: node.last_used for i in range(len(node.tokens))}
        stack += [(child, above + node.tokens) for child in node.children.values()]
    assert seen == stamps


def test_leaves_go_in_the_order_of_their_last_use() -> None:
    tree = tree_of((1, 2), (3, 4, 5), (6,))
    tree.insert((1, 2))
    assert tree.evict(2) == 3                                       # a leaf goes as a whole
    assert shape(tree.root) == {(1, 2): {}, (6,): {}}
    assert tree.evict(1) == 1
    assert shape(tree.root) == {(1, 2): {}}
    assert tree.evict(0) == 0
    assert tree.evict(100) == 2
    assert shape(tree.root) == {}


def test_a_parent_without_children_competes() -> None:
    tree = tree_of((1, 2, 3), (7,), (1, 2, 3, 4))
    tree.insert((7,))
    assert tree.evict(4) == 4                                       # the leaf 4, then its parent, before 7
    assert shape(tree.root) == {(7,): {}}


def test_what_is_used_stays_with_all_above_it() -> None:
    tree = tree_of((1, 2), (1, 2, 3), (1, 4))
    tree.use((1, 2))
    assert tree.evict(100) == 2
    assert shape(tree.root) == {(1,): {(2,): {}}}
    tree.use((1, 2), by=-1)
    assert tree.evict(100) == 2


@given(st.lists(st.tuples(prompts, st.integers(0, 3)), max_size=30))
def test_equals_a_set_of_prefixes(steps: list[tuple[Tokens, int]]) -> None:
    tree, known, used = RadixTree(), dict[Tokens, int](), dict[Tokens, int]()
    for clock, (tokens, gone) in enumerate(steps, start=1):
        prefixes = [tokens[:i + 1] for i in range(len(tokens))]
        assert tree.insert(tokens) == sum(p in known for p in prefixes)
        known |= dict.fromkeys(prefixes, 1)
        used |= dict.fromkeys(prefixes, clock)
        left = tree.evict(gone)
        assert left >= min(gone, len(known))
        for _ in range(left):                                       # the oldest end, without the tree
            ends = [p for p in known if not any(q[:-1] == p for q in known)]
            del known[min(ends, key=lambda p: used[p])]
        assert all(tree.match(p)[2] == len(p) for p in known)
        stack, count = [tree.root], 0
        while stack:
            node = stack.pop()
            count += len(node.tokens)
            stack += node.children.values()
        assert count == len(known)
