"""F3.10: the cache in 8 and 4 bits, with a scale for each block: bytes, rounding, whose scale it is, attention."""
from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from m0_basics.attention import ScheduledSequence
from m0_basics.config import ConfigError
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.conformance import greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.kv_cache_manager import SlotCopy
from m2_continuous_batching.plugins import CachePlugin, KVCompressionPlugin
from m2_continuous_batching.slot_cache import SlotCache, slot_cache_bytes
from m3_paged_kv import LLM
from m3_paged_kv.attention import PagedAttention
from m3_paged_kv.kv_cache_manager import paged_manager
from m3_paged_kv.plugins.kv_quant import BlockQuantisation, pack, unpack

CPU = torch.device("cpu")
HEADS, HEAD_DIM, BLOCK = 2, 8, 4
SPEC = ModelSpec("LlamaForCausalLM", 8, 8, 8, 2, 4, HEADS, HEAD_DIM, 64, rms_norm_eps=1e-5, rope_theta=1e4,
                 tie_word_embeddings=False)
FORMATS = [(8, False), (8, True), (4, False), (4, True)]


def make(tiny_model: TinyModels, *plugins: Any, **options: Any) -> LLM:
    options = {"dtype": "float32", "max_model_len": 256, "num_blocks": 128, "block_size": 8, **options}
    return LLM(str(tiny_model("qwen3")), plugins=plugins, **options)


def make_cache(bits: int, per_channel_keys: bool, num_blocks: int = 6) -> tuple[SlotCache, BlockQuantisation]:
    plugin = BlockQuantisation(bits, BLOCK, per_channel_keys)
    return SlotCache(SPEC, num_blocks * BLOCK, torch.float32, CPU, [plugin], BLOCK), plugin


def tokens(n: int, seed: int = 0, size: float = 1.0) -> torch.Tensor:
    """[n, H_kv, D]; tokens differ in size, so that scales have to grow."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, HEADS, HEAD_DIM, generator=generator)
    return x * torch.rand(n, 1, 1, generator=generator) * 3 * size


def written_out(x: torch.Tensor, largest: int, by_channel: bool) -> torch.Tensor:
    """What a block gives back after the tokens x [n <= BLOCK, H_kv, D] were written one by one: number by number."""
    out = torch.empty_like(x)
    for head in range(HEADS):
        channels = [[c] for c in range(HEAD_DIM)] if by_channel else [list(range(HEAD_DIM))]
        for group in channels:
            scale, integers = 0.0, list[list[float]]()
            for token in x[:, head, group].tolist():
                wanted = float(torch.tensor(max(map(abs, token)) / largest).half())
                if wanted > scale:
                    integers = [[float(torch.tensor(i * (scale / wanted)).round()) for i in row] for row in integers]
                    scale = wanted
                integers.append([max(-largest, min(largest, round(value / scale))) for value in token])
            out[:, head, group] = torch.tensor(integers) * scale
    return out


def test_packing() -> None:
    """Two numbers of 4 bits in a byte, one of 8; every number comes back."""
    four = torch.tensor(list(itertools.product(range(-7, 8), repeat=2)), dtype=torch.float32)
    packed = pack(four, 4)
    assert (packed.shape, packed.dtype) == ((225, 1), torch.uint8)
    assert len(set(packed.flatten().tolist())) == 225
    assert torch.equal(unpack(packed, 4), four)
    eight = torch.arange(-127.0, 128.0).view(-1, 5)
    assert torch.equal(unpack(pack(eight, 8), 8), eight)


@pytest.mark.parametrize(("bits", "by_channel"), FORMATS)
def test_tokens_one_by_one(bits: int, by_channel: bool) -> None:
    """F3.10: integers are rescaled as a block's scale grows: the same as a definition written out, number by number."""
    cache, plugin = make_cache(bits, by_channel)
    x = tokens(3 * BLOCK)
    slots = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 20, 21, 22, 23])
    for t in range(len(slots)):
        cache.store(1, x[t:t + 1], x[t:t + 1].flip(2), slots[t:t + 1])
    keys, values = cache.read(1, slots, torch.float32)
    largest = plugin.halves[0].largest
    expected_k, expected_v = (torch.cat([written_out(block, largest, per_channel) for block in y.split(BLOCK)])
                              for y, per_channel in ((x, by_channel), (x.flip(2), False)))
    torch.testing.assert_close(keys, expected_k, rtol=1e-6, atol=0)
    torch.testing.assert_close(values, expected_v, rtol=1e-6, atol=0)
    assert not torch.equal(keys, x)


