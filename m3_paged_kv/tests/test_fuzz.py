"""F3.5, F3.6, F3.8: arrivals, lengths, forks, aborts, priorities, tiny pools, preemption and swap, in any mixture.

The run always ends, every output equals that of an engine with room for all, and at every step the blocks that are
free and those that are held make up the pool. Tokens are really drawn: each by a number that hangs on seed, output and
position alone, so whoever was sent away and came back draws the same. Other batch shapes round another way, so two
runs may part, but only where the number lies on the boundary between two tokens.
"""
from __future__ import annotations

import dataclasses
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from m0_basics.attention import FullAttention
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Request, Sequence, SequenceData, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams, SamplingType
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import all_logits
from m1_offline.sampler import distribution, uniform
from m2_continuous_batching.plugins import SchedulerPlugin, StepStats
from m2_continuous_batching.policies import SchedulingParams
from m2_continuous_batching.scheduler import Scheduler
from m3_paged_kv import LLM
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager

LONGEST = 48
MOST_STEPS = 3000
MOST_TOKENS = 2048
SHAPES = [(48, 1), (25, 2), (16, 3), (12, 4), (11, 5), (8, 6), (8, 7), (6, 8)]      # blocks, tokens in each
POLICIES = ["fcfs", "priority", "ageing:0.01", "sjf", "round-robin:3", "round-robin:1"]
TIE, EDGE = 1e-4, 1e-5              # between logits that rounding may swap; around a boundary between two tokens


class Auditor(SchedulerPlugin):
    """Checks the books after every step, and forks outputs in the middle, as beams do."""

    def __init__(self) -> None:
        self.forks: dict[str, int] = {}         # request id -> fork the first output when it has so many tokens
        self.preemptions = 0
        self.swapped_at_most = 0

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        self._fork(scheduler)
        manager = scheduler.kv_cache_manager
        assert isinstance(manager, PagedKVCacheManager)
        held = Counter(b for e in scheduler.running for b in manager.tables[e.sequence])
        pinned = Counter(b for s in manager.swapped._holdings.values() for place, b in s.blocks if place == "device")
        assert all(manager.pool.ref_count(b) == held[b] + pinned[b] for b in range(manager.pool.num_blocks))
        assert manager.pool.num_free + len(held | pinned) == manager.pool.num_blocks
        assert {e.sequence.seq_id for e in scheduler.running} == set(manager.tables._tables)
        self.preemptions += stats.num_preempted
        self.swapped_at_most = max(self.swapped_at_most, len(manager.swapped))

    def _fork(self, scheduler: Scheduler) -> None:
        for request in {e.request for e in scheduler.running}:
            parent = request.sequences[0]
            if parent.status is SequenceStatus.RUNNING and (
                    len(parent.output_token_ids) == self.forks.get(request.request_id)):
                del self.forks[request.request_id]
                child = parent.fork(next_seq_id(), len(request.sequences))
                request.sequences.append(child)
                scheduler.queues.fork(parent, child)


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """One request: when it comes, how long it is, how many outputs and how they are drawn, how urgent, when aborted."""
    prompt = draw(st.lists(st.integers(5, 250), min_size=1, max_size=24))
    temperature = draw(st.sampled_from([0.0, 0.7, 1.0, 1.5]))
    n = draw(st.integers(1, 4)) if temperature else 1
    return {"prompt": prompt, "output": draw(st.integers(1, LONGEST - 1 - len(prompt))), "n": n,
            "best_of": n + draw(st.integers(0, 2)) if temperature else 1, "temperature": temperature,
            "top_p": draw(st.sampled_from([1.0, 0.9, 0.5])), "top_k": draw(st.sampled_from([0, 1, 5])),
            "seed": draw(st.integers(0, 2**32)), "fork": draw(st.none() | st.integers(2, 12)),
            "arrival": draw(st.integers(0, 12)), "priority": draw(st.integers(0, 2)),
            "abort": draw(st.none() | st.none() | st.integers(0, 30))}


def request_of(llm: LLM, job: dict[str, Any]) -> Request:
    names = ("n", "best_of", "temperature", "top_p", "top_k", "seed")
    params = SamplingParams(**{name: job[name] for name in names}, max_tokens=job["output"], ignore_eos=True)
    return llm.input_processor.process({"prompt_token_ids": job["prompt"]}, params)


def serve(engine: tuple[LLM, Auditor], work: list[dict[str, Any]],
          token_budget: int = MOST_TOKENS) -> list[list[list[int]] | None]:
    """Run the jobs; return each one's outputs in the order of their index, None for those that were aborted."""
    llm, auditor = engine
    llm.engine.scheduler.token_budget = token_budget
    requests = [request_of(llm, job) for job in work]
    auditor.forks = {request.request_id: job["fork"] for job, request in zip(work, requests, strict=True)
                     if job["fork"] is not None and job["fork"] < job["output"]}
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
              async_scheduling=async_scheduling, max_num_batched_tokens=MOST_TOKENS)
    return llm, auditor


