"""F6.8: who has most in the cache goes first, nobody starves, and what the queue wants is evicted last."""
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.request import Request
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.policies import QueuedSequence, SchedulingParams
from m6_prefix_cache import LLM
from m6_prefix_cache.policy import LongestMatchPolicy, QueueWatch

BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "block_size": 8, "num_blocks": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)


def waiting(policy: LongestMatchPolicy, num_tokens: int, num_ready: int = 0, work_before: int = 0,
            number: int = 0) -> QueuedSequence:
    request = Request(str(number), None, [5] * num_tokens, SamplingParams())
    request.metrics.arrival_time = float(number)
    policy.num_ready[request.sequences[0].seq_id] = num_ready
    return QueuedSequence(request.sequences[0], request, SchedulingParams(), work_before)


def test_the_order() -> None:
    """What is found first, then what is short, then who came first."""
    policy = LongestMatchPolicy()
    entries = {"whole": waiting(policy, 100), "half": waiting(policy, 100, 50), "nearly all": waiting(policy, 100, 95),
               "short": waiting(policy, 20), "later": waiting(policy, 100, number=1)}
    order = sorted(entries, key=lambda name: policy.key(entries[name]))
    assert order == ["nearly all", "half", "short", "whole", "later"]


@given(num_tokens=st.integers(1, 200), others=st.lists(st.tuples(st.integers(1, 200), st.floats(0, 1)), max_size=200),
       patience=st.floats(0.5, 20))
def test_nobody_starves(num_tokens: int, others: list[tuple[int, float]], patience: float) -> None:
    """It is overtaken by work of at most patience * (its tokens + what others find), whoever keeps arriving."""
    policy, work = LongestMatchPolicy(patience), 0
    me = waiting(policy, num_tokens)
    for number, (length, share) in enumerate(others):
        ready = int(share * (length - 1))
        other = waiting(policy, length, ready, work_before=work, number=number + 1)
        if policy.key(other) < policy.key(me):
            assert work <= patience * (num_tokens + ready)
        work += length - ready


def test_in_the_engine_those_who_find_something_go_first(tiny_model: TinyModels) -> None:
    """One place at a time. Two of those who wait find what the first one has computed: they come before the others."""
    llm = LLM(str(tiny_model("qwen3")), max_num_seqs=1, **BASE)
    shared = list(range(20, 52))
    prompts = [[*shared, 60], [70 + i for i in range(30)], [*shared, 61], [120 - i for i in range(30)], [*shared, 62]]
    llm.generate([{"prompt_token_ids": [*shared, 63]}], GREEDY, use_tqdm=False)
    ended = list[str]()
    engine, ids = engine_of(llm), []
    for prompt in prompts:
        request = llm.input_processor.process({"prompt_token_ids": prompt}, GREEDY)
        ids.append(request.request_id)
        engine.add_request(request)
    while engine.has_unfinished_requests():
        ended += [output.request_id for output in engine.step() if output.finished]
    assert [ids.index(i) for i in ended] == [0, 2, 4, 1, 3]


def test_while_nobody_joins_it_looks_now_and_then(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long queue behind full places costs next to nothing."""
    llm = LLM(str(tiny_model("qwen3")), max_num_seqs=1, **BASE)
    watch = next(p for p in engine_of(llm).plugins if isinstance(p, QueueWatch))
    looks, look = list[int](), watch._look
    monkeypatch.setattr(watch, "_look", lambda queue: looks.append(len(queue)) or look(queue))
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [8, 9]}], long, use_tqdm=False)
    assert 2 <= len(looks) < 12


def test_what_the_queue_wants_is_evicted_last(tiny_model: TinyModels) -> None:
    """The older text is wanted by one that waits; the newer one goes, although it was used last."""
    llm = LLM(str(tiny_model("qwen3")), **BASE | {"num_blocks": 16, "max_num_seqs": 1}, swap_space=0)
    old, new, other = ([first + i for i in range(32)] for first in (10, 50, 90))
    for prompt in (old, new):
        llm.generate([{"prompt_token_ids": prompt}], GREEDY, use_tqdm=False)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    first, second = llm.generate([{"prompt_token_ids": other}, {"prompt_token_ids": [*old, 5]}],
                                 [params, GREEDY], use_tqdm=False)
    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
