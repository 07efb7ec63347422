"""The scheduler by hand: examples small enough to work out on paper, one policy after the other."""
from __future__ import annotations

from itertools import pairwise

import pytest

from m0_basics.config import ConfigError
from m0_basics.request import SequenceStatus
from m2_continuous_batching.policies import SchedulingParams, make_policy
from m2_continuous_batching.queues import TIME_LIMIT
from m2_continuous_batching.tests.fake_loop import MAX_MODEL_LEN, loop_of, make_request, who


class TestSteps:
    """F2.1, F2.2."""

    def test_join_and_leave(self) -> None:
        """The example of the module's docstring: b joins while a decodes, and neither waits for the other's end."""
        loop = loop_of()
        a = loop.add(make_request(5, 4))
        assert who(loop.step(), a) == {"a": 5}
        assert who(loop.step(), a) == {"a": 1}
        b = loop.add(make_request(3, 2))
        assert who(loop.step(), a, b) == {"b": 3}
        assert who(loop.step(), a, b) == {"a": 1, "b": 1}
        assert b.is_finished
        assert who(loop.step(), a, b) == {"a": 1}
        assert a.is_finished
        assert not loop.step().scheduled

    def test_never_two_prefills_while_others_decode(self) -> None:
        loop = loop_of(rows=4, tokens=MAX_MODEL_LEN)
        requests = [loop.add(make_request(20, 4)) for _ in range(3)]        # no two prompts fit into one step
        steps = [who(loop.step(), *requests) for _ in range(5)]
        assert steps == [{"a": 20}, {"a": 1}, {"b": 20}, {"a": 1, "b": 1}, {"c": 20}]

    def test_prompts_share_a_step_up_to_the_budget_and_nobody_overtakes(self) -> None:
        loop = loop_of(rows=4)
        requests = [loop.add(make_request(n, 2)) for n in (10, 10, 5, 4)]
        assert who(loop.step(), *requests) == {"a": 10, "b": 10}            # d would fit, but c is before it
        loop.step()
        assert who(loop.step(), *requests) == {"c": 5, "d": 4}

    def test_max_num_seqs(self) -> None:
        loop = loop_of(rows=2)
        requests = [loop.add(make_request(2, 3)) for _ in range(3)]
        assert [who(loop.step(), *requests) for _ in range(4)] == [
            {"a": 2, "b": 2}, {"a": 1, "b": 1}, {"a": 1, "b": 1}, {"c": 2}]

    def test_soft_budget_does_not_lock_out_a_long_prompt(self) -> None:
        loop = loop_of(rows=4)
        requests = [loop.add(make_request(n, 2)) for n in (12, 2)]
        loop.scheduler.token_budget = 3
        assert who(loop.step(), *requests) == {"a": 12}
        assert who(loop.step(), *requests) == {"a": 1}
        assert who(loop.step(), *requests) == {"b": 2}

    def test_small_budget_takes_decodes_in_turns(self) -> None:
        loop = loop_of(rows=3)
        requests = [loop.add(make_request(1, 12)) for _ in range(3)]
        loop.step()
        loop.scheduler.token_budget = 2
        got = [set(who(loop.step(), *requests)) for _ in range(10)]
        # Who was left out goes first; between the other two, which ran last time, the policy decides.
        assert got[:5] == [{"a", "b"}, {"a", "c"}, {"a", "b"}, {"a", "c"}, {"a", "b"}]
        assert all(one | other == {"a", "b", "c"} for one, other in pairwise(got))

    @pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
    def test_bad_token_budget(self, value: object) -> None:
        with pytest.raises(ConfigError, match=r"token_budget=.* is not valid; allowed: an integer >= 1"):
            loop_of().scheduler.token_budget = value

    def test_the_tail_is_preempted_and_recomputed_whole(self) -> None:
        """F2.6. 24 slots; after six steps of decoding two prompts of 6 hold 24, and a's next token takes b's place."""
        loop = loop_of(slots=24)
        a, b = (loop.add(make_request(6, 10)) for _ in range(2))
        assert who(loop.step(), a, b) == {"a": 6, "b": 6}
        for _ in range(6):
            assert who(loop.step(), a, b) == {"a": 1, "b": 1}
        output = loop.step()
        assert who(output, a, b) == {"a": 1}
        assert output.preempted == b.sequences
        assert (b.sequences[0].status, b.sequences[0].num_computed_tokens) == (SequenceStatus.WAITING, 0)
        assert b.sequences[0].num_tokens == 13, "a preempted sequence keeps its tokens"
        assert who(loop.step(), a, b) == {"a": 1}
        assert who(loop.step(), a, b) == {"a": 1}
        assert a.is_finished
        assert who(loop.step(), a, b) == {"b": 13}
        assert who(loop.step(), a, b) == {"b": 1}
        loop.run(10)
        assert len(b.sequences[0].output_token_ids) == 10

    @pytest.mark.parametrize(("slots", "victim_next"), [(7, "b"), (8, "a")])
    def test_a_small_budget_protects_the_most_urgent(self, slots: int, victim_next: str) -> None:
        """F2.7: one token a step, in turns. Whoever's turn it is, it is the least urgent that gives way: c.

        In seven slots they run out when it is b's turn, in eight when it is c's own: then the next one runs instead.
        """
        loop = loop_of("priority", rows=3, slots=slots)
        a, b, c = (loop.add(make_request(2, 4), SchedulingParams(priority=i)) for i in range(3))
        assert who(loop.step(), a, b, c) == {"a": 2, "b": 2, "c": 2}
        loop.scheduler.token_budget = 1
        for turn in "ab"[:slots - 6]:
            assert who(loop.step(), a, b, c) == {turn: 1}
        output = loop.step()
        assert (who(output, a, b, c), output.preempted) == ({victim_next: 1}, c.sequences)
        loop.run()
        assert all(len(request.sequences[0].output_token_ids) == 4 for request in (a, b, c))

    def test_a_sequence_without_room_preempts_itself_last(self) -> None:
        """The victims come from the tail one by one; the one in front needs them all."""
        loop = loop_of(rows=3, slots=24)
        requests = [loop.add(make_request(7, 12)) for _ in range(3)]
        loop.step()
        assert who(loop.step(), *requests) == {"a": 1, "b": 1, "c": 1}
        output = loop.step()
        assert who(output, *requests) == {"a": 1, "b": 1}
        assert output.preempted == requests[2].sequences

    def test_outputs_part_after_the_prompt(self) -> None:
        """n outputs run the prompt once where there is room; what finds none is computed on its own later."""
        loop = loop_of(rows=2)
        request = loop.add(make_request(5, 3, n=3))
        assert who(loop.step(), request) == {"a": 5}
        first, second, third = request.sequences
        assert [s.status.name for s in request.sequences] == ["RUNNING", "RUNNING", "WAITING"]
        assert [s.num_computed_tokens for s in request.sequences] == [5, 5, 0]
        assert [c.num_slots for c in loop.scheduler.kv_cache_manager._copies] == [5]
        output = loop.step()
        assert [(s.sequence, s.num_tokens) for s in output.scheduled] == [(first, 1), (second, 1)]
        assert len(output.copies) == 1
        loop.step()
        assert [(s.sequence, s.num_tokens) for s in loop.step().scheduled] == [(third, 5)]
        assert loop.run(5) == 2
        assert request.is_finished


