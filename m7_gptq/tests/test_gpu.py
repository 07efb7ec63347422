"""Packed weights on a GPU. Run with `make gpu-check`; deselected elsewhere.

Triton is imported inside the tests: this file is also read where there is none.
"""
from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from m0_basics import SamplingParams
from m0_basics.tools.testing.tiny_models import save_tiny_model
from m4_flash_attn.cuda_graph import CudaCapture, GraphRunner
from m7_gptq.linear import QuantizedEmbedding
from m7_gptq.tests.random_matrices import Kind, check_product, random_matrix

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = [Kind(bits, group, zeros, half, ordered) for bits, group, zeros, (half, ordered) in product(
    (4, 8), (32, 64, 128), (True, False), ((True, False), (False, True)))]
ROWS = (1, 2, 15, 16, 17, 33, 64, 300)
OF_SUMS = 2.0 ** -17        # tensor cores cut what they add; weights rounded to bfloat16 would lose eight times as much
LARGE = (8192, 8192)        # outputs and inputs, as in a model of 70 billion weights


def draw(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_product_is_exact_but_for_float32_sums(kind, dtype) -> None:
    """F7.3: few rows and many, outputs that fill no tile, inputs of one split and of several."""
    from m7_gptq.kernels.triton.linear import TritonQuantizedLinear
    for (outputs, inputs), rows in product(((576, 1536), (1001, 384), (6144, 1024)), (1, 40, 700)):
        matrix = random_matrix(outputs, inputs, kind, device="cuda")
        x, bias = draw(rows, inputs + 16, dtype)[:, :-16], draw(1, outputs, dtype, seed=1)[0]
        check_product(TritonQuantizedLinear(matrix, bias, dtype)(x), x, matrix, bias, OF_SUMS)
        check_product(TritonQuantizedLinear(matrix, None, dtype, torch.float32)(x), x, matrix, None, OF_SUMS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", KINDS[:8], ids=str)
def test_a_row_is_the_same_bits_in_any_batch(kind, gated, dtype) -> None:
    """F7.3: alone, among few and among many, and at any place; by one program and by several."""
    from m7_gptq.kernels.triton.packing import pack
    from m7_gptq.kernels.triton.product import multiply
    packed = pack(random_matrix(1536, 1536, kind, device="cuda"))
    x = draw(max(ROWS), 1536, dtype)
    alone = torch.cat([multiply(row, packed, None, dtype, gated) for row in x.split(1)])
    for rows, programs in product(ROWS, (1, 256, 10 ** 6)):
        assert torch.equal(multiply(x[:rows], packed, None, dtype, gated, programs), alone[:rows])
    assert torch.equal(multiply(x.flip(0), packed, None, dtype, gated), alone.flip(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_in_its_row_and_nowhere_else(dtype) -> None:
    """F7.3: also where a row behind the last one holds it."""
    from m7_gptq.kernels.triton.packing import pack
    from m7_gptq.kernels.triton.product import multiply
    for zeros, rows in product((True, False), (3, 40)):
        packed = pack(random_matrix(1000, 512, Kind(zeros=zeros), device="cuda"))
        x = draw(rows + 1, 512, dtype)
        clean = multiply(x[:rows], packed, None, dtype)
        x[1, 300], x[rows] = torch.nan, torch.nan
        y, others = multiply(x[:rows], packed, None, dtype), [i for i in range(rows) if i != 1]
        assert y[1].isnan().all()
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_looking_up_is_dequantising(kind, dtype) -> None:
    """F7.3: bit for bit."""
    from m7_gptq.kernels.triton.linear import TritonQuantizedEmbedding
    from m7_gptq.kernels.triton.packing import pack
    matrix = random_matrix(5000, 768, kind, device="cuda")
    ids = torch.randint(0, 5000, (70,), device="cuda")
    assert torch.equal(TritonQuantizedEmbedding(pack(matrix), dtype)(ids), QuantizedEmbedding(matrix, dtype)(ids))


@torch.inference_mode()
def test_a_recording_gives_the_eager_results() -> None:
    """F7.3: a graph of all kinds of layers, replayed on other inputs than it was recorded with."""
    from m7_gptq.kernels.triton.linear import (
        TritonQuantizedEmbedding,
        TritonQuantizedGatedLinear,
        TritonQuantizedLinear,
    )
    dtype = torch.bfloat16
    gate_up = TritonQuantizedLinear(random_matrix(1536, 512, Kind(group=64), device="cuda"), None, dtype)
    gated = TritonQuantizedGatedLinear(gate_up)
    down = TritonQuantizedLinear(random_matrix(512, 768, Kind(zeros=False, ordered=True), device="cuda"), None, dtype)
    head = TritonQuantizedLinear(random_matrix(3000, 512, Kind(8), device="cuda"), None, dtype, torch.float32)
    embedding = TritonQuantizedEmbedding(head.packed, dtype)
    for size in (1, 8, 48):
        ids, logits = torch.zeros(size, dtype=torch.int64, device="cuda"), draw(size, 3000, torch.float32)

        def run(ids: Tensor = ids, logits: Tensor = logits) -> None:
            logits.copy_(head(down(gated(embedding(ids)))))

        replay = CudaCapture()(run)
        for seed in range(3):
            ids.copy_(torch.randint(0, 3000, (size,), generator=torch.Generator().manual_seed(seed)))
            replay()
            torch.cuda.synchronize()
            replayed = logits.clone()
            run()
            assert torch.equal(replayed, logits)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_tokens_with_and_without_graphs(tmp_path, family) -> None:
    """F7.3: in float32 no greedy token depends on the device, on graphs or on packing."""
    from m7_gptq import LLM
    folder = str(save_tiny_model(tmp_path / family, family))
    base = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, "num_blocks": 256,
            "max_num_seqs": 10, "quantization": "rtn", "quantization_bits": 8, "quantization_group_size": 32}
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 7, 40, 23, 12)]
    greedy = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

    def tokens(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, greedy, use_tqdm=False)]

    expected = tokens(LLM(folder, device="cpu", attention_backend="sdpa", fused_layers=False, **base))
    for variant in ({}, {"enforce_eager": True}, {"fused_layers": False}):
        llm = LLM(folder, device="cuda", attention_backend="triton", **{**base, **variant})
        packed = [module for module in llm.engine.runner.model.modules() if hasattr(module, "packed")]
        assert bool(packed) == ("fused_layers" not in variant)
        assert isinstance(llm.engine.runner, GraphRunner) == ("enforce_eager" not in variant)
        assert tokens(llm) == expected


