"""Values of the Triton kernels in Triton's interpreter, on a CPU. `test_triton.py` runs this file in a process of its
own, with TRITON_INTERPRET=1. Slots of the cache that belong to no token hold NaN: reading one shows.
"""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m0_basics import SamplingParams
from m0_basics.model import RMSNorm, apply_rotary
from m0_basics.model_runner import ModelRunner
from m3_paged_kv import LLM
from m4_flash_attn.cuda_graph import GraphRunner
from m4_flash_attn.elementwise import TorchOps
from m4_flash_attn.kernels.layer_kernels import plain_layer_kernels
from m4_flash_attn.kernels.triton import launch
from m4_flash_attn.kernels.triton.attention import attend
from m4_flash_attn.kernels.triton.backend import GpuAttention
from m4_flash_attn.kernels.triton.decode import KEYS_PER_SPLIT, merge_kernel, paged_decode
from m4_flash_attn.kernels.triton.elementwise import TritonOps
from m4_flash_attn.kernels.triton.prefill import paged_prefill
from m4_flash_attn.kernels.triton.rotary import rotary_and_store, store_kv
from m4_flash_attn.layers import fuse
from m4_flash_attn.reference import MIXED, PagedBatch, random_paged_batch
from m4_flash_attn.tests.batches import metadata_of

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = st.sampled_from(list(TOLERANCE))
HEADS = st.sampled_from([(3, 1), (9, 3), (2, 2), (8, 2), (7, 1)])
HEAD_DIMS = st.sampled_from([16, 64, 80, 96, 128])
MASKS = st.sampled_from([(None, 0), (1, 0), (20, 0), (20, 3), (70, 1), (40, 70), (1000, 4)])
BLOCK_SIZES = st.sampled_from([16, 32, 64])
FEW = settings(max_examples=25, deadline=None, derandomize=True)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def decode(batch: PagedBatch, window: int | None = None, num_sinks: int = 0, keys: int = KEYS_PER_SPLIT):
    return paged_decode(batch.q, batch.k_cache, batch.v_cache, batch.seq_lens, batch.block_table, batch.block_size,
                        int(batch.seq_lens.max()), batch.scale, window, num_sinks, keys)


def prefill(batch: PagedBatch, window: int | None = None, num_sinks: int = 0):
    return paged_prefill(batch.q, batch.k_cache, batch.v_cache, batch.query_start_loc, batch.seq_lens,
                         batch.block_table, batch.block_size, batch.max_query_len, batch.scale, window, num_sinks)


def test_the_interpreter_is_on() -> None:
    assert launch.INTERPRETED
    assert type(merge_kernel).__name__ == "InterpretedFunction"


@FEW
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 70)), min_size=1, max_size=3), HEADS, HEAD_DIMS, DTYPES,
       BLOCK_SIZES, MASKS, st.integers(0, 9))
def test_prefill_equals_the_reference(sequences, heads, head_dim, dtype, block_size, mask, seed) -> None:
    """F4.4, F4.6: prompts, chunks behind prefixes, single tokens; every mask; blocks in any order."""
    batch = random_paged_batch(sequences, *heads, head_dim, block_size, dtype, seed=seed)
    close(prefill(batch, *mask), batch.expected(*mask))


@FEW
@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), HEADS, HEAD_DIMS, DTYPES, BLOCK_SIZES, MASKS,
       st.sampled_from([64, 128, 256]), st.integers(0, 9))
def test_decode_equals_the_reference(computed, heads, head_dim, dtype, block_size, mask, keys, seed) -> None:
    """F4.4, F4.5, F4.6: splits of any size; some have no keys."""
    batch = random_paged_batch([(n, 1) for n in computed], *heads, head_dim, block_size, dtype, seed=seed)
    close(decode(batch, *mask, keys=keys), batch.expected(*mask))


@pytest.mark.parametrize("keys", [64, 256])
def test_padded_rows_are_zero_and_disturb_nobody(keys) -> None:
    """F4.7: a CUDA graph's batch is padded with rows of length 0 and a table of -1."""
    batch = random_paged_batch([(40, 1), (7, 1), (90, 1)], block_size=16)
    lengths, table = batch.seq_lens.clone(), batch.block_table.clone()
    lengths[1], table[1] = 0, -1
    out = decode(replace(batch, seq_lens=lengths, block_table=table), keys=keys)
    assert not out[1].any()
    close(out[[0, 2]], batch.expected()[[0, 2]])