class TestPolicies:
    """F2.5."""

    def test_priority_goes_first_and_displaces(self) -> None:
        loop = loop_of("priority", rows=1)
        low, lower = (loop.add(make_request(4, 5), SchedulingParams(priority=p)) for p in (1, 2))
        loop.step()
        high = loop.add(make_request(3, 2), SchedulingParams(priority=-1))
        assert who(loop.step(), low, lower, high) == {"a": 1}           # the step after a prefill decodes
        output = loop.step()
        assert who(output, low, lower, high) == {"c": 3}
        assert output.preempted == low.sequences
        assert who(loop.step(), low, lower, high) == {"c": 1}
        assert who(loop.step(), low, lower, high) == {"a": 6}           # 4 and the 2 that it had
        loop.run(50)
        assert loop.admitted == [r.request_id for r in (low, high, lower)]

    def test_equal_priorities_do_not_displace(self) -> None:
        loop = loop_of("priority", rows=1)
        a, b = (loop.add(make_request(2, 4), SchedulingParams(priority=1)) for _ in range(2))
        for _ in range(4):
            loop.step()
        assert a.is_finished
        assert not b.sequences[0].output_token_ids

    def test_the_least_urgent_is_displaced(self) -> None:
        loop = loop_of("priority", rows=3)
        a, b, c = (loop.add(make_request(2, 9), SchedulingParams(priority=p)) for p in (1, 3, 2))
        loop.step()
        d = loop.add(make_request(2, 9), SchedulingParams(priority=0))
        loop.step()
        output = loop.step()
        assert (who(output, a, b, c, d), output.preempted) == ({"d": 2}, b.sequences)

    def test_nobody_leaves_for_a_newcomer_who_does_not_fit_even_so(self) -> None:
        """F3.8. 24 slots: a (urgent) holds 15, b 4; c would need 10 and gets b's 4 and the 5 that are free at most."""
        loop = loop_of("priority", rows=4, slots=24)
        a, b = (loop.add(make_request(n, 5), SchedulingParams(priority=p)) for n, p in ((14, 0), (3, 2)))
        loop.step()
        c = loop.add(make_request(10, 2), SchedulingParams(priority=1))
        loop.step()
        output = loop.step()
        assert (who(output, a, b, c), output.preempted) == ({"a": 1, "b": 1}, [])
        loop.run(50)
        assert all(r.is_finished for r in (a, b, c))

    def test_no_more_leave_than_have_to(self) -> None:
        """24 slots: three hold 5 each; a newcomer of 14 gets the 9 that are free and those of the least urgent."""
        loop = loop_of("priority", rows=4, slots=24)
        a, b, c = (loop.add(make_request(4, 5), SchedulingParams(priority=p)) for p in (1, 3, 2))
        loop.step()
        d = loop.add(make_request(14, 2), SchedulingParams(priority=0))
        loop.step()
        output = loop.step()
        assert (who(output, a, b, c, d), output.preempted) == ({"d": 14}, b.sequences)

    def test_ageing_orders_by_priority_less_what_waiting_is_worth(self) -> None:
        """The constant key orders as priority - waited / interval does, at any time after the arrivals."""
        loop = loop_of("ageing:5", rows=1)
        arrivals = [(0.0, 3), (1.0, 0), (4.0, 2), (9.0, 1), (9.0, 0), (16.0, 0)]
        requests = [loop.add(make_request(1, 1, t), SchedulingParams(priority=p)) for t, p in arrivals]
        got = [requests.index(e.request) for e in loop.scheduler.waiting]
        for now in (16.0, 20.0, 100.0):
            assert got == sorted(range(6), key=lambda i: (arrivals[i][1] - (now - arrivals[i][0]) / 5, arrivals[i][0]))
        assert got == [1, 4, 2, 3, 0, 5]

    def test_an_aged_request_is_not_displaced(self) -> None:
        loop = loop_of("ageing:5", rows=1)
        old = loop.add(make_request(1, 8, arrival=0), SchedulingParams(priority=1))
        loop.step()
        late = loop.add(make_request(1, 1, arrival=6), SchedulingParams(priority=0))     # old has aged by more than 1
        loop.step()
        assert not loop.step().preempted
        soon = loop.add(make_request(1, 1, arrival=4), SchedulingParams(priority=0))     # as if it had come before
        output = loop.step()
        assert who(output, old, late, soon) == {"c": 1}
        assert output.preempted == old.sequences

    def test_shortest_job_first(self) -> None:
        """By prompt and max_tokens: 12, 7, 9, unknown, 7 (the later of two equals)."""
        loop = loop_of("sjf", rows=1)
        jobs = [(2, 10), (5, 2), (1, 8), (1, None), (3, 4)]
        requests = [loop.add(make_request(p, m, arrival=i)) for i, (p, m) in enumerate(jobs)]
        loop.run(100)
        assert loop.admitted == [requests[i].request_id for i in (1, 4, 2, 0, 3)]

    @pytest.mark.parametrize(("patience", "order"), [(1, [0, 1, 2, 3]), (2, [0, 2, 1, 3])])
    def test_shortest_first(self, patience: int, order: list[int]) -> None:
        """What ran before it came, and `patience` times its tokens: 2 + 10 p, 3 + 9 p, 4 + 9 p."""
        loop = loop_of(f"shortest-first:{patience}", rows=1)
        requests = [loop.add(make_request(2, 3, arrival=0))]
        for i, length in enumerate((10, 9, 9), start=1):
            loop.step()
            requests.append(loop.add(make_request(length, 1, arrival=i)))
        loop.run(100)
        assert loop.admitted == [requests[i].request_id for i in order]

    @pytest.mark.parametrize("text", ["shortest-first:0", "shortest-first:x", "shortest-first:inf"])
    def test_patience_is_a_number_above_0(self, text: str) -> None:
        with pytest.raises(ConfigError, match="shortest-first:PATIENCE"):
            make_policy(text)

    def test_round_robin(self) -> None:
        """Quantum 2: the prompt's token and one more, then to the end of the queue, and recomputed."""
        loop = loop_of("round-robin:2", rows=1)
        requests = [loop.add(make_request(3, 4)) for _ in range(2)]
        steps = [who(loop.step(), *requests) for _ in range(8)]
        assert steps == [{"a": 3}, {"a": 1}, {"b": 3}, {"b": 1}, {"a": 5}, {"a": 1}, {"b": 5}, {"b": 1}]
        assert all(r.is_finished for r in requests)

    def test_round_robin_alone_is_not_interrupted(self) -> None:
        loop = loop_of("round-robin:1", rows=1)
        loop.add(make_request(3, 6))
        assert loop.run(6) == 6

    def test_sla_keeps_rows_free(self) -> None:
        """Four rows, half of them interactive's: batch gets two, and interactive can have all four."""
        loop = loop_of("sla:interactive=0.5,batch=0", rows=4)
        batch = [loop.add(make_request(1, 9), SchedulingParams(sla_class="batch")) for _ in range(3)]
        assert who(loop.step(), *batch) == {"a": 1, "b": 1}
        loop.step()
        assert who(loop.step(), *batch) == {"a": 1, "b": 1}, "two rows stay free for the other class"
        fast = [loop.add(make_request(1, 9), SchedulingParams(sla_class="interactive")) for _ in range(3)]
        assert who(loop.step(), *fast) == {"a": 1, "b": 1}
        assert len(loop.scheduler.running) == 4

    def test_sla_outputs_that_part_respect_what_is_reserved(self) -> None:
        loop = loop_of("sla:interactive=0.5,batch=0", rows=4)
        request = loop.add(make_request(2, 4, n=4))             # of the last class, as it names none
        loop.step()
        assert [s.status.name for s in request.sequences] == ["RUNNING", "RUNNING", "WAITING", "WAITING"]
        loop.run(20)
        assert request.is_finished

    def test_sla_keeps_tokens_free(self) -> None:
        """Of 20 tokens 10 are interactive's: batch's second prompt would take the step past the other half."""
        loop = loop_of("sla:interactive=0.5,batch=0", rows=8, tokens=24)
        loop.scheduler.token_budget = 20
        params = SchedulingParams(sla_class="batch")
        batch = [loop.add(make_request(6, 2), params) for _ in range(2)]
        assert who(loop.step(), *batch) == {"a": 6}
        loop.step()
        fast = loop.add(make_request(8, 2), SchedulingParams(sla_class="interactive"))
        assert who(loop.step(), fast, *batch) == {"a": 8, "c": 6}, "what interactive has used is not kept again"

    def test_sla_a_full_class_does_not_hold_up_another(self) -> None:
        """Half of the rows is batch's. However long interactive's queue is, batch gets it."""
        loop = loop_of("sla:interactive=0,batch=0.5", rows=4)
        fast = [loop.add(make_request(1, 9), SchedulingParams(sla_class="interactive")) for _ in range(4)]
        batch = loop.add(make_request(1, 2), SchedulingParams(sla_class="batch"))
        assert who(loop.step(), *fast, batch) == {"a": 1, "b": 1, "e": 1}

    def test_sla_a_full_cache_holds_up_everybody(self) -> None:
        """A reserved share is no way around a longer prompt that waits for the cache: it would starve."""
        loop = loop_of("sla:interactive=0.25,batch=0.25", rows=4, tokens=48, slots=26)
        fast, long = (loop.add(make_request(n, 4), SchedulingParams(sla_class="interactive")) for n in (6, 21))
        small = loop.add(make_request(1, 2), SchedulingParams(sla_class="batch"))
        assert who(loop.step(), fast, long, small) == {"a": 6}


