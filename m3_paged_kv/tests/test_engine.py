"""F3.4, F3.5, F3.6, F3.8: what the engine holds, shares, measures and refuses."""
from __future__ import annotations

import re
from typing import Any

import pytest

import m1_offline
import m2_continuous_batching
from m0_basics.config import ConfigError
from m0_basics.sampling_params import BeamSearchParams, SamplingParams
from m0_basics.tools.bench import get_workload
from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.plugins import SchedulerPlugin, StepStats
from m2_continuous_batching.plugins.kv_compression import KVCompressionPlugin
from m2_continuous_batching.scheduler import Scheduler
from m2_continuous_batching.tools.timeline import record_timeline
from m3_paged_kv import LLM
from m3_paged_kv.kv_cache_manager import PagedKVCacheManager
from m3_paged_kv.plugins.eviction import AttentionSinks
from m3_paged_kv.tools.fragmentation import FragmentationMeter, block_utilisation, row_utilisation


def make(tiny_model: TinyModels, **options: Any) -> LLM:
    return LLM(str(tiny_model("qwen3")), **{"dtype": "float32", "max_model_len": 256, "num_blocks": 128, **options})


class BlockCount(SchedulerPlugin):
    """The most blocks that were held after any step."""

    def __init__(self) -> None:
        self.most = 0

    def after_step(self, scheduler: Scheduler, stats: StepStats) -> None:
        assert isinstance(scheduler.kv_cache_manager, PagedKVCacheManager)
        self.most = max(self.most, scheduler.kv_cache_manager.pool.num_used)


@pytest.mark.parametrize(("prompt", "output", "n"), [(40, 20, 4), (32, 17, 3), (3, 40, 6)])
def test_outputs_share_their_prompt(tiny_model: TinyModels, prompt: int, output: int, n: int) -> None:
    """F3.5: at the end the request holds the full blocks of its prompt once, and the rest once per output."""
    count = BlockCount()
    llm = make(tiny_model, block_size=8, plugins=[count])
    params = SamplingParams(n=n, temperature=1.5, seed=3, max_tokens=output, ignore_eos=True)
    outputs = llm.generate([[7] * prompt], params, use_tqdm=False)[0].outputs
    assert len({tuple(o.token_ids) for o in outputs}) == n, "they did part ways"
    stored = prompt + output - 1
    # Finished outputs give their blocks back, so the last step that is seen stored one token less.
    shared, own = prompt // 8, -(-(stored - 1) // 8) - prompt // 8
    assert count.most == shared + n * own
    assert llm.manager.usage == 0


def test_beams_share_their_blocks(tiny_model: TinyModels) -> None:
    """F3.5: the same beams as over copied rows, in a cache that could not hold the copies."""
    params = BeamSearchParams(beam_width=4, max_tokens=12)
    prompts = [[7, 9, 30] * 10, [50, 60]]
    rows = m1_offline.LLM(str(tiny_model("qwen3")), dtype="float32", max_model_len=256, max_num_seqs=8)
    llm = make(tiny_model, block_size=8, num_blocks=13)     # four copies of 41 tokens would take 24
    ours, theirs = llm.beam_search(prompts, params), rows.beam_search(prompts, params)
    assert [[s.tokens for s in o.sequences] for o in ours] == [[s.tokens for s in o.sequences] for o in theirs]
    assert llm.manager.usage == 0


def test_beams_without_room(tiny_model: TinyModels) -> None:
    llm = make(tiny_model, block_size=8, num_blocks=6, max_model_len=48)
    with pytest.raises(ConfigError, match="the beams need more than the 6 blocks"):
        llm.beam_search([[7] * 30], BeamSearchParams(beam_width=4, max_tokens=16))
    assert llm.manager.usage == 0
    assert len(llm.generate([[7] * 30], greedy(4), use_tqdm=False)) == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_beams_do_not_run_beside_requests(tiny_model: TinyModels, ahead: bool) -> None:
    """F3.5, F3.6: between two steps, copies may be listed and not made: beams are refused, and change no token."""
    options = {"block_size": 4, "num_blocks": 60, "max_model_len": 64, "max_num_seqs": 2, "policy": "round-robin:3",
               "swap_space": 0.01, "async_scheduling": ahead}
    prompts = [[5 + i, 30, 4 * i + 3] * (1 + 3 * (i % 4)) for i in range(6)]
    beams = BeamSearchParams(beam_width=3, max_tokens=12)
    expected = ids_of(make(tiny_model, **options).generate(prompts, greedy(24), use_tqdm=False))
    llm = make(tiny_model, **options)
    requests = [llm.input_processor.process({"prompt_token_ids": prompt}, greedy(24)) for prompt in prompts]
    for request in requests:
        llm.engine.add_request(request)
    while llm.engine.has_unfinished_requests():
        with pytest.raises(ConfigError, match="beam_search runs alone"):
            llm.beam_search([[9, 8, 7] * 3], beams)
        llm.engine.step()
    assert [request.sequences[0].output_token_ids for request in requests] == expected
    alone = make(tiny_model, **options).beam_search([[9, 8, 7] * 3], beams)
    assert llm.beam_search([[9, 8, 7] * 3], beams) == alone


