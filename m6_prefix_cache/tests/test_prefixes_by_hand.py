"""F6.1 to F6.5: what sequences find, hold, wait for and leave behind, by hand."""
from __future__ import annotations

import pytest

from m0_basics.request import Sequence, SequenceStatus
from m0_basics.sampling_params import SamplingParams
from m6_prefix_cache.block_hash import BlockHasher
from m6_prefix_cache.kv_cache_manager import PrefixKVCacheManager
from m6_prefix_cache.tests.test_kv_cache_manager import make_manager, make_sequence


def run_whole(manager: PrefixKVCacheManager, sequence: Sequence) -> int:
    """Run a sequence that has not started, whole. Returns how many tokens it found."""
    start = manager.get_num_computed_tokens(sequence)
    assert manager.allocate_slots(sequence, start, sequence.num_tokens - start)
    sequence.status = SequenceStatus.RUNNING
    sequence.num_computed_tokens = sequence.num_tokens
    return start


@pytest.mark.parametrize("kind", ["radix", "hash"])
class TestByHand:
    def test_a_full_hit_runs_one_token(self, kind: str) -> None:
        """Also where the prompt is a multiple of the block size: the last block is copied, and its last token run."""
        for length in (12, 13):
            manager = make_manager(kind=kind)
            tokens = list(range(length))
            first, second = make_sequence(tokens), make_sequence(tokens)
            assert run_whole(manager, first) == 0
            manager.free(first)
            assert run_whole(manager, second) == (11 if length == 12 else 12)
            copies = manager.take_copies()
            assert [c.num_slots for c in copies] == ([3] if length == 12 else [])
            manager.free(second)
            assert manager.usage == 0

    def test_running_sequences_share_what_they_have_filled(self, kind: str) -> None:
        manager = make_manager(kind=kind)
        run_whole(manager, first := make_sequence(list(range(10))))
        first.append_token_id(10)
        assert manager.allocate_slots(first, 10, 1)
        second = make_sequence([*range(8), 50, 51])
        assert run_whole(manager, second) == 8
        assert manager.tables[first][:2] == manager.tables[second][:2]
        assert manager.pool.num_used == 4

    def test_another_salt_finds_nothing(self, kind: str) -> None:
        manager = make_manager(kind=kind)
        run_whole(manager, first := make_sequence(list(range(12)), "a"))
        manager.free(first)
        for salt, found in (("", 0), ("b", 0), ("a", 11)):
            assert manager.get_num_computed_tokens(make_sequence(list(range(12)), salt)) == found

    def test_prompt_logprobs_match_nothing(self, kind: str) -> None:
        """vllm#3251, #5344, #8268: rows that were not run have no log-probabilities."""
        manager = make_manager(kind=kind)
        run_whole(manager, first := make_sequence(list(range(12))))
        manager.free(first)
        assert manager.get_num_computed_tokens(
            make_sequence(list(range(12)), params=SamplingParams(prompt_logprobs=1))) == 0

    def test_equal_prompts_wait_for_the_first(self, kind: str) -> None:
        manager = make_manager(kind=kind)
        first, second, third = (make_sequence(tokens) for tokens in ([*range(20)], [*range(20), 30], [9, 9, 9, 9, 9]))
        assert not manager.should_wait(second)
        assert manager.allocate_slots(first, 0, 8)
        first.num_computed_tokens = 8
        assert manager.should_wait(second)
        assert not manager.should_wait(third)
        assert manager.allocate_slots(first, 8, 12)
        first.num_computed_tokens = 20
        assert manager.should_wait(second), "its third to fifth block are not known yet"
        first.append_token_id(1)
        assert manager.allocate_slots(first, 20, 1)
        assert not manager.should_wait(second)
        assert manager.get_num_computed_tokens(second) == 20

    def test_nobody_waits_for_one_who_has_left(self, kind: str) -> None:
        for leave in ("free", "preempt"):
            manager = make_manager(kind=kind)
            first, second = make_sequence([*range(20)]), make_sequence([*range(20)])
            assert manager.allocate_slots(first, 0, 8)
            assert manager.should_wait(second)
            getattr(manager, leave)(first)
            assert not manager.should_wait(second)

    def test_a_step_that_did_not_run_is_not_found(self, kind: str) -> None:
        """It failed: the sequence is where it was, and so is what others find."""
        manager = make_manager(kind=kind)
        first = make_sequence(list(range(12)))
        assert manager.allocate_slots(first, 0, 12)
        manager.free(first)
        assert manager.get_num_computed_tokens(make_sequence(list(range(12)))) == 0

    def test_steps_chosen_ahead_are_found_once_they_have_run(self, kind: str) -> None:
        manager = make_manager(kind=kind, steps_ahead=True)
        first, other = make_sequence(list(range(12))), make_sequence(list(range(12)))
        assert manager.allocate_slots(first, 0, 8)
        first.num_computed_tokens = 8                           # under way
        assert manager.allocate_slots(first, 8, 4)
        assert manager.get_num_computed_tokens(other) == 0
        first.num_computed_tokens = 12
        first.append_token_id(7)
        assert manager.allocate_slots(first, 12, 1)
        assert manager.get_num_computed_tokens(other) == 8

    def test_swapped_blocks_that_others_have_are_held_there(self, kind: str) -> None:
        """KsanaLLM's merge: one physical copy after the way back."""
        manager = make_manager(num_blocks=8, kind=kind, num_host_blocks=8)
        run_whole(manager, first := make_sequence(list(range(9))))
        first.status = manager.preempt(first)
        assert first.status is SequenceStatus.SWAPPED
        manager.take_copies()
        run_whole(manager, second := make_sequence([*range(8), 99]))
        first.append_token_id(9)
        assert manager.get_num_computed_tokens(first) == 9
        assert manager.allocate_slots(first, 9, 1)
        assert manager.tables[first][:2] == manager.tables[second][:2]
        assert sum(c.num_slots for c in manager.take_copies() if c.source >= 8 * 4) == 4, "its last block alone"

    def test_a_collision_gives_nobody_another_text(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(BlockHasher, "next_hash", staticmethod(lambda parent, tokens: b"the same for all"))
        manager = make_manager(kind=kind)
        run_whole(manager, first := make_sequence(list(range(12))))
        manager.free(first)
        assert manager.get_num_computed_tokens(make_sequence([7] * 12)) == 0

    def test_what_a_queue_wants_is_evicted_last(self, kind: str) -> None:
        manager = make_manager(num_blocks=6, kind=kind)
        for tokens in ([1] * 8, [2] * 8, [3] * 8):
            run_whole(manager, sequence := make_sequence(tokens))
            manager.free(sequence)
        manager.pool.wanted = set(manager.match(make_sequence([1] * 9)).blocks)
        run_whole(manager, make_sequence([4] * 8))
        assert len(manager.match(make_sequence([1] * 9)).blocks) == 2
        assert not manager.match(make_sequence([2] * 9)).blocks
        assert len(manager.match(make_sequence([3] * 9)).blocks) == 2

    def test_a_wish_ends_with_what_it_was_for(self, kind: str) -> None:
        """The wanted blocks are needed, and hold another text by now: its leaves go first."""
        manager = make_manager(num_blocks=4, kind=kind)
        run_whole(manager, first := make_sequence([1] * 8))
        manager.free(first)
        manager.pool.wanted = set(manager.match(make_sequence([1] * 9)).blocks)
        run_whole(manager, second := make_sequence(list(range(16))))
        manager.free(second)
        for num_left in (3, 2, 1):
            manager.pool.allocate()
            assert len(manager.match(make_sequence([*range(16), 0])).blocks) == num_left

    def test_leaves_go_before_what_they_stand_on(self, kind: str) -> None:
        """vllm-metal#500: a chain whose root went first kept blocks that nobody could find."""
        manager = make_manager(num_blocks=4, kind=kind)
        run_whole(manager, first := make_sequence(list(range(16))))
        manager.free(first)
        for num_left in (3, 2, 1):
            manager.pool.allocate()
            assert len(manager.match(make_sequence([*range(16), 0])).blocks) == num_left


def test_a_part_of_a_block_is_copied() -> None:
    """The radix tree finds the first tokens of a block as well."""
    manager = make_manager()
    run_whole(manager, first := make_sequence(list(range(12))))
    manager.free(first)
    second = make_sequence([*range(6), 70, 71, 72])
    assert run_whole(manager, second) == 6
    [copy] = manager.take_copies()
    assert copy.num_slots == 2
    assert manager.get_num_computed_tokens(make_sequence(list(range(12)))) == 11, "what was copied is as it was"