@torch.inference_mode()
def test_speed_of_a_decode(capsys) -> None:
    """F7.3: 4 bits against torch's product in bfloat16, under a graph; weights come from memory, not from a cache.

    It prints microseconds and the bytes of weights in a second. It fails only where 4 bits are not faster.
    """
    from m7_gptq.kernels.triton.linear import TritonQuantizedLinear
    outputs, inputs = LARGE
    copies = 4                              # 134 MB of codes: more than a GPU's cache
    packed = [TritonQuantizedLinear(random_matrix(outputs, inputs, Kind(group=128), seed=i, device="cuda"), None,
                                    torch.bfloat16) for i in range(copies)]
    plain = [draw(outputs, inputs, torch.bfloat16, seed=i) for i in range(copies)]
    for rows in (1, 16, 64):
        x = draw(rows, inputs, torch.bfloat16)
        fast = microseconds(lambda x=x: [layer(x) for layer in packed]) / copies
        slow = microseconds(lambda x=x: [torch.nn.functional.linear(x, weight) for weight in plain]) / copies
        with capsys.disabled():
            print(f"\n{rows:3} rows, {outputs} x {inputs}: 4 bits {fast:7.1f} us ({packed[0].nbytes / fast / 1e3:6.0f} "
                  f"GB/s), bfloat16 {slow:7.1f} us ({plain[0].nbytes / slow / 1e3:6.0f} GB/s), {slow / fast:.2f}x",
                  end="")
        assert rows > 1 or fast < slow


def microseconds(run) -> float:
    """Of a replayed recording: the median of 20."""
    replay, times = CudaCapture()(run), []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return sorted(times)[10]