def test_a_request_larger_than_the_pool_is_refused(tiny_model: TinyModels) -> None:
    """F3.8: on arrival, with what is allowed; the others are served."""
    llm = make(tiny_model, block_size=8, num_blocks=4)
    with pytest.raises(ConfigError, match="40 tokens of KV cache"):
        llm.generate([[7] * 30], greedy(11), use_tqdm=False)
    assert len(ids_of(llm.generate([[7] * 30], greedy(3), use_tqdm=False))[0]) == 3


def test_example_of_rows() -> None:
    """F3.4: 512 and 128 tokens in rows of 2,048: 15.6 %; in blocks of 16 nothing is wasted."""
    assert row_utilisation([512, 128], 2048) == pytest.approx(0.15625)
    assert block_utilisation([512, 128], 16) == 1.0
    assert block_utilisation([17], 16) == pytest.approx(17 / 32)


def test_meter_on_a_real_run(tiny_model: TinyModels) -> None:
    """F3.4: waste per sequence is below a block in every step, and the meter's sums are those of the books."""
    meter = FragmentationMeter()
    llm = make(tiny_model, block_size=8, plugins=[meter])
    llm.generate([[7] * n for n in (5, 30, 17, 60)], greedy(24), use_tqdm=False)
    assert len(meter.history) >= 24
    assert all(0 <= f.waste_per_sequence < 8 for f in meter.history)
    first = meter.history[0]
    assert (first.stored, first.reserved, first.num_sequences) == (112, 8 * (1 + 4 + 3 + 8), 4)
    assert 0.8 < meter.mean_utilisation < 1


def test_meter_one_step_ahead(tiny_model: TinyModels) -> None:
    """F3.4: blocks that the next step was given and has not filled yet count nowhere: steps read as they do in turn."""
    def measure(ahead: bool) -> FragmentationMeter:
        meter = FragmentationMeter()
        assert meter.mean_utilisation == 1.0, "before any step nothing is wasted"
        llm = make(tiny_model, block_size=4, max_num_seqs=1, max_model_len=64, plugins=[meter], async_scheduling=ahead)
        llm.generate([[7] * n for n in (4, 9)], greedy(9), use_tqdm=False)
        return meter

    in_turn, ahead = measure(False).history, measure(True).history
    assert all(0 <= f.waste_per_sequence < 4 and f.num_sequences <= 1 for f in ahead)
    assert [f.stored for f in in_turn if f.stored] == [*range(4, 12), *range(9, 17)]
    # One step ahead an output's end is noticed after the step, so what it stored last is seen as well.
    assert {f for f in in_turn if f.stored} <= set(ahead)


@pytest.mark.parametrize("ahead", [False, True])
def test_meter_over_sequences_that_forget(tiny_model: TinyModels, ahead: bool) -> None:
    """F3.4, F3.10: what was forgotten is neither stored nor reserved: 21 tokens, less blocks 1, 2 and 3, and so on."""
    meter = FragmentationMeter()
    llm = make(tiny_model, block_size=4, plugins=[AttentionSinks(4, 5), meter], async_scheduling=ahead)
    llm.generate([[7] * 21], greedy(6), use_tqdm=False)
    seen = [(f.stored, f.reserved) for f in meter.history if f.stored]
    assert seen[:5] == [(9, 12), (10, 12), (11, 12), (12, 12), (9, 12)]


def test_sizes_follow_the_memory(tiny_model: TinyModels) -> None:
    """Bytes -> blocks; a budget without room for a block, or options that make no sense, are refused."""
    llm = make(tiny_model, num_blocks=None, kv_cache_memory_bytes=100_000, block_size=16)
    per_block = llm.cache.nbytes // llm.manager.pool.num_blocks
    assert llm.manager.pool.num_blocks == 100_000 // per_block
    assert make(tiny_model, num_blocks=None, max_num_seqs=2).manager.pool.num_blocks == 2 * 256 // 16
    with pytest.raises(ConfigError, match="kv_cache_memory_bytes=100 is too small"):
        make(tiny_model, num_blocks=None, kv_cache_memory_bytes=100)
    with pytest.raises(ConfigError, match=r"gpu_memory_utilization=1\.5"):
        make(tiny_model, gpu_memory_utilization=1.5)
    for value in (-1, 1e300, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match=re.escape(f"swap_space={value} is not valid; allowed: GiB, 0 or more")):
            make(tiny_model, swap_space=value)
    with pytest.raises(ConfigError, match="block_size=0"):
        make(tiny_model, block_size=0)