@pytest.mark.parametrize(("bits", "by_channel"), FORMATS)
def test_a_prompt_at_once(bits: int, by_channel: bool) -> None:
    """F3.10: many blocks in one write, the last of them half full, then more of it: off by half a step at most.

    A number that was there before its block's scale grew has been rounded twice.
    """
    cache, plugin = make_cache(bits, by_channel)
    x = tokens(13)
    slots = torch.tensor([4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 8])
    for part in (slice(0, 10), slice(10, 13)):
        cache.store(0, x[part], x[part], slots[part])
    keys, values = cache.read(0, slots, torch.float32)
    for read, half in zip((keys, values), plugin.halves, strict=True):
        scale = half.scales[0][slots // BLOCK].float()
        steps = torch.full((13, 1, 1), 0.5)
        steps[8:10] = 1.0
        # The scale is rounded to 11 bits, so that the largest number may fall short by 2^-11 of itself.
        bound = scale * (steps + half.largest * 2.0 ** -11)
        assert ((read - x).abs() <= bound * (1 + 1e-5)).all()
        by_block = [x[:4], x[4:8], x[8:12], x[12:]]
        for tokens_of, block in zip(by_block, (1, 4, 3, 2), strict=True):
            axes = (0,) if half.scales.shape[-1] > 1 else (0, 2)
            largest = tokens_of.abs().amax(dim=axes).view(HEADS, -1)
            torch.testing.assert_close(half.scales[0, block].float(), largest / half.largest, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(("bits", "by_channel"), FORMATS)
def test_a_block_with_a_new_owner_starts_anew(bits: int, by_channel: bool) -> None:
    """F3.10: the first slot is written, so the scale of whoever was there before is forgotten."""
    cache, _ = make_cache(bits, by_channel)
    cache.store(0, tokens(4, size=1000.0), tokens(4, size=1000.0), torch.arange(4, 8))
    small = tokens(2, seed=1)
    for t in range(2):
        cache.store(0, small[t:t + 1], small[t:t + 1], torch.tensor([4 + t]))
    fresh, _ = make_cache(bits, by_channel)
    for t in range(2):
        fresh.store(0, small[t:t + 1], small[t:t + 1], torch.tensor([8 + t]))
    for got, expected in zip(cache.read(0, slice(4, 6), torch.float32), fresh.read(0, slice(8, 10), torch.float32),
                             strict=True):
        assert torch.equal(got, expected)


def test_copies_take_their_scales_along() -> None:
    """F3.5, F3.10: part of a block, and two blocks; the copy goes its own way afterwards."""
    cache, _ = make_cache(4, True)
    x = tokens(8)
    cache.store(0, x, x, torch.arange(8))
    before = cache.read(0, slice(0, 8), torch.float32)
    cache.copy_slots([SlotCopy(0, 8, 2), SlotCopy(0, 16, 8)])
    big = tokens(1, seed=2, size=100.0)
    cache.store(0, big, big, torch.tensor([10]))
    for which in (0, 1):
        assert torch.equal(cache.read(0, slice(0, 8), torch.float32)[which], before[which]), "the original is untouched"
        assert torch.equal(cache.read(0, slice(16, 24), torch.float32)[which], before[which])
    error = (cache.read(0, slice(8, 10), torch.float32)[1] - before[1][:2]).abs().amax()
    assert 0 < float(error) <= 0.5 * float(big.abs().max()) / 7 * (1 + 1e-3), "rescaled to the newcomer's size"


@pytest.mark.parametrize(("plugin", "bits_per_number"), [
    (KVCompressionPlugin(), 8 + 16 / HEAD_DIM), (BlockQuantisation(8, BLOCK), 8 + 16 / (HEAD_DIM * BLOCK)),
    (BlockQuantisation(4, BLOCK), 4 + 16 / (HEAD_DIM * BLOCK)),
    (BlockQuantisation(4, BLOCK, per_channel_keys=True), 4 + (16 / BLOCK + 16 / (HEAD_DIM * BLOCK)) / 2)])
def test_bytes(plugin: CachePlugin, bits_per_number: float) -> None:
    """F3.10: bytes are those of the tensors, and are known before the tensors are there."""
    numbers = 2 * SPEC.num_hidden_layers * HEADS * HEAD_DIM * 40
    assert slot_cache_bytes(SPEC, 40, torch.bfloat16) == 2 * numbers
    assert slot_cache_bytes(SPEC, 40, torch.bfloat16, [plugin]) == numbers * bits_per_number / 8
    cache = SlotCache(SPEC, 40, torch.bfloat16, CPU, [plugin], BLOCK)
    assert cache.nbytes == numbers * bits_per_number / 8


def test_the_same_memory_holds_more_blocks(tiny_model: TinyModels) -> None:
    """F3.10: about twice as many in 8 bits, four times in 4, compared with 16 bits."""
    def blocks(*plugins: CachePlugin) -> int:
        llm = make(tiny_model, *plugins, dtype="bfloat16", num_blocks=None, kv_cache_memory_bytes=2_400_000,
                   block_size=16)
        assert llm.cache.nbytes <= 2_400_000
        assert llm.manager.swapped.host_pool.num_blocks == 0 or not plugins, "scales stay on the device: recompute"
        return llm.manager.pool.num_blocks

    plain = blocks()
    assert plain == 2_400_000 // (2 * 2 * 3 * 2 * 32 * 16)
    assert 1.95 < blocks(BlockQuantisation(8)) / plain <= 2
    assert 3.9 < blocks(BlockQuantisation(4)) / plain <= 4
    assert 3.0 < blocks(BlockQuantisation(4, per_channel_keys=True)) / plain < 3.9


def attention_error(plugin: CachePlugin, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """A prompt, then one more token that reads the cache: largest error of its output, relative to the exact one."""
    outputs = []
    for plugins in ([plugin], []):
        cache, manager = SlotCache(SPEC, 64, torch.float32, CPU, plugins, BLOCK), paged_manager(16, BLOCK)
        backend = PagedAttention(cache, manager.tables, torch.float32)
        sequence = Sequence(next_seq_id(), SequenceData([1] * len(k)), SamplingParams(), 0)
        for part in (slice(0, len(k) - 1), slice(len(k) - 1, len(k))):
            scheduled = [ScheduledSequence(sequence, sequence.num_computed_tokens, part.stop - part.start)]
            assert manager.allocate_slots(sequence, sequence.num_computed_tokens, scheduled[0].num_tokens)
            out = backend.forward(0, q[part], k[part], v[part], backend.build_metadata(scheduled))
            sequence.num_computed_tokens = part.stop
        outputs.append(out)
    return float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())


def test_large_channels_of_keys() -> None:
    """F3.10: a channel that is large in every key costs the others their bits, unless each has a scale of its own."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(41, heads, HEAD_DIM, generator=generator) for heads in (4, 2, 2))
    k[..., 3] += 30.0
    errors = {f: attention_error(BlockQuantisation(f[0], BLOCK, f[1]), q, k, v) for f in FORMATS}
    assert errors[8, False] < 0.1
    assert errors[8, True] < 0.02
    assert errors[4, True] < 0.5 * errors[4, False]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "by_channel"), FORMATS)
def test_forks_in_the_engine(tiny_model: TinyModels, bits: int, by_channel: bool) -> None:
    """F3.5, F3.10: three outputs that share their prompt, each of them always the most probable token: greedy's."""
    for prompt in ([7, 9, 30, 31, 5], [50, 60] * 8):
        llm = make(tiny_model, BlockQuantisation(bits, 8, by_channel))
        params = SamplingParams(n=3, temperature=1.0, top_k=1, max_tokens=20, ignore_eos=True)
        outputs = [o.token_ids for o in llm.generate([prompt], params, use_tqdm=False)[0].outputs]
        alone = make(tiny_model, BlockQuantisation(bits, 8, by_channel))
        assert outputs == ids_of(alone.generate([prompt], greedy(20), use_tqdm=False)) * 3
        assert llm.manager.usage == 0


def test_8_bits_change_few_tokens(tiny_model: TinyModels) -> None:
    """F3.10: with preemption, and one step ahead, outputs of 8 bits are mostly those of the exact cache."""
    prompts = [[7 + i, 20, 3 * i] * 5 for i in range(6)]
    exact = ids_of(make(tiny_model).generate(prompts, greedy(24), use_tqdm=False))

    def in_common(bits: int, **options: Any) -> int:
        """Tokens up to the first that differs, over all outputs."""
        llm = make(tiny_model, BlockQuantisation(bits, 8), **options)
        ours = ids_of(llm.generate(prompts, greedy(24), use_tqdm=False))
        assert llm.manager.usage == 0
        return sum(len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True))))
                   for a, b in zip(ours, exact, strict=True))

    plain = in_common(8)
    assert plain >= 0.5 * 6 * 24
    assert in_common(8, async_scheduling=True) == plain
    assert in_common(8, num_blocks=11, max_model_len=64) >= 0.5 * 6 * 24
    assert in_common(4) < plain


