"""F3.5, F3.6, F3.8: arrivals, lengths, forks, aborts, priorities, tiny pools, preemption and swap, in any mixture.

The run always ends, every output equals that of an engine with room for all, and at every step the blocks that are
free and those that are held make up the pool.
"""
from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m0_basics.attention import FullAttention
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams
from m0_basics.testing.fixtures import TinyModels
from m0_basics.testing.parity import all_logits
from m2_continuous_batching.plugins import SchedulerPlugin, StepStats
from m2_continuous_batching.policies import SchedulingParams
from m2_continuous_batching.scheduler import Scheduler
from m3_paged_kv import LLM
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager

LONGEST = 48
MOST_STEPS = 3000


class Auditor(SchedulerPlugin):
    """Checks the books after every step."""

    def __init__(self) -> None:
        self.preemptions = 0
        self.swapped_at_most = 0

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        manager = scheduler.kv_cache_manager
        assert isinstance(manager, PagedKVCacheManager)
        held = Counter(b for e in scheduler.running for b in manager.block_table(e.sequence))
        pinned = Counter(b for s in manager._swapped.values() for place, b in s.blocks if place == "device")
        assert all(manager.pool.ref_count(b) == held[b] + pinned[b] for b in range(manager.pool.num_blocks))
        assert manager.pool.num_free + len(held | pinned) == manager.pool.num_blocks
        assert {e.sequence.seq_id for e in scheduler.running} == set(manager._tables)
        self.preemptions += stats.num_preempted
        self.swapped_at_most = max(self.swapped_at_most, manager.num_swapped)


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """One request: when it comes, how long it is, how many outputs, how urgent, and when it is aborted, if at all."""
    prompt = draw(st.lists(st.integers(5, 250), min_size=1, max_size=24))
    return {"prompt": prompt, "output": draw(st.integers(1, LONGEST - 1 - len(prompt))), "n": draw(st.integers(1, 4)),
            "arrival": draw(st.integers(0, 12)), "priority": draw(st.integers(0, 2)),
            "abort": draw(st.none() | st.none() | st.integers(0, 30))}


def request_of(llm: LLM, job: dict[str, Any]) -> Request:
    # The most probable token, by way of the sampler: greedy requests have one output only.
    params = SamplingParams(temperature=1.0, top_k=1, n=job["n"], max_tokens=job["output"], ignore_eos=True)
    return llm.input_processor.process({"prompt_token_ids": job["prompt"]}, params)


def serve(llm: LLM, work: list[dict[str, Any]]) -> list[list[list[int]] | None]:
    """Run the jobs; return each one's outputs, None for those that were aborted."""
    requests = [request_of(llm, job) for job in work]
    for step in range(MOST_STEPS):
        for job, request in zip(work, requests, strict=True):
            if job["arrival"] == step:
                llm.engine.add_request(request, SchedulingParams(priority=job["priority"]))
            if job["abort"] is not None and job["arrival"] + job["abort"] == step:
                llm.engine.abort_request(request.request_id)
        if step > 50 and not llm.engine.has_unfinished_requests():
            break
        llm.engine.step()
    assert not llm.engine.has_unfinished_requests(), "it never ends"
    return [None if any(s.status.finish_reason == "abort" for s in request.sequences)
            else [s.output_token_ids for s in request.sequences] for request in requests]


@cache
def engine(folder: str, policy: str, num_blocks: int, block_size: int, swap_space: float, max_num_seqs: int,
           async_scheduling: bool) -> tuple[LLM, Auditor]:
    """Engines are kept: a test that leaves something behind spoils the next."""
    auditor = Auditor()
    llm = LLM(folder, plugins=[auditor], dtype="float32", max_model_len=LONGEST, policy=policy, num_blocks=num_blocks,
              block_size=block_size, swap_space=swap_space, max_num_seqs=max_num_seqs, skip_tokenizer_init=True,
              async_scheduling=async_scheduling)
    return llm, auditor


def assert_same_or_tied(llm: LLM, prompt: list[int], ours: list[int], theirs: list[int]) -> None:
    """The same tokens, or parting where two are equally probable: another batch shape rounds another way."""
    assert len(ours) == len(theirs)
    parting = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
    if parting is not None:
        runner = ModelRunner(llm.engine.runner.model, FullAttention())
        logits = all_logits(runner, [prompt + theirs[:parting]])[0][-1]
        assert abs(logits[ours[parting]] - logits[theirs[parting]]) < 1e-4, (parting, ours, theirs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(work=st.lists(jobs(), min_size=1, max_size=6), policy=st.sampled_from(["fcfs", "priority", "round-robin:3"]),
       shape=st.sampled_from([(12, 4), (16, 3), (6, 8), (48, 1)]), swap=st.sampled_from([0.0, 0.00002, 0.01]),
       places=st.sampled_from([2, 5, 16]), ahead=st.booleans())
def test_tiny_pools_change_no_token(tiny_model: TinyModels, work: list[dict[str, Any]], policy: str,
                                    shape: tuple[int, int], swap: float, places: int, ahead: bool) -> None:
    folder = str(tiny_model("qwen3"))
    roomy, _ = engine(folder, "fcfs", 512, 16, 0.0, 64, False)
    tight, _ = engine(folder, policy, *shape, swap, places, ahead)
    expected = serve(roomy, [job | {"abort": None} for job in work])
    got = serve(tight, work)
    for job, ours, theirs in zip(work, got, expected, strict=True):
        if ours is None or theirs is None:
            assert job["abort"] is not None
            continue
        for got_ids, expected_ids in zip(ours, theirs, strict=True):
            assert_same_or_tied(roomy, job["prompt"], got_ids, expected_ids)
    manager = tight.manager
    assert (manager.usage, manager.num_swapped, manager.host_pool.num_used) == (0.0, 0, 0)


@pytest.mark.parametrize(("swap_space", "swaps"), [(0.0, False), (0.01, True)])
def test_the_pools_are_tiny_enough(tiny_model: TinyModels, swap_space: float, swaps: bool) -> None:
    """The fuzz test means something: sequences do give way, and are swapped where there is room for them."""
    llm, auditor = engine(str(tiny_model("qwen3")), "fcfs", 12, 4, swap_space, 16, False)
    before = auditor.preemptions
    serve(llm, [{"prompt": [7] * 8, "output": 30, "n": 3, "arrival": 0, "priority": 0, "abort": None}
                for _ in range(4)])
    assert auditor.preemptions > before
    assert (auditor.swapped_at_most > 0) == swaps
