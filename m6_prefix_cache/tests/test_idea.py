"""The milestone's idea in 80 lines does what its engine does, and runs by itself."""
from __future__ import annotations

import random

from m0_basics.tools.testing.idea import run_idea
from m6_prefix_cache import idea
from m6_prefix_cache.tests.test_kv_cache_manager import make_manager, make_sequence
from m6_prefix_cache.tests.test_prefixes_by_hand import run_whole


def test_it_runs_by_itself() -> None:
    printed = run_idea("m6_prefix_cache")
    assert "184 tokens computed without a cache, 44 with one" in printed
    assert "4 of the 5 older ones are left" in printed


def test_it_finds_what_the_engine_finds() -> None:
    """Random texts of few tokens, one after the other, against the manager with its table of hashes."""
    dice = random.Random(0)
    for _ in range(30):
        small, manager = idea.Cache(room=64), make_manager(num_blocks=64, block_size=idea.BLOCK, kind="hash")
        for _ in range(12):
            text = [dice.randrange(2) for _ in range(dice.randint(1, 20))]
            expected = len(small.find(text)) * idea.BLOCK
            found = manager.get_num_computed_tokens(make_sequence(text)) // idea.BLOCK * idea.BLOCK
            assert found == expected, text
            small.answer(text)
            sequence = make_sequence(text)
            run_whole(manager, sequence)
            manager.free(sequence)