@pytest.mark.parametrize(("arguments", "message"), [
    ({"bits": 2}, "bits=2"), ({"bits": True}, "bits=True"), ({"block_size": 0}, "block_size=0")])
def test_bad_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BlockQuantisation(**arguments)


def test_what_does_not_fit_the_engine_is_refused(tiny_model: TinyModels) -> None:
    """Scales of 16 tokens would cross blocks of 8; two numbers of 4 bits need an even head size."""
    with pytest.raises(ConfigError, match="block_size=16 is not valid; allowed: a divisor of the engine's block size"):
        make(tiny_model, BlockQuantisation(8, 16), block_size=8)
    assert make(tiny_model, BlockQuantisation(8, 4), block_size=8).cache.kv_cache.k.dtype is torch.int8
    with pytest.raises(ConfigError, match="bits=4"):
        BlockQuantisation(4).storage_format(torch.float32, 7)
    plugin = BlockQuantisation(8, 8)
    make(tiny_model, plugin)
    with pytest.raises(ConfigError, match="this BlockQuantisation serves an engine already"):
        make(tiny_model, plugin)


@pytest.mark.parametrize("second", [lambda: BlockQuantisation(8, 8), lambda: BlockQuantisation(4, 8),
                                    KVCompressionPlugin])
@pytest.mark.parametrize("first", [lambda: BlockQuantisation(8, 8), KVCompressionPlugin])
def test_numbers_are_rounded_once(tiny_model: TinyModels, first: Any, second: Any) -> None:
    """F3.10: integers are no input; a plugin that leaves the numbers what they are may come before."""
    with pytest.raises(ConfigError, match=rf"{type(second()).__name__} gets torch\.int8"):
        make(tiny_model, first(), second())
    assert make(tiny_model, CachePlugin(), second()).cache.kv_cache.k.dtype in (torch.int8, torch.uint8)