def test_two_sizes_of_one_cache_are_refused(tiny_model: TinyModels) -> None:
    with pytest.raises(ConfigError, match="num_blocks=8 and kv_cache_memory_bytes=100000 both say"):
        make(tiny_model, num_blocks=8, kv_cache_memory_bytes=100_000)


def test_more_memory_than_there_is_is_refused(tiny_model: TinyModels) -> None:
    """F3.1, F3.6: blocks on the device and in host memory, before any of them is taken."""
    for size in ({"num_blocks": 10**12}, {"kv_cache_memory_bytes": 10**17, "num_blocks": None, "max_num_seqs": 10**11}):
        with pytest.raises(ConfigError, match=r"(num_blocks|kv_cache_memory_bytes)=[\d,]+ is too large: .* blocks take "
                                              r".* bytes, and this machine has"):
            make(tiny_model, **size)
    for space in (10.0**9, 1e298):
        with pytest.raises(ConfigError, match=r"swap_space is too large: .* bytes of host memory, and .* available"):
            make(tiny_model, swap_space=space)


def test_a_compressed_cache_is_recomputed_not_swapped(tiny_model: TinyModels) -> None:
    """A plugin's scales lie beside the device's slots; a sequence that gave way comes back with the right ones."""
    prompts = [[7 + i] * 20 for i in range(4)]
    roomy = make(tiny_model, plugins=[KVCompressionPlugin()])
    count = BlockCount()
    tight = make(tiny_model, plugins=[KVCompressionPlugin(), count], num_blocks=9, block_size=8, max_model_len=64)
    assert tight.manager.swapped.host_pool.num_blocks == 0
    assert ids_of(tight.generate(prompts, greedy(24), use_tqdm=False)) == (
        ids_of(roomy.generate(prompts, greedy(24), use_tqdm=False)))
    assert count.most == 9, "the pool was full"


@pytest.mark.slow
def test_twice_as_many_run_side_by_side_as_with_rows(tiny_model: TinyModels) -> None:
    """F3.9: with as many slots, on ragged-64's lengths halved: sequences that get a token, counted at every step."""
    options = {"dtype": "float32", "max_model_len": 512, "skip_tokenizer_init": True}
    folder, num_rows = str(tiny_model("llama")), 8
    rows = m2_continuous_batching.LLM(folder, max_num_seqs=num_rows, **options)
    blocks = LLM(folder, num_blocks=num_rows * 512 // 16, max_num_seqs=64, **options)
    assert rows.cache.kv_cache.k.shape == blocks.cache.kv_cache.k.shape
    workload = get_workload("ragged-64:prompt_max=128,output_max=64").fit_vocabulary(rows.spec.vocab_size)

    def mean(llm: LLM | m2_continuous_batching.LLM) -> float:
        counts = [row.num_tokens for row in record_timeline(llm, workload)]
        return sum(counts) / len(counts)

    assert mean(blocks) >= 2 * mean(rows)


@pytest.mark.parametrize("num_failures", [1, 99])
def test_a_failed_step_leaves_nothing_in_host_memory(tiny_model: TinyModels, monkeypatch: pytest.MonkeyPatch,
                                                     num_failures: int) -> None:
    """F3.6: swapped out while its step ran, which then failed: its blocks were never written, and are not kept."""
    prompts, params = [[7, 8, 9, 10, 11, 12, 13, 14], [20, 21, 22, 23, 24, 25, 26, 27]], greedy(4)
    expected = ids_of(make(tiny_model).generate(prompts, params, use_tqdm=False))
    llm = make(tiny_model, num_blocks=5, block_size=4, async_scheduling=True, swap_space=0.01)
    execute, calls = llm.engine.runner.execute, []

    def broken(inputs: Any) -> Any:
        calls.append(inputs)
        if len(calls) <= num_failures and any(s.start == 0 for s in inputs.scheduled):
            raise ValueError("out of cheese")
        return execute(inputs)

    monkeypatch.setattr(llm.engine.runner, "execute", broken)
    outputs = llm.generate(prompts, params, use_tqdm=False)
    if num_failures == 1:
        assert ids_of(outputs) == expected
    else:
        assert [o.outputs[0].finish_reason for o in outputs] == ["abort", "abort"]
        assert all(o.outputs[0].stop_reason == "error: ValueError: out of cheese" for o in outputs)
    assert (llm.manager.usage, len(llm.manager.swapped)) == (0.0, 0)
