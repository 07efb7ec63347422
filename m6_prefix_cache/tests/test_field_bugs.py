"""F6.2 to F6.5, F6.7: what broke in other engines with a prefix cache. Each test names whose fault it was; the inputs
are our own. The right answer is always milestone 5's, which computes every prompt whole. Those that stand beside what
they are about are named there: test_engine.py, test_prefixes_by_hand.py, test_indexes.py, test_server.py."""
from __future__ import annotations

from typing import Any

import pytest

import m5_chunked_prefill as m5
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m2_continuous_batching.plugins.metrics import MetricsCollector
from m6_prefix_cache import LLM
from m6_prefix_cache.block_hash import BlockHasher, HashIndex
from m6_prefix_cache.block_pool import CachedBlockPool
from m6_prefix_cache.kv_cache_manager import PrefixKVCacheManager
from m6_prefix_cache.prefix_stats import PrefixCacheStats

BASE: dict[str, Any] = {"dtype": "float32", "max_model_len": 128, "block_size": 8, "num_blocks": 64}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
PROMPT = list(range(20, 60))


class Lab:
    """This engine with fresh caches, and the one before it."""

    def __init__(self, tiny_model: TinyModels) -> None:
        self.model = str(tiny_model("qwen3"))
        self.plain = m5.LLM(self.model, **BASE)

    def make(self, **options: Any) -> LLM:
        return LLM(self.model, **{**BASE, **options})

    def expected(self, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
        return answers(self.plain, prompts, params)


def answers(llm: Any, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def add(llm: LLM, prompt: list[int], params: SamplingParams = GREEDY) -> str:
    request = llm.input_processor.process({"prompt_token_ids": prompt}, params)
    llm.engine.add_request(request)
    return request.request_id


def drain(llm: LLM) -> dict[str, list[int]]:
    ended: dict[str, list[int]] = {}
    while llm.engine.has_unfinished_requests():
        ended |= {o.request_id: list(o.outputs[0].token_ids) for o in llm.engine.step() if o.finished}
    return ended


def manager_of(llm: LLM) -> PrefixKVCacheManager:
    assert isinstance(llm.manager, PrefixKVCacheManager)
    return llm.manager


def stats_of(llm: LLM) -> PrefixCacheStats:
    return next(p for p in engine_of(llm).plugins if isinstance(p, PrefixCacheStats))


@pytest.fixture(scope="module")
def lab(tiny_model: TinyModels) -> Lab:
    return Lab(tiny_model)


@pytest.mark.parametrize("swap_space", [0, 0.001])
def test_hits_after_a_preemption_stay_within_the_table(lab: Lab, swap_space: float) -> None:
    """nano-vllm#211, #233: the count of cached tokens grew each time that a sequence was allocated anew."""
    collector = MetricsCollector()
    llm = LLM(lab.model, plugins=[collector], **{**BASE, "num_blocks": 16}, swap_space=swap_space)
    prompts = [[*PROMPT[:24], 60 + i] for i in range(6)]
    for _ in range(2):
        assert answers(llm, prompts, LONG) == lab.expected(prompts, LONG)
    assert collector.totals.num_preemptions > 0


@pytest.mark.parametrize("index", ["radix", "hash"])
def test_an_abort_amid_a_prompt_leaves_only_what_was_computed(lab: Lab, index: str) -> None:
    """SGLang#38319, #38355: blocks of a prompt that was given up half way were found, and held nothing."""
    llm = lab.make(max_num_batched_tokens=12, prefix_index=index)
    request_id = add(llm, PROMPT)
    llm.engine.step()
    llm.engine.abort_request(request_id)
    drain(llm)
    [output] = llm.generate([{"prompt_token_ids": PROMPT}], GREEDY, use_tqdm=False)
    assert [list(output.outputs[0].token_ids)] == lab.expected([PROMPT])
    assert output.num_cached_tokens <= 12


def test_an_abort_while_waiting_holds_nothing(lab: Lab) -> None:
    """ByteDance's engine, #508: who was given up before it started kept what it had matched locked."""
    llm = lab.make(max_num_seqs=1)
    answers(llm, [PROMPT])
    add(llm, [1, 2, 3], LONG)
    waiting = [add(llm, [*PROMPT, i]) for i in range(5)]
    for _ in range(3):
        llm.engine.step()
    for request_id in waiting:
        llm.engine.abort_request(request_id)
    drain(llm)
    pool = manager_of(llm).pool
    assert [pool.ref_count(b) for b in range(pool.num_blocks)] == [0] * pool.num_blocks
    assert pool.num_free == pool.num_blocks


def test_counts_come_down_again(lab: Lab) -> None:
    """vllm-metal#394: the count of holders was never taken back, so nothing could ever be evicted."""
    llm = lab.make(num_blocks=17)
    for i in range(12):
        prompt = [*PROMPT[:16], *([60 + i] * 40)]
        assert answers(llm, [prompt]) == lab.expected([prompt])
    pool = manager_of(llm).pool
    assert pool.num_free == 17
    assert pool.num_evicted > 0


def test_a_block_is_freed_once(lab: Lab) -> None:
    """jax#982: a block that was freed twice went to two sequences."""
    hasher = BlockHasher(4, "model")
    pool = CachedBlockPool(2, HashIndex(hasher))
    block = pool.allocate()
    pool.release(block)
    with pytest.raises(ValueError, match="cannot be freed twice"):
        pool.release(block)
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share(block)


def test_a_prompt_in_chunks_is_counted_once(lab: Lab) -> None:
    """SGLang#35270: each piece of a prompt was counted as a prompt, and found itself."""
    llm = lab.make(max_num_batched_tokens=6)
    answers(llm, [PROMPT])
    stats = stats_of(llm)
    assert (stats.num_queried_tokens, stats.num_hit_tokens) == (40, 0)
    answers(llm, [PROMPT])
    assert (stats.num_queried_tokens, stats.num_hit_tokens) == (80, 39)
    assert stats.hit_rate == 39 / 80


def test_hits_are_counted_once_whatever_happens_to_the_request(lab: Lab) -> None:
    """SGLang#35270: three outputs, chunks and preemptions, and what was found is counted once for each request."""
    collector = MetricsCollector()
    llm = LLM(lab.model, plugins=[collector], **{**BASE, "num_blocks": 16}, swap_space=0, max_num_batched_tokens=8)
    answers(llm, [PROMPT])
    params = SamplingParams(n=3, temperature=0.8, seed=1, max_tokens=30, ignore_eos=True)
    for _ in range(2):
        llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
    assert collector.totals.num_preemptions > 0
    stats = stats_of(llm)
    assert stats.num_queried_tokens == 3 * 40
    assert stats.num_hit_tokens <= 2 * 39
    assert stats.num_hit_tokens > 39


def test_log_probabilities_of_a_prompt_in_chunks(lab: Lab) -> None:
    """vllm#3914, #13105, #42245: with chunks and a known prefix rows were missing, or stood at other tokens."""
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=3)
    llm = lab.make(max_num_batched_tokens=7)
    answers(llm, [PROMPT])
    for _ in range(2):
        [ours] = llm.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        [theirs] = lab.plain.generate([{"prompt_token_ids": PROMPT}], params, use_tqdm=False)
        assert ours.prompt_logprobs is not None
        assert theirs.prompt_logprobs is not None
        assert [list(row) if row else None for row in ours.prompt_logprobs] == [
            list(row) if row else None for row in theirs.prompt_logprobs]
        assert ours.num_cached_tokens == 0
    assert stats_of(llm).num_queried_tokens == 40, "who is not looked up is not counted"


def test_a_known_prompt_in_pieces_of_one_token(lab: Lab) -> None:
    """vllm#5543: a prefix was found and the rest came in chunks: a hit in the middle of a block."""
    for size in (1, 7, 8, 9):
        llm = lab.make(max_num_batched_tokens=size)
        for prompt in (PROMPT, [*PROMPT[:21], 7, 8], [*PROMPT[:21], 7, 9, 9, 9], PROMPT[:24], PROMPT[:25]):
            assert answers(llm, [prompt]) == lab.expected([prompt])


def test_what_is_evicted_in_the_same_step_is_not_what_was_found(lab: Lab) -> None:
    """mini-sglang#142: a table still pointed at blocks that had gone to somebody else while it was made."""
    llm = lab.make(num_blocks=17, swap_space=0)
    texts = [[first] * 5 + PROMPT[:40] for first in (1, 2, 3)]
    for _ in range(3):
        for text in texts:
            long = [*text, *range(60, 100)]
            assert answers(llm, [long, text]) == lab.expected([long, text])


def test_every_block_is_somewhere(lab: Lab) -> None:
    """mini-sglang#149, #150: the check of integrity looked at nothing. This one counts blocks in every state."""
    llm = lab.make(num_blocks=24)
    manager = manager_of(llm)
    pool = manager.pool
    for i in range(4):
        add(llm, [*PROMPT[:20], 60 + i], LONG)
    seen = set()
    while llm.engine.has_unfinished_requests():
        held = sum(pool.ref_count(b) > 0 for b in range(24))
        assert held + pool.num_free == 24
        assert all(b in pool.index for b in (*pool._cached, *pool._spared))
        seen.add((held > 0, pool.num_cached > 0))
        llm.engine.step()
    assert (True, True) in seen
    assert pool.num_free == 24
    assert pool.num_cached == len(pool.index) > 0


def test_a_hit_of_all_whole_blocks(lab: Lab) -> None:
    """vllm#54490 and others: a prompt that is a multiple of the block's size and known whole."""
    for length in (8, 16, 32):
        for index, expected in (("radix", length - 1), ("hash", length - 1)):
            llm = lab.make(prefix_index=index)
            answers(llm, [PROMPT[:length]])
            [output] = llm.generate([{"prompt_token_ids": PROMPT[:length]}], GREEDY, use_tqdm=False)
            assert [list(output.outputs[0].token_ids)] == lab.expected([PROMPT[:length]])
            assert output.num_cached_tokens == expected


def test_one_user_cannot_make_another_find_his_text(monkeypatch: pytest.MonkeyPatch, lab: Lab) -> None:
    """CVE-2025-25183: hash(None) is the same in every process, so collisions could be made. Here all hashes collide."""
    monkeypatch.setattr(BlockHasher, "next_hash", staticmethod(lambda parent, tokens: b"the same for all"))
    llm = lab.make(prefix_index="hash")
    prompts = [PROMPT, [*PROMPT[:8], *PROMPT[20:]], [9] * 40]
    for _ in range(2):
        for prompt in prompts:
            assert answers(llm, [prompt]) == lab.expected([prompt])
    assert answers(llm, prompts) == lab.expected(prompts)