@pytest.mark.parametrize("plugin", [KVCompressionPlugin, *(lambda f=f: BlockQuantisation(f[0], BLOCK, f[1])
                                                           for f in FORMATS)])
def test_zeros_are_stored_as_zeros(plugin: Any) -> None:
    """F3.10: a block of zeros has a scale as well: nothing is divided by 0, which makes integers of NaN."""
    plugin = plugin()
    cache = SlotCache(SPEC, 2 * BLOCK, torch.float32, CPU, [plugin], BLOCK)
    zeros = torch.zeros(BLOCK, HEADS, HEAD_DIM)
    cache.store(0, zeros, zeros, torch.arange(BLOCK))
    scales = ([half.scales[0, 0] for half in plugin.halves] if isinstance(plugin, BlockQuantisation)
              else [plugin.scales[:, 0, :BLOCK]])
    assert all((scale > 0).all() for scale in scales)
    assert all(torch.equal(x, zeros) for x in cache.read(0, slice(0, BLOCK), torch.float32))
    x = tokens(1)
    cache.store(0, x, x, torch.tensor([BLOCK - 1]))
    for read in cache.read(0, slice(0, BLOCK), torch.float32):
        assert torch.equal(read[:-1], zeros[:-1]), "zeros stay zeros when the scale grows"
        assert (read[-1] - x[0]).abs().max() <= x.abs().max() / 7
