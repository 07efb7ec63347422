"""Values of the Triton kernels in Triton's interpreter, on a CPU. `test_triton.py` runs this file in a process of its
own, with TRITON_INTERPRET=1. Memory around what a kernel may read or write holds NaN: touching it shows.
"""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from m0_basics import SamplingParams
from m0_basics.model_runner import ModelRunner
from m3_paged_kv import LLM
from m4_flash_attn.cuda_graph import GraphRunner
from m4_flash_attn.kernels.layer_kernels import plain_layer_kernels
from m4_flash_attn.kernels.triton import launch
from m4_flash_attn.kernels.triton.backend import GpuAttention
from m4_flash_attn.kernels.triton.elementwise import TritonOps
from m4_flash_attn.layers import GatedLinear, fuse
from m7_gptq.grid import QuantizedMatrix
from m7_gptq.kernels.triton import product
from m7_gptq.kernels.triton.linear import (
    TritonQuantizedEmbedding,
    TritonQuantizedGatedLinear,
    TritonQuantizedLinear,
    pack_embedding,
    quantized_layer_kernels,
)
from m7_gptq.kernels.triton.numbers import whole_number
from m7_gptq.kernels.triton.packing import pack
from m7_gptq.kernels.triton.product import multiply
from m7_gptq.linear import QuantizedEmbedding, QuantizedLinear
from m7_gptq.loading.memory import held_bytes
from m7_gptq.rtn import QuantizeOptions, round_to_nearest
from m7_gptq.tests.random_matrices import Kind, check_product, random_matrix, without_memory

FEW = settings(max_examples=25, deadline=None, derandomize=True)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
KINDS = st.builds(Kind, st.sampled_from([2, 3, 4, 8]), st.sampled_from([32, 64, 96, 128]), st.booleans(), st.booleans(),
                  st.booleans())
