"""The Triton kernels, compiled to machine code for two generations of GPUs. `test_triton.py` runs this file.

No GPU is needed. The wrappers are called with tensors that have shapes and no memory; what they would launch is
compiled instead. So the tiles under test are the ones that run.
"""
from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from m4_flash_attn.kernels.triton import decode, elementwise, prefill, rotary

SHARED_MEMORY = {80: 166_912, 90: 232_448}      # bytes a program may use: CUDA programming guide, table of capabilities
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
MASKS = [(None, 0), (128, 4)]


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    qk_norm: bool


SHAPES = {
    "SmolLM2-135M": Shape(9, 3, 64, 576, 1536, False),
    "Qwen3-0.6B": Shape(16, 8, 128, 1024, 3072, True),
    "Phi-3-mini": Shape(32, 32, 96, 3072, 8192, False),
    "Qwen2.5-7B": Shape(28, 4, 128, 3584, 18944, False),
}
CASES = [("SmolLM2-135M", torch.bfloat16), ("SmolLM2-135M", torch.float32), ("Qwen3-0.6B", torch.bfloat16),
         ("Qwen3-0.6B", torch.float16), ("Phi-3-mini", torch.bfloat16), ("Qwen2.5-7B", torch.bfloat16)]


@dataclass(frozen=True)
class Launch:
    """One launch that a wrapper asked for."""

    kernel: JITFunction
    arguments: dict
    options: dict

    def compile(self, architecture: int):
        """The kernel as the just-in-time compiler would specialise it: 1 is a constant, multiples of 16 are known."""
        signature, constants, attributes = {}, {}, {}
        for i, parameter in enumerate(self.kernel.params):
            name, value, special = parameter.name, self.arguments[parameter.name], not parameter.do_not_specialize
            if isinstance(value, torch.Tensor):
                signature[name] = POINTERS[value.dtype]
                attributes[i,] = [["tt.divisibility", 16]]
            elif parameter.is_constexpr or (special and value == 1):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
                if special and isinstance(value, int) and value % 16 == 0:
                    attributes[i,] = [["tt.divisibility", 16]]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants, attrs=attributes)
        return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=self.options)


@pytest.fixture
def launches(monkeypatch) -> list[Launch]:
    """What the wrappers launch from now on; nothing runs."""
    recorded: list[Launch] = []

    def record(kernel, *args, grid, warmup, **kwargs):
        assert all(side > 0 for side in grid)
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        recorded.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    monkeypatch.setattr(JITFunction, "run", record)
    monkeypatch.setattr(decode, "num_sms", lambda device: 132)
    return recorded


def tensor(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_attention(shape: Shape, dtype: torch.dtype, window: int | None, num_sinks: int) -> None:
    heads, kv_heads, head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    q = tensor(1000, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    cache = tensor(16_000, kv_heads, head_dim, dtype=dtype)
    prefill.paged_prefill(q, cache, cache, tensor(33), tensor(32), tensor(32, 64), 16, 500, 0.1, window, num_sinks)
    for num_splits in (1, 16):
        decode.paged_decode(q[:32], cache, cache, tensor(32), tensor(32, 64), 16, 1024, 0.1, window, num_sinks,
                            num_splits)


def launch_elementwise(shape: Shape, dtype: torch.dtype) -> None:
    ops, head_dim = elementwise.TritonOps(), shape.head_dim
    x, weight = tensor(1000, shape.hidden, dtype=dtype), tensor(shape.hidden, dtype=dtype)
    ops.add_rms_norm(x, None, weight, 1e-5)
    ops.add_rms_norm(x, x, weight, 1e-5)
    ops.silu_mul(tensor(1000, 2 * shape.intermediate, dtype=dtype))
    qkv = tensor(1000, (shape.num_heads + 2 * shape.num_kv_heads) * head_dim, dtype=dtype)
    cache, angles = (tensor(16_000, shape.num_kv_heads, head_dim, dtype=dtype), tensor(1000, 1, head_dim, dtype=dtype))
    norms = (tensor(head_dim, dtype=dtype), tensor(head_dim, dtype=dtype)) if shape.qk_norm else None
    rotary.rotary_and_store(qkv, angles, angles, tensor(1000), cache, cache, norms, 1e-6)
    new = qkv.view(1000, -1, head_dim)[:, -shape.num_kv_heads:]
    rotary.store_kv(new, new, tensor(1000), cache, cache)


def check_resources(compiled, architecture: int) -> None:
    """Within the memory of a multiprocessor, and nothing spilled: a stack is memory, where registers were meant."""
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]
    cubin = Path(compiled.metadata_group[f"{compiled.name}.cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    resources = dict(item.split(":") for item in usage.split() if item.startswith(("REG:", "STACK:", "LOCAL:")))
    assert 0 < int(resources["REG"]) <= 255
    assert resources["STACK"] == resources["LOCAL"] == "0", f"{compiled.name}: {usage}"


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_attention_compiles(name, dtype, architecture, launches, monkeypatch) -> None:
    """F4.4, F4.5, F4.6: for tensor cores, within shared memory, without spills."""
    monkeypatch.setattr(prefill, "capability", lambda device: divmod(architecture, 10))
    for mask in MASKS:
        launch_attention(SHAPES[name], dtype, *mask)
    assert [launch.kernel.__name__ for launch in launches] == len(MASKS) * [
        "paged_prefill_kernel", "paged_decode_kernel", "paged_decode_kernel", "merge_kernel"]
    for launch in launches:
        compiled = launch.compile(architecture)
        check_resources(compiled, architecture)
        product = {"paged_prefill_kernel": "wgmma" if architecture == 90 else "mma.sync",
                   "paged_decode_kernel": "mma.sync"}.get(compiled.name)
        if product is not None and dtype.itemsize == 2:
            assert product in compiled.asm["ptx"]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_elementwise_kernels_compile(name, dtype, architecture, launches) -> None:
    """F4.7: without spills."""
    launch_elementwise(SHAPES[name], dtype)
    assert [launch.kernel.__name__ for launch in launches] == [
        "add_rms_norm_kernel", "add_rms_norm_kernel", "silu_mul_kernel", "rotary_store_kernel", "store_kernel"]
    for launch in launches:
        check_resources(launch.compile(architecture), architecture)
