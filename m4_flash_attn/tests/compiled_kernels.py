"""The Triton kernels, compiled to machine code for two generations of GPUs. `test_triton.py` runs this file.

No GPU is needed. The wrappers are called with tensors that have shapes and no memory; what they would launch is
compiled instead. So the tiles under test are the ones that run.
"""
from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from m0_basics.config import DTYPES
from m0_basics.model_spec import ModelSpec
from m4_flash_attn import backends
from m4_flash_attn.backends import BACKENDS, Situation
from m4_flash_attn.kernels.triton import decode, elementwise, prefill, rotary

# Bytes of shared memory that a program may use: CUDA programming guide, table of capabilities. 8.0 has 166,912, but its
# tiles are those of 8.6, 8.9 and 12.0, too.
SHARED_MEMORY = {80: 101_376, 90: 232_448}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32",
            torch.int64: "*i64", torch.uint8: "*u8"}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")
SPEC = ModelSpec("LlamaForCausalLM", 8, 8, 8, 1, 4, 2, 64, 64, rms_norm_eps=1e-5, rope_theta=1e4,
                 tie_word_embeddings=False)
GROUPS = (1, 2, 3, 4, 7, 8, 15, 16)             # query heads per KV head: a tile of 16 rows holds them


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
    "large heads": Shape(8, 1, 256, 2048, 16384, True),     # stored by these kernels where a library attends
}
CASES = [("SmolLM2-135M", torch.bfloat16), ("SmolLM2-135M", torch.float32), ("Qwen3-0.6B", torch.bfloat16),
         ("Qwen3-0.6B", torch.float16), ("Phi-3-mini", torch.bfloat16), ("Qwen2.5-7B", torch.bfloat16),
         ("large heads", torch.bfloat16)]


def accepted() -> list[tuple[int, torch.dtype]]:
    """Every head size and type that the backend takes, by its own word."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_capability", lambda _: (8, 0))
        return [(size, dtype) for size in range(1, 513) for dtype in DTYPES.values()
                if BACKENDS["triton"].why_not(Situation(torch.device("cuda"), dtype, dtype,
                                                        replace(SPEC, head_dim=size), 16)) is None]


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
                if not parameter.do_not_specialize_on_alignment:
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
        options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
        recorded.append(Launch(kernel, dict(zip(kernel.arg_names, args, strict=False)) | kwargs, options))

    monkeypatch.setattr(JITFunction, "run", record)
    return recorded


def tensor(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def launch_attention(group: int, head_dim: int, dtype: torch.dtype, window: int | None, num_sinks: int) -> None:
    heads, kv_heads = 3 * group, 3
    q = tensor(1000, heads + 2 * kv_heads, head_dim, dtype=dtype)[:, :heads]
    cache = tensor(16_000, kv_heads, head_dim, dtype=dtype)
    prefill.paged_prefill(q, cache, cache, tensor(33), tensor(32), tensor(32, 64), 16, 500, 0.1, window, num_sinks)
    for keys_per_split in (1024, decode.KEYS_PER_SPLIT):        # one split, and several
        decode.paged_decode(q[:32], cache, cache, tensor(32), tensor(32, 64), 16, 1024, 0.1, window, num_sinks,
                            keys_per_split)


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


def compile_all(launches: list[Launch], architecture: int) -> list:
    """The kernels, side by side on all cores; each within its resources."""
    def compile_one(launch: Launch):
        compiled = launch.compile(architecture)
        check_resources(compiled, architecture)
        return compiled

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, launches))


def check_resources(compiled, architecture: int) -> None:
    """Within the memory of a multiprocessor, and nothing spilled: a stack is memory, where registers were meant."""
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]
    cubin = Path(compiled.metadata_group[f"{compiled.name}.cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    resources = dict(item.split(":") for item in usage.split() if item.startswith(("REG:", "STACK:", "LOCAL:")))
    assert 0 < int(resources["REG"]) <= 255
    assert resources["STACK"] == resources["LOCAL"] == "0", f"{compiled.name}: {usage}"


def test_what_is_accepted() -> None:
    """F4.1: heads of 16 to 128 in every type of model; `test_backends` reads what larger ones are told."""
    assert accepted() == [(size, dtype) for size in range(16, 129, 16) for dtype in DTYPES.values()]


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize(("head_dim", "dtype"), accepted())
def test_attention_compiles(head_dim, dtype, architecture, launches, monkeypatch) -> None:
    """F4.4, F4.5, F4.6: for tensor cores, within shared memory, without spills; windows for some."""
    monkeypatch.setattr(prefill, "capability", lambda device: divmod(architecture, 10))
    masks = [(None, 0), (300, 4)] if head_dim in (64, 128) and dtype is not torch.float16 else [(None, 0)]
    for mask in masks:
        launch_attention(GROUPS[head_dim // 16 - 1], head_dim, dtype, *mask)
    assert [launch.kernel.__name__ for launch in launches] == len(masks) * [
        "paged_prefill_kernel", "paged_decode_kernel", "paged_decode_kernel", "merge_kernel"]
    for compiled in compile_all(launches, architecture):
        product = {"paged_prefill_kernel": "wgmma" if architecture == 90 else "mma.sync",
                   "paged_decode_kernel": "mma.sync"}.get(compiled.name)
        if product is not None and dtype.itemsize == 2:
            assert product in compiled.asm["ptx"]


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("head_dim", [64, 128])
def test_other_gpus_take_tiles_that_were_compiled(head_dim, dtype) -> None:
    """Those with little shared memory take 8.0's, Blackwell for data centres takes 9.0's."""
    def tiles(*capability: int) -> prefill.Tiles:
        return prefill.prefill_tiles(head_dim, dtype, capability)

    assert tiles(8, 0) == tiles(8, 6) == tiles(8, 9) == tiles(12, 0)
    assert tiles(9, 0) == tiles(10, 0) == tiles(10, 3)


@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_elementwise_kernels_compile(name, dtype, architecture, launches) -> None:
    """F4.7: without spills."""
    launch_elementwise(SHAPES[name], dtype)
    assert [launch.kernel.__name__ for launch in launches] == [
        "add_rms_norm_kernel", "add_rms_norm_kernel", "silu_mul_kernel", "rotary_store_kernel", "store_kernel"]
    compile_all(launches, architecture)
