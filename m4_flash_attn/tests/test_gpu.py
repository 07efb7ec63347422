"""The GPU's kernels, libraries and decode graphs. Run with `make gpu-check`; deselected elsewhere.

Triton is imported inside the tests: this file is also read where there is none.
"""
from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from m0_basics import SamplingParams
from m0_basics.model import apply_rotary
from m0_basics.model_spec import ModelSpec
from m0_basics.tools.testing.tiny_models import save_tiny_model
from m4_flash_attn import LLM
from m4_flash_attn.backends import BACKENDS, Situation
from m4_flash_attn.cuda_graph import GraphRunner
from m4_flash_attn.elementwise import TorchOps
from m4_flash_attn.kernels.flash_attn import load_flash_attn, load_torch_varlen
from m4_flash_attn.reference import MIXED, PagedBatch, random_paged_batch
from m4_flash_attn.tests.batches import metadata_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Qwen3-0.6B": (16, 8, 128), "Qwen2.5-7B": (28, 4, 128), "Phi-3": (32, 32, 96),
          "one group": (8, 1, 80), "tiny": (4, 2, 16)}
MASKS = [(None, 0), (1, 0), (100, 0), (100, 4), (70, 130)]
SPEC = ModelSpec("LlamaForCausalLM", 8, 8, 8, 1, 16, 8, 128, 64, rms_norm_eps=1e-5, rope_theta=1e4,
                 tie_word_embeddings=False)
LONG = [*MIXED, (0, 700), (1500, 1), (900, 300), (2047, 1)]
DECODES = [(n, 1) for n in (0, 1, 15, 16, 63, 64, 255, 700, 3000, 5000)]
PROMPTS = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 7, 40, 23, 12, 3, 30, 18, 9, 26)]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def gpu_batch(sequences, shape: str, dtype: torch.dtype, block_size: int = 16) -> PagedBatch:
    return random_paged_batch(sequences, *SHAPES[shape], block_size, dtype, "cuda")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sequences", [LONG, DECODES], ids=["mixed", "decodes"])
def test_triton_attention_equals_the_reference(sequences, shape, dtype) -> None:
    """F4.4, F4.6: NaN in every slot that belongs to no token."""
    from m4_flash_attn.kernels.triton.attention import attend
    for block_size, mask in product((16, 64), MASKS):
        batch = gpu_batch(sequences, shape, dtype, block_size)
        out = attend(batch.q, batch.k_cache, batch.v_cache, metadata_of(batch), batch.scale, *mask)
        close(out, batch.expected(*mask))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_decode_is_the_same_bits_in_any_batch(dtype) -> None:
    """Alone, beside others, and in front of somebody's prompt; as one that could be longer, as under a CUDA graph."""
    from m4_flash_attn.kernels.triton.attention import attend
    batch = gpu_batch([*DECODES, *LONG], SHAPES[0], dtype)
    n, whole = len(DECODES), metadata_of(batch)
    together = attend(batch.q, batch.k_cache, batch.v_cache, whole, batch.scale)
    for i in range(n):
        one = replace(whole, query_start_loc=[0, 1], seq_lens=whole.seq_lens[i:i + 1],
                      block_table=whole.block_table[i:i + 1], max_query_len=1, query_starts=whole.query_starts[:2],
                      max_seq_len=int(whole.seq_lens[i]), num_decodes=1)
        for metadata in (one, replace(one, max_seq_len=whole.max_seq_len)):
            alone = attend(batch.q[i:i + 1], batch.k_cache, batch.v_cache, metadata, batch.scale)
            assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("keys", [64, 256, 1024, 8192])
@pytest.mark.parametrize("shape", SHAPES)
def test_splits_change_nothing(shape, keys) -> None:
    """F4.5: splits of any size, also larger than every sequence; padded rows become 0."""
    from m4_flash_attn.kernels.triton.decode import paged_decode
    batch = gpu_batch(DECODES, shape, torch.float32)
    lengths, table = batch.seq_lens.clone(), batch.block_table.clone()
    lengths[3], table[3] = 0, -1
    batch = replace(batch, seq_lens=lengths, block_table=table)
    out = paged_decode(batch.q, batch.k_cache, batch.v_cache, batch.seq_lens, batch.block_table, batch.block_size, 5001,
                       batch.scale, keys_per_split=keys)
    assert not out[3].any()
    close(out, batch.expected())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sequences", [LONG, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("name", ["flash_attn", "torch_varlen"])