def test_a_cache_in_another_precision() -> None:
    """A float32 model over a bfloat16 cache: keys and values are converted as they are loaded."""
    batch = random_paged_batch([(30, 1), (3, 1)], dtype=torch.bfloat16)
    batch = replace(batch, q=batch.q.float())
    close(decode(batch, keys=64), batch.expected())
    close(prefill(batch), batch.expected())


def test_attend_takes_the_kernel_that_fits_the_step() -> None:
    """F4.1: one signature for mixed steps and for decodes alone."""
    mixed, decodes = random_paged_batch(MIXED), random_paged_batch([(600, 1), (20, 1)])
    close(attend(mixed.q, mixed.k_cache, mixed.v_cache, metadata_of(mixed), mixed.scale), mixed.expected())
    close(attend(decodes.q, decodes.k_cache, decodes.v_cache, metadata_of(decodes), decodes.scale, 50, 2),
          decodes.expected(50, 2))


@pytest.mark.parametrize("mask", [(None, 0), (70, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_is_the_same_bits_in_any_batch(dtype, mask) -> None:
    """Alone, beside others, and in front of somebody's prompt; as one that could be longer, as under a CUDA graph."""
    lengths = [599, 19, 300]
    batch = random_paged_batch([*((n, 1) for n in lengths), (40, 30)], 3, 1, 16, 16, dtype)
    whole = metadata_of(batch)
    assert whole.num_decodes == 3
    together = attend(batch.q, batch.k_cache, batch.v_cache, whole, batch.scale, *mask)
    close(together, batch.expected(*mask))
    for i in range(3):
        one = replace(whole, query_start_loc=[0, 1], seq_lens=whole.seq_lens[i:i + 1],
                      block_table=whole.block_table[i:i + 1], max_query_len=1, query_starts=whole.query_starts[:2],
                      max_seq_len=lengths[i] + 1, num_decodes=1)
        for metadata in (one, replace(one, max_seq_len=5000)):
            alone = attend(batch.q[i:i + 1], batch.k_cache, batch.v_cache, metadata, batch.scale, *mask)
            assert torch.equal(alone[0], together[i])


def test_merge_is_exact() -> None:
    """F4.5: parts of a softmax in base 2, merged, against the softmax of everything; one part is not there."""
    generator = torch.Generator().manual_seed(0)
    scores, values = torch.randn(6, 3, 10, generator=generator) * 4, torch.randn(6, 3, 10, 16, generator=generator)
    row_max = scores.amax(-1)
    weights = torch.exp2(scores - row_max.unsqueeze(-1))
    parts, row_sum = torch.einsum("rsk,rskd->rsd", weights, values), weights.sum(-1)
    row_max, row_sum, parts = (torch.cat([x, torch.full_like(x[:, :1], empty)], dim=1)
                               for x, empty in ((row_max, torch.nan), (row_sum, torch.nan), (parts, torch.nan)))
    out = torch.empty(6, 16)
    lengths = torch.tensor([3 * 64] * 2, dtype=torch.int32)         # two sequences of three heads, and no fourth part
    merge_kernel[6,](parts, row_max, row_sum, out, lengths, 4, NUM_HEADS=3, HEAD_DIM=16, TILES_PER_SPLIT=1, BLOCK_N=64,
                     BLOCK_D=16, WINDOW=0, NUM_SINKS=0)
    probabilities = torch.softmax(scores.flatten(1).double() * torch.log(torch.tensor(2.0)), dim=-1)
    close(out, torch.einsum("rk,rkd->rd", probabilities, values.flatten(1, 2).double()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("size", [576, 1024])
def test_add_rms_norm_equals_the_readable_version(size, dtype) -> None:
    """F4.7: with and without an addend; x is changed in place, as torch changes it."""
    generator = torch.Generator().manual_seed(size)
    x, addend = (torch.randn(3, size, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(size, generator=generator).to(dtype)
    fast, readable = x.clone(), x.clone()
    close(TritonOps().add_rms_norm(fast, None, weight, 1e-5), TorchOps().add_rms_norm(readable, None, weight, 1e-5))
    assert torch.equal(fast, x)
    close(TritonOps().add_rms_norm(fast, addend, weight, 1e-5), TorchOps().add_rms_norm(readable, addend, weight, 1e-5))
    same_bits(fast, readable)


def same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the last bit, but for bfloat16: the interpreter cuts what a GPU rounds."""
    ulp = 2**-7 if actual.dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(actual, expected, rtol=ulp, atol=0.0)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_silu_mul_equals_the_readable_version(dtype) -> None:
    """F4.7: sizes that fill the last program, and that do not; a strided input."""
    generator = torch.Generator().manual_seed(0)
    for size in (1024, 1536, 40):
        gate_up = torch.randn(3, 2 * size + 8, generator=generator).to(dtype)[:, :2 * size]
        close(TritonOps().silu_mul(gate_up), TorchOps().silu_mul(gate_up.float()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (4, 2, 128), (3, 1, 80)])
@pytest.mark.parametrize("norm", [False, True])
def test_rotary_and_store_equals_the_model(norm, num_heads, num_kv_heads, head_dim, dtype) -> None:
    """F4.7: norm, rotation and store as in m0's attention layer; -1 stores nothing, other slots stay as they are."""
    generator = torch.Generator().manual_seed(head_dim)
    qkv = torch.randn(4, num_heads + 2 * num_kv_heads, head_dim, generator=generator).to(dtype)
    angles = torch.randn(4, 1, head_dim // 2, generator=generator).repeat(1, 1, 2)
    sign = torch.ones(head_dim).index_fill(0, torch.arange(head_dim // 2), -1.0)
    cos, signed_sin = angles.cos().to(dtype), (angles.sin() * sign).to(dtype)
    norms = tuple(torch.randn(head_dim, generator=generator).to(dtype) for _ in range(2)) if norm else None
    slots = torch.tensor([7, 0, -1, 3], dtype=torch.int32)
    k_cache, v_cache = torch.full((2, 9, num_kv_heads, head_dim), float("nan"), dtype=dtype)
    given = qkv.clone()
    q = rotary_and_store(given.flatten(1), cos, signed_sin, slots, k_cache, v_cache, norms, 1e-6)

    queries, keys, _ = qkv.float().split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        queries, keys = (normalised(x, weight) for x, weight in zip((queries, keys), norms, strict=True))
    queries, keys = (apply_rotary(x, cos.float(), signed_sin.float()) for x in (queries, keys))
    close(q, queries)
    assert torch.equal(given, qkv)
    stored, written = slots >= 0, slots[slots >= 0].long()
    close(k_cache[written], keys[stored])
    assert torch.equal(v_cache[written], qkv[stored, num_heads + num_kv_heads:])
    untouched = sorted(set(range(9)) - set(written.tolist()))
    assert k_cache[untouched].isnan().all() and v_cache[untouched].isnan().all()


def normalised(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    norm = RMSNorm(x.shape[-1], 1e-6)
    norm.weight.copy_(weight)
    return norm(x)


@pytest.mark.parametrize("cache_dtype", TOLERANCE)
def test_store_kv(cache_dtype) -> None:
    """Strided keys and values into their slots, in the cache's precision; -1 stores nothing."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(4, 7, 80, generator=generator)
    k, v = qkv[:, 1:4], qkv[:, 4:]
    slots = torch.tensor([5, -1, 0, 8], dtype=torch.int32)
    k_cache, v_cache = torch.full((2, 9, 3, 80), float("nan"), dtype=cache_dtype)
    store_kv(k, v, slots, k_cache, v_cache)
    for cache, new in ((k_cache, k), (v_cache, v)):
        same_bits(cache[[5, 0, 8]], new[[0, 2, 3]].to(cache_dtype))
        assert cache[[1, 2, 3, 4, 6, 7]].isnan().all()


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_tokens_of_the_engine(family, tiny_model) -> None:
    """F4.1, F4.7: the backend, the fused layers and padded decode steps together give milestone 3's tokens."""
    options = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True, "num_blocks": 8,
               "max_num_seqs": 3}
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 20, 3)]
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)

    def tokens(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    llm = LLM(str(tiny_model(family)), **options)
    model = fuse(llm.engine.runner.model, plain_layer_kernels(TritonOps()))
    runner = ModelRunner(model, GpuAttention(llm.cache, llm.manager.tables))
    llm.engine.runner = GraphRunner(runner, llm.manager.tables.block_size, 4, 64, capture=lambda run: run)
    assert tokens(llm) == tokens(LLM(str(tiny_model(family)), **options))


def test_forward_without_fused_layers(tiny_model) -> None:
    """F4.1: behind m0's own layers the backend gets q, k and v, and stores them itself."""
    options = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True, "num_blocks": 8}
    llm, reference = (LLM(str(tiny_model("qwen2")), **options) for _ in range(2))
    llm.engine.runner = ModelRunner(llm.engine.runner.model, GpuAttention(llm.cache, llm.manager.tables))
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    one, other = (engine.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)[0].outputs[0].token_ids
                  for engine in (llm, reference))
    assert one == other