GUARD = 64              # elements before and behind what a kernel writes


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    """What is allocated by `new_empty` lies between guards, and is NaN until it is written."""
    whole, allocated = torch.Tensor.new_empty, []

    def between_guards(self: Tensor, *shape, **options) -> Tensor:
        size = torch.Size(shape).numel()
        if "device" in options:                 # the interpreter's own
            return whole(self, *shape, **options)
        memory = whole(self, size + 2 * GUARD, **options).fill_(torch.nan)
        allocated.append((memory, size))
        return memory[GUARD:GUARD + size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", between_guards)
    yield
    assert all(memory[:GUARD].isnan().all() and memory[GUARD + size:].isnan().all() for memory, size in allocated)


def rows_apart(x: Tensor) -> Tensor:
    """x [M, K] with NaN before, between and behind its rows."""
    memory = torch.full((len(x) + 2, x.shape[1] + 16), torch.nan, dtype=x.dtype)
    memory[1:-1, :-16] = x
    return memory[1:-1, :-16]


def draw(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_the_interpreter_is_on() -> None:
    assert launch.INTERPRETED
    assert type(product.product_kernel).__name__ == "InterpretedFunction"


@triton.jit
def numbers_kernel(out_ptr, BITS: tl.constexpr, COMPUTE: tl.constexpr):
    """out [zeros, codes]: every code less every zero point."""
    codes, zeros = tl.arange(0, 2 ** BITS), tl.arange(0, 2 ** BITS)
    numbers = whole_number(codes.to(tl.uint8)[None, :], zeros.to(tl.float32)[:, None], BITS, COMPUTE)
    tl.store(out_ptr + zeros[:, None] * 2 ** BITS + codes[None, :], numbers)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_codes_less_zero_points_are_exact(dtype, bits) -> None:
    """F7.3: all of them, in the types that a GPU multiplies in and the interpreter knows."""
    codes, out = torch.arange(2 ** bits), torch.empty(2 ** bits, 2 ** bits, dtype=dtype)
    numbers_kernel[1,](out, BITS=bits, COMPUTE=getattr(tl, str(dtype).removeprefix("torch.")))
    assert torch.equal(out, (codes[None, :] - codes[:, None]).to(dtype))


def test_four_bits_are_the_last_of_128_in_bfloat16() -> None:
    """F7.3: what the kernel does with bfloat16, which the interpreter cannot do, in torch."""
    codes = torch.arange(16, dtype=torch.int16)
    large = (codes | 0x4300).view(torch.bfloat16)
    assert large.tolist() == [128.0 + code for code in range(16)]
    assert torch.equal(large[None, :] - (128 + codes[:, None]).bfloat16(), (codes[None, :] - codes[:, None]).bfloat16())


@FEW
@given(st.integers(1, 140), st.integers(1, 4), st.integers(1, 40), KINDS, DTYPES, st.booleans(), st.integers(0, 9))
def test_the_product_is_exact_but_for_float32_sums(outputs, groups, rows, kind, dtype, has_bias, seed) -> None:
    """F7.3: any number of rows and outputs; every kind of grid; in the model's type and in float32, as logits are."""
    matrix = random_matrix(outputs, groups * kind.group, kind, seed)
    bias = draw(1, outputs, dtype, seed)[0] if has_bias else None
    x = rows_apart(draw(rows, groups * kind.group, dtype, seed))
    layer = TritonQuantizedLinear(matrix, bias, dtype, torch.float32 if seed % 2 else None)
    check_product(layer(x), x, matrix, bias)


@pytest.mark.parametrize(("rows", "group"), [(3, 32), (20, 128), (3, 1152)])
def test_splits_of_any_number(rows, group) -> None:
    """F7.3: inputs that make several splits, the last one shorter; and the same bits by one program as by several."""
    matrix = random_matrix(70, 1152, Kind(group=group))
    x, packed = draw(rows, 1152, torch.bfloat16), pack(matrix)
    tile = product.tile_inputs(packed, x.dtype)
    splits = -(-1152 // tile // product.tiles_per_split(packed, tile))
    assert splits > 2
    y = multiply(x, packed, None, torch.float32)
    check_product(y, x, matrix, None)
    assert torch.equal(y, multiply(x, packed, None, torch.float32, programs=1))


@pytest.mark.parametrize(("zeros", "gated"), [(True, True), (False, False)])
def test_a_row_is_the_same_bits_in_any_batch(zeros, gated) -> None:
    """F7.3: alone, and at any place among others; by one program and by several."""
    matrix = random_matrix(70, 256, Kind(group=64, zeros=zeros, ordered=True))
    x, packed = draw(13, 256, torch.float16), pack(matrix)
    together = multiply(x, packed, None, x.dtype, gated)
    for i in (0, 12):
        for programs in (1, 1000):
            assert torch.equal(multiply(x[i:i + 1], packed, None, x.dtype, gated, programs)[0], together[i])
    assert torch.equal(multiply(x.flip(0), packed, None, x.dtype, gated), together.flip(0))


@pytest.mark.parametrize(("outputs", "inputs", "group", "splits"), [
    (64, 128, 64, 1), (576, 576, 64, 3), (576, 1536, 64, 12), (1024, 3072, 128, 12), (4096, 4096, 128, 4),
    (49152, 576, 64, 1), (1, 32, 32, 1)])
def test_where_sums_are_cut_follows_from_the_matrix_alone(outputs, inputs, group, splits) -> None:
    """Enough programs for a GPU where the inputs suffice; every tile lies in one group and in one split."""
    packed = without_memory(outputs, inputs, Kind(group=group))
    tile = product.tile_inputs(packed, torch.bfloat16)
    per_split = product.tiles_per_split(packed, tile)
    assert group % tile == 0
    assert (splits - 1) * per_split < inputs // tile <= splits * per_split


@pytest.mark.parametrize("programs", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gated_equals_a_product_and_an_operation(dtype, programs) -> None:
    """F7.3: in the merge, and behind the product; the same bits."""
    matrix, x = random_matrix(90, 384, Kind(group=64)), draw(5, 384, dtype)
    bias = draw(1, 90, dtype, seed=1)[0]
    linear = TritonQuantizedLinear(matrix, bias, dtype)
    out = multiply(x, linear.packed, bias, dtype, gated=True, programs=programs)
    assert torch.equal(out, TritonOps().silu_mul(linear(x)))
    assert torch.equal(out, TritonQuantizedGatedLinear(linear)(x))
    gate, up = QuantizedLinear(matrix, bias, dtype)(x).double().chunk(2, dim=1)
    tolerance = 1e-5 if dtype is torch.float32 else 4e-3
    torch.testing.assert_close(out.double(), F.silu(gate) * up, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("zeros", [True, False])
def test_nan_stays_in_its_row_and_nowhere_else(zeros) -> None:
    """One NaN makes its row NaN, in a full tile of rows as among few."""
    matrix = random_matrix(70, 256, Kind(zeros=zeros))
    for rows in (3, 18):                        # of a tile for few, and for many
        x = draw(rows, 256, torch.bfloat16)
        clean = multiply(x, pack(matrix), None, torch.float32)
        x[1, 200] = torch.nan
        y = multiply(x, pack(matrix), None, torch.float32)
        others = [i for i in range(rows) if i != 1]
        assert y[1].isnan().all()
        assert torch.equal(y[others], clean[others])


def test_no_rows() -> None:
    """A step that asks for no logits."""
    layer = TritonQuantizedLinear(random_matrix(70, 256, Kind(zeros=False)), None, torch.float32)
    assert layer(torch.empty(0, 256)).shape == (0, 70)


@FEW
@given(st.integers(1, 40), st.integers(1, 6), KINDS, DTYPES, st.integers(0, 9))
def test_looking_up_is_dequantising(outputs, groups, kind, dtype, seed) -> None:
    """F7.3: to the last bit, but that the interpreter cuts to bfloat16 what a GPU rounds."""
    matrix = random_matrix(outputs, groups * kind.group, kind, seed)
    ids = torch.randint(0, outputs, (5,), generator=torch.Generator().manual_seed(seed))
    ids[0] = outputs - 1
    rows = TritonQuantizedEmbedding(pack(matrix), dtype)(ids)
    expected = QuantizedEmbedding(matrix, dtype)(ids)
    ulp = 2.0 ** -7 if dtype is torch.bfloat16 else 0.0
    torch.testing.assert_close(rows, expected, rtol=ulp, atol=0.0)


def test_what_a_layer_is_given_is_checked() -> None:
    """A kernel would read beyond the end."""
    layer = TritonQuantizedLinear(random_matrix(70, 64, Kind()), None, torch.bfloat16)
    for x in (torch.zeros(3, 64), torch.zeros(3, 32, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"not torch.bfloat16 \[T, 64\]"):
            layer(x)
        with pytest.raises(ValueError, match=r"not torch.bfloat16 \[T, 64\]"):
            TritonQuantizedGatedLinear(layer)(x)


def test_which_layers_are_packed() -> None:
    """Quantised ones whose groups hold whole strips; the others become what they are without this milestone."""
    plain = plain_layer_kernels(TritonOps())
    kernels = quantized_layer_kernels(plain, torch.float32)
    packs, short = (QuantizedLinear(random_matrix(64, 96, Kind(group=n)), None, torch.float32) for n in (32, 24))
    linear = nn.Linear(4, 4)
    assert [type(kernels.pack(layer)) for layer in (packs, short, linear)] == [
        TritonQuantizedLinear, QuantizedLinear, nn.Linear]
    assert [type(kernels.gate(layer)) for layer in (packs, short, linear)] == [
        TritonQuantizedGatedLinear, GatedLinear, GatedLinear]
    assert kernels.head(packs).out_dtype is torch.float32
    assert kernels.head(short) is short
    assert (kernels.ops, kernels.stack) == (plain.ops, plain.stack)
    embedding, head = QuantizedEmbedding(packs.matrix, torch.float32), kernels.head(packs)
    assert pack_embedding(embedding, head, is_tied=True).packed is head.packed
    assert pack_embedding(embedding, head, is_tied=False).packed is not head.packed
    unpacked = QuantizedEmbedding(short.matrix, torch.float32)
    assert pack_embedding(unpacked, short, is_tied=True) is unpacked


def test_bytes_held() -> None:
    """All that layers keep in memory; a matrix that is output matrix and embedding once."""
    bias = nn.Parameter(torch.zeros(64))
    linear = TritonQuantizedLinear(random_matrix(64, 96, Kind(4, 32, ordered=True)), bias, torch.bfloat16)
    gated = TritonQuantizedGatedLinear(TritonQuantizedLinear(random_matrix(64, 128, Kind(3, 64)), None, torch.float32))
    head = TritonQuantizedLinear(random_matrix(50, 96, Kind(8, 32)), None, torch.bfloat16, torch.float32)
    embedding = TritonQuantizedEmbedding(head.packed, torch.bfloat16)
    # codes; a word of two float16 for each group; eight bytes for each input that has an order; the bias in float32
    assert held_bytes(linear) == 64 * 96 // 2 + 4 * 64 * 3 + 8 * 96 + 4 * 64 == linear.nbytes
    assert held_bytes(gated) == 64 * 128 // 2 + 4 * 64 * 2 == gated.nbytes
    assert held_bytes(head) == 50 * 96 + 4 * 50 * 3 == head.nbytes == held_bytes(nn.ModuleList([head, embedding]))
    other = TritonQuantizedEmbedding(pack(random_matrix(50, 96, Kind(8, 32))), torch.bfloat16)
    model = nn.ModuleList([linear, gated, head, embedding, other, nn.Linear(4, 4, bias=False)])
    assert held_bytes(model) == linear.nbytes + gated.nbytes + 2 * head.nbytes + 4 * 4 * 4


def test_tokens_of_the_engine(tiny_model) -> None:
    """F7.3: packed layers, embedding and padded decode steps together give the readable layers' tokens."""
    options = {"dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True, "num_blocks": 8,
               "max_num_seqs": 2}
    prompts = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (1, 18)]
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)

    def tokens(llm: LLM) -> list[list[int]]:
        return [output.outputs[0].token_ids for output in llm.generate(prompts, params, use_tqdm=False)]

    readable, llm = (LLM(str(tiny_model("llama")), **options) for _ in range(2))
    for engine in (readable, llm):
        quantise(engine.engine.runner.model)
    model, embedding = llm.engine.runner.model, llm.engine.runner.model.embed_tokens
    fuse(model, quantized_layer_kernels(plain_layer_kernels(TritonOps()), torch.float32))
    model.embed_tokens = pack_embedding(embedding, model.lm_head, is_tied=True)
    assert not any(isinstance(module, (nn.Linear, QuantizedLinear)) for module in model.modules())
    runner = ModelRunner(model, GpuAttention(llm.cache, llm.manager.tables))
    llm.engine.runner = GraphRunner(runner, llm.manager.tables.block_size, 2, 64, capture=lambda run: run)
    assert tokens(llm) == tokens(readable)


def quantise(model) -> None:
    """Every linear layer to 8 bits, the embedding one with the output matrix."""
    def rounded(linear: nn.Linear) -> QuantizedMatrix:
        return round_to_nearest(linear.weight.float(), QuantizeOptions(8, 32, search=False))

    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, QuantizedLinear(rounded(module), module.bias, model.dtype))
    model.embed_tokens = QuantizedEmbedding(model.lm_head.matrix, model.dtype)