class TestEndings:
    """F2.7."""

    def test_time_limit(self) -> None:
        loop = loop_of(rows=1)
        a, b = (loop.add(make_request(2, 20), SchedulingParams(timeout_s=t)) for t in (5.0, 3.0))
        c = loop.add(make_request(2, 2))
        loop.step()
        loop.now = 3.0
        assert not loop.step().expired, "the limit itself is still in time"
        loop.now = 3.5
        assert loop.step().expired == [b]           # waiting
        loop.now = 6.0
        output = loop.step()
        assert output.expired == [a]                # running: its row goes to c in the same step
        assert who(output, a, b, c) == {"c": 2}
        assert [r.sequences[0].stop_reason for r in (a, b, c)] == [TIME_LIMIT, TIME_LIMIT, None]
        assert a.sequences[0].status is SequenceStatus.FINISHED_ABORTED
        loop.run(2)
        assert loop.manager.usage == 0

    def test_only_time_limits_are_looked_at(self) -> None:
        """However many wait: a step without limits compares no clock."""
        loop = loop_of(rows=1)
        requests = [loop.add(make_request(2, 2), SchedulingParams(timeout_s=t)) for t in (None, 9.0, None)]
        assert list(loop.scheduler.queues._deadlines.values()) == [9.0]
        loop.scheduler.queues.abort(requests[1].request_id)
        assert not loop.scheduler.queues._deadlines
        loop.now = 10.0
        assert not loop.step().expired

    def test_an_output_that_has_ended_keeps_its_reason(self) -> None:
        loop = loop_of(rows=1)
        request = loop.add(make_request(2, 2, n=2), SchedulingParams(timeout_s=3.0))
        loop.step()
        loop.step()
        loop.now = 4.0
        assert loop.step().expired == [request]
        assert [s.status.finish_reason for s in request.sequences] == ["length", "abort"]
        assert [s.stop_reason for s in request.sequences] == [None, TIME_LIMIT]

    def test_duplicate_id(self) -> None:
        loop = loop_of()
        request = loop.add(make_request(2, 4))
        with pytest.raises(ConfigError, match=f"request_id='{request.request_id}' is not valid; allowed: an id"):
            loop.scheduler.queues.add(request, SchedulingParams())
        assert len(loop.scheduler.waiting) == 1
        loop.run(10)
        again = make_request(2, 1)
        again.request_id = request.request_id       # it is free again
        loop.add(again)
        loop.run(2)
        assert again.is_finished

    def test_what_can_never_run_is_refused(self) -> None:
        """A prompt runs whole, and so does a request that is recomputed: with all but its last token at once."""
        with pytest.raises(ConfigError, match=r"max_num_batched_tokens=23 is not valid; allowed: at least "
                                              r"max_model_len=24 \(prompts run whole\)"):
            loop_of(tokens=MAX_MODEL_LEN - 1)
        loop = loop_of(slots=10)
        loop.add(make_request(6, 5))                # 10 tokens: fits exactly
        with pytest.raises(ConfigError, match=r"may need 11 tokens of KV cache.*allowed: a shorter prompt"):
            loop.add(make_request(6, 6))
        with pytest.raises(ConfigError, match="may need 23 tokens of KV cache"):
            loop.add(make_request(1, None))         # no max_tokens: up to the longest length
        with pytest.raises(ConfigError, match=r"sla_class='a' is not valid; allowed: None, except under the sla"):
            loop.add(make_request(1, 1), SchedulingParams(sla_class="a"))
        assert len(loop.scheduler.waiting) == 1
        assert loop.run(5) == 5