def may_draw(logits: torch.Tensor, params: SamplingParams, number: float, token: int) -> bool:
    """Whether `number` leads to `token` under logits [V], give or take the rounding of another batch shape."""
    if params.sampling_type is SamplingType.GREEDY:
        return bool(logits[token] > logits.max() - TIE)
    if params.top_k or params.top_p < 1:            # in order of their logits; equals may change places
        before, equal = logits > logits[token] + TIE, (logits - logits[token]).abs() <= TIE
    else:
        ids = torch.arange(len(logits))
        before, equal = ids < token, ids == token
    for top_p in {params.top_p} | ({params.top_p - EDGE, params.top_p + EDGE} if params.top_p < 1 else set()):
        probabilities = distribution(logits, dataclasses.replace(params, top_p=top_p))
        low, own = float(probabilities[before].sum()), float(probabilities[equal].sum())
        if own > 0 and low - EDGE <= number <= low + own + EDGE:
            return True
    return False


def test_the_oracle_by_hand() -> None:
    """Four equal tokens: quarters of the number line. Only a number at an end of a quarter leads to two of them."""
    logits, params = torch.zeros(4), SamplingParams(temperature=1.0)

    def reached(number: float, params: SamplingParams = params) -> list[int]:
        return [token for token in range(4) if may_draw(logits, params, number, token)]

    assert [reached(number) for number in (0.6, 0.5, 0.50002, 0.0)] == [[2], [1, 2], [2], [0]]
    logits = torch.tensor([0.0, 2.0, 1.0, -9.0])           # 0.0900, 0.6652, 0.2447, 0.0000
    assert [reached(number) for number in (0.08, 0.1, 0.8)] == [[0], [1], [2]], "in order of their ids"
    nucleus = SamplingParams(temperature=1.0, top_p=0.8)     # 1 and 2, in this order: 0.7311, 0.2689
    assert [reached(number, nucleus) for number in (0.08, 0.73, 0.74)] == [[1], [1], [2]]
    assert [reached(number, SamplingParams(temperature=0)) for number in (0.1, 0.9)] == [[1], [1]]


def assert_same_but_for_rounding(llm: LLM, request: Request, ours: list[list[int]], theirs: list[list[int]]) -> None:
    """The same tokens; or else, from one prefix, two that the number may both have led to."""
    assert [len(ids) for ids in ours] == [len(ids) for ids in theirs]
    for index, (got, expected) in enumerate(zip(ours, theirs, strict=True)):
        parting = next((i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if a != b), None)
        if parting is not None:
            prompt, params = request.prompt_token_ids, request.sampling_params
            sequence = Sequence(0, SequenceData(prompt, expected[:parting]), params, request.seed, index=index)
            runner = ModelRunner(llm.engine.runner.model, FullAttention())
            logits = all_logits(runner, [prompt + expected[:parting]])[0][-1]
            for ids in (got, expected):
                assert may_draw(logits, params, uniform(sequence), ids[parting]), (index, parting, got, expected)


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(work=st.lists(jobs(), min_size=1, max_size=6), policy=st.sampled_from(POLICIES), shape=st.sampled_from(SHAPES),
       swap=st.sampled_from([0.0, 0.00002, 0.01]), places=st.sampled_from([2, 5, 16]), ahead=st.booleans(),
       token_budget=st.sampled_from([MOST_TOKENS, 4, 1]))
def test_tiny_pools_change_no_token(tiny_model: TinyModels, work: list[dict[str, Any]], policy: str,
                                    shape: tuple[int, int], swap: float, places: int, ahead: bool,
                                    token_budget: int) -> None:
    folder = str(tiny_model("qwen3"))
    roomy = engine(folder, "fcfs", 512, 16, 0.0, 64, False)
    tight = engine(folder, policy, *shape, swap, places, ahead)
    expected = serve(roomy, [job | {"abort": None} for job in work])
    got = serve(tight, work, token_budget)
    for job, ours, theirs in zip(work, got, expected, strict=True):
        assert theirs is not None
        if ours is None:
            assert job["abort"] is not None
        else:
            assert_same_but_for_rounding(roomy[0], request_of(roomy[0], job), ours, theirs)
    manager = tight[0].manager
    assert (manager.usage, len(manager.swapped), manager.swapped.host_pool.num_used) == (0.0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize(("swap_space", "swaps"), [(0.0, False), (0.01, True)])
def test_the_pools_are_tiny_enough(tiny_model: TinyModels, swap_space: float, swaps: bool) -> None:
    """The fuzz test means something: sequences do give way, and are swapped where there is room for them."""
    tight = llm, auditor = engine(str(tiny_model("qwen3")), "fcfs", 12, 4, swap_space, 16, False)
    before = auditor.preemptions
    job = {"prompt": [7] * 8, "output": 30, "n": 3, "best_of": 3, "temperature": 1.0, "top_p": 0.9, "top_k": 0,
           "seed": 1, "fork": 5, "arrival": 0, "priority": 0, "abort": None}
    outputs = serve(tight, [job for _ in range(4)])
    assert all(len(o) == 4 and len({tuple(ids) for ids in o}) == 4 for o in outputs), "forks part, drawn as they are"
    assert all(o[3][:5] == o[0][:5] for o in outputs), "the fourth was forked off the first in the middle"
    assert not llm.engine.has_unfinished_requests()
    assert auditor.preemptions > before
    assert (auditor.swapped_at_most > 0) == swaps