def test_libraries_equal_the_reference(name, sequences, dtype) -> None:
    """F4.1: as far as they are installed."""
    if (reason := BACKENDS[name].why_not(Situation(torch.device("cuda"), dtype, dtype, SPEC, 256))) is not None:
        pytest.skip(reason)
    load = load_flash_attn if name == "flash_attn" else load_torch_varlen
    attend = load(dtype, 256, torch.cuda.get_device_capability())
    batch = gpu_batch(sequences, "Qwen3-0.6B", dtype, block_size=256)
    batch = replace(batch, k_cache=batch.k_cache.nan_to_num(), v_cache=batch.v_cache.nan_to_num())
    for window in (None, 100):
        out = attend(batch.q, batch.k_cache, batch.v_cache, metadata_of(batch), batch.scale, window)
        close(out, batch.expected(window))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_elementwise_operations_equal_torchs(dtype) -> None:
    """F4.7: the sum that later layers read is torch's to the last bit."""
    from m4_flash_attn.kernels.triton.elementwise import TritonOps
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda").to(dtype)

    for tokens, size in ((1, 576), (333, 1024), (64, 3584)):
        x, addend, weight = draw(tokens, size), draw(tokens, size), draw(size)
        fast, readable = x.clone(), x.clone()
        close(TritonOps().add_rms_norm(fast, None, weight, 1e-5), TorchOps().add_rms_norm(x, None, weight, 1e-5))
        close(TritonOps().add_rms_norm(fast, addend, weight, 1e-5),
              TorchOps().add_rms_norm(readable, addend, weight, 1e-5))
        assert torch.equal(fast, readable)
        gate_up = draw(tokens, 2 * size)
        close(TritonOps().silu_mul(gate_up), TorchOps().silu_mul(gate_up.float()))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_rotary_and_store_equals_the_model(shape, norm, dtype) -> None:
    """F4.7: norm, rotation, and the slots that were named, no others."""
    from m4_flash_attn.kernels.triton.rotary import rotary_and_store
    num_heads, num_kv_heads, head_dim = SHAPES[shape]
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=generator, device="cuda").to(dtype)

    qkv = draw(50, num_heads + 2 * num_kv_heads, head_dim)
    cos, signed_sin = draw(50, 1, head_dim), draw(50, 1, head_dim)
    norms = (draw(head_dim), draw(head_dim)) if norm else None
    slots = torch.randperm(80, generator=generator, device="cuda", dtype=torch.int32)[:50]
    slots[7] = -1
    k_cache, v_cache = torch.full((2, 80, num_kv_heads, head_dim), float("nan"), dtype=dtype, device="cuda")
    q = rotary_and_store(qkv.flatten(1), cos, signed_sin, slots, k_cache, v_cache, norms, 1e-6)

    queries, keys, values = qkv.double().split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    if norms is not None:
        queries, keys = (torch.nn.functional.rms_norm(x, (head_dim,), weight.double(), 1e-6)
                         for x, weight in zip((queries, keys), norms, strict=True))
    queries, keys = (apply_rotary(x, cos.double(), signed_sin.double()) for x in (queries, keys))
    close(q, queries)
    stored = slots >= 0
    written = slots[stored].long()
    close(k_cache[written], keys[stored])
    assert torch.equal(v_cache[written], values[stored].to(dtype))
    assert int((~k_cache.isnan().flatten(1).all(1)).sum()) == len(written) == 49


def tokens(llm) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize("options", [{}, {"async_scheduling": True}, {"num_blocks": 9}])
@pytest.mark.parametrize("family", ["qwen3", "qwen2", "llama"])
def test_tokens_with_and_without_graphs(tmp_path, family, options) -> None:
    """F4.7: in float32 no greedy token depends on graphs, on fusion, on preemption or on the device."""
    folder = str(save_tiny_model(tmp_path / family, family))
    base = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, "num_blocks": 256,
            "max_num_seqs": 10}
    expected = tokens(LLM(folder, device="cpu", attention_backend="sdpa", **base))
    for variant in ({}, {"enforce_eager": True}, {"fused_layers": False}):
        llm = LLM(folder, device="cuda", attention_backend="triton", **{**base, **options, **variant})
        assert isinstance(llm.engine.runner, GraphRunner) == ("enforce_eager" not in variant)
        assert tokens(llm) == expected


def test_a_replayed_step_gives_the_eager_logits(tmp_path) -> None:
    """F4.7: in bfloat16, the same step twice: launched, and replayed with padding."""
    folder = str(save_tiny_model(tmp_path / "qwen3", "qwen3"))
    llm = LLM(folder, device="cuda", dtype="bfloat16", attention_backend="triton", max_model_len=128,
              skip_tokenizer_init=True, max_num_seqs=16)
    runner, compared = llm.engine.runner, 0
    replay = runner.execute

    def both(inputs):
        nonlocal compared
        eager = runner.runner.execute(inputs).clone()
        logits = replay(inputs)
        compared += runner.fits(inputs)
        torch.testing.assert_close(logits, eager, rtol=5e-2, atol=0.3)
        return logits

    runner.execute = both
    tokens(llm)
    assert compared >= GREEDY.max_tokens - 1
