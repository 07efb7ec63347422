"""The Triton kernels, compiled to machine code for two generations of GPUs. `test_triton.py` runs this file.

No GPU is needed: m4's `Launch` compiles what a wrapper would launch on tensors that have shapes and no memory.
"""
from __future__ import annotations

import re

import pytest
import torch
from triton.runtime.jit import JITFunction

from m4_flash_attn.tests.compiled_kernels import OPTIONS, SHARED_MEMORY, Launch, compile_all
from m7_gptq.kernels.triton.lookup import look_up
from m7_gptq.kernels.triton.product import multiply
from m7_gptq.tests.random_matrices import Kind, without_memory

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DECODE, PROMPT = 1, 2000            # rows of x
# Every bits, kind of grid, size of tile and type, with few rows and with many, somewhere.
CASES = [
    (DECODE, BF16, Kind(group=128)), (DECODE, BF16, Kind(group=64, ordered=True)),
    (DECODE, BF16, Kind(group=32, zeros=False)), (DECODE, FP16, Kind(bits=8, group=128, half=False)),
    (DECODE, FP32, Kind(group=64)), (PROMPT, BF16, Kind(group=128)), (PROMPT, BF16, Kind(group=32, zeros=False)),
    (PROMPT, FP16, Kind(group=128, zeros=False, half=False)), (PROMPT, BF16, Kind(bits=8, group=32)),
    (PROMPT, FP32, Kind(bits=8, group=32, zeros=False, ordered=True)),
]


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    """What the wrappers launch from now on; nothing runs."""
    recorded: list[Launch] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        assert 0 < grid[0] < 2 ** 31
        assert all(0 < side < 2 ** 16 for side in grid[1:])
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        recorded.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    monkeypatch.setattr(JITFunction, "run", record)
    return recorded


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize(("rows", "dtype", "kind"), CASES, ids=str)
def test_the_product_compiles(rows, dtype, kind, architecture, launches) -> None:
    """F7.3: on tensor cores, by the same instruction whatever the tile; weights and scales fetched ahead, codes in
    pieces of at least 8 bytes; no spills, within shared memory."""
    packed = without_memory(4096, 4096, kind)
    multiply(torch.empty(rows, 4096, dtype=dtype, device="meta"), packed,
             torch.empty(4096, dtype=dtype, device="meta"), dtype, gated=True)
    prepared = ["prepare_kernel"] if kind.ordered or not kind.zeros else []
    last = "merge_kernel" if rows == DECODE else "silu_mul_kernel"
    assert [launch.kernel.__name__ for launch in launches] == [*prepared, "product_kernel", last]
    product = next(c for c in compile_all(launches, architecture) if c.name == "product_kernel").asm["ptx"]
    assert "wgmma" not in product
    if dtype is not FP32:
        assert set(re.findall(r"mma\.sync\S*\.(m\d+n\d+k\d+)\.", product)) == {"m16n8k16"}
    # Where loads are copied ahead, none is left that stops the loop; a bias is loaded behind it.
    assert len(re.findall(r"ld\.global", product)) <= (0 if rows == DECODE else 8)
    assert set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(\w+)", product)) & {"8", "10"}


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize("kind", [Kind(), Kind(bits=8, zeros=False, half=False, ordered=True)], ids=str)
def test_the_lookup_compiles(kind, architecture, launches) -> None:
    """F7.3: with two roundings where `dequantise` rounds twice."""
    look_up(torch.empty(100, dtype=torch.int64, device="meta"), without_memory(49152, 576, kind), BF16)
    (compiled,) = compile_all(launches, architecture)
    assert "fma.rn.f32" not in compiled.asm["ptx"]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_a_product_without_bias_and_gate_compiles(architecture, launches) -> None:
    """As the output matrix is: float32 logits, outputs that fill no tile."""
    x = torch.empty(DECODE, 576, dtype=BF16, device="meta")
    multiply(x, without_memory(50_001, 576, Kind(group=64)), None, FP32)
    assert [launch.kernel.__name__ for launch in launches] == ["product_kernel"]
    compile_all(launches, architecture)
