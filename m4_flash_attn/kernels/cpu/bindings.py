"""The C++ kernels as Python functions over tensors, and the structures that they share.

Every pointer is checked here, at the border: type, layout, and that the tensor stays alive while it is used.
"""
from __future__ import annotations

from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from m4_flash_attn.elementwise import ElementwiseOps
from m4_flash_attn.metadata import StepNumbers

from .build import library

DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 1024                 # of batch.hpp
_LAYERS = {torch.float32: "decoder_layers_f32", torch.bfloat16: "decoder_layers_bf16"}


class Shape(Structure):
    """`struct Shape` of batch.hpp: the same for the whole life of an engine."""

    _fields_ = [("num_heads", c_int32), ("num_kv_heads", c_int32), ("head_dim", c_int32), ("block_size", c_int32),
                ("window", c_int32), ("num_sinks", c_int32), ("is_bf16", c_int32), ("scale", c_float)]


class Batch(Structure):
    """`struct Batch` of batch.hpp: the same for all layers of a step."""

    _fields_ = [("num_tokens", c_int64), ("num_sequences", c_int64), ("max_blocks", c_int64),
                ("query_start_loc", c_void_p), ("seq_lens", c_void_p), ("block_table", c_void_p),
                ("slot_mapping", c_void_p)]


@dataclass(frozen=True)
class Step:
    """The C structure of a step, and what it points into."""

    batch: Batch
    memory: Any


def make_step(query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor) -> Step:
    """query_start_loc [B + 1], seq_lens [B], block_table [B, max_blocks], slot_mapping [T], all int32."""
    tensors = (query_start_loc, seq_lens, block_table, slot_mapping)
    assert all(t.dtype is torch.int32 and t.is_contiguous() for t in tensors)
    return Step(Batch(slot_mapping.numel(), seq_lens.numel(), block_table.shape[1], *(t.data_ptr() for t in tensors)),
                tensors)


def packed_step(num_tokens: int, num_sequences: int, packed: StepNumbers) -> Step:
    """What `make_step` makes of four tensors, from one array."""
    numbers = packed.numbers
    assert numbers.dtype == np.int32 and numbers.flags.c_contiguous
    assert num_sequences < packed.seq_lens_at and packed.seq_lens_at + num_sequences <= packed.slots_at
    assert packed.slots_at + num_tokens <= packed.block_table_at
    assert packed.block_table_at + num_sequences * packed.num_blocks == numbers.size
    address = torch.from_numpy(numbers).data_ptr()      # says what `numbers.ctypes.data` says, in half the time
    return Step(Batch(num_tokens, num_sequences, packed.num_blocks, address, address + 4 * packed.seq_lens_at,
                      address + 4 * packed.block_table_at, address + 4 * packed.slots_at), numbers)


@dataclass(frozen=True)
class NativeDecoder:
    """A `decoder.Decoder` as a C structure, and the library that was compiled for its kind of weights."""

    structure: Any
    kernels: CDLL


class PagedKernels:
    """Writing to the paged cache and attending over it, for one model and one layout of its cache."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
                 scale: float, window: int | None = None, num_sinks: int = 0) -> None:
        """`dtype`: float32 or bfloat16. A query sees the last `window` keys and the first `num_sinks`, or all of them.

        Raises BuildError where the kernels cannot be built.
        """
        assert head_dim % 16 == 0 and 0 < head_dim <= MAX_HEAD_DIM and num_heads % num_kv_heads == 0 and block_size > 0
        self.dtype = dtype
        self.width, self.kv_width = num_heads * head_dim, num_kv_heads * head_dim
        self._shape = Shape(num_heads, num_kv_heads, head_dim, block_size, window or 0, num_sinks, _is_bf16(dtype),
                            scale)
        self._shape_ref = byref(self._shape)
        self._functions = _functions(library())
        # Kept: fresh pages for every step would cost more than the work.
        self._workspace = torch.empty(0, dtype=torch.uint8)

    def store_kv(self, step: Step, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """k, v [T, H_kv, D] (rows may be strided) into the caches [num_slots, H_kv, D], at the step's slots."""
        assert k.shape[1:].numel() == v.shape[1:].numel() == self.kv_width
        self._functions["store_kv"](self._shape_ref, byref(step.batch), self._rows(step, k), self._rows(step, v),
                                    k.stride(0), v.stride(0), self._whole(k_cache), self._whole(v_cache))

    def rotate_store_kv(self, step: Step, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
                        rotary: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor) -> None:
        """qkv [T, (H_q + 2 H_kv) D]: q normed and rotated in place, k and v into the cache.

        rotary: cosines and signed sines [T, 1, D]; norms: weights [D] for q and k, where the model has them.
        """
        assert qkv.shape == (step.batch.num_tokens, self.width + 2 * self.kv_width)
        weights = map(self._whole, norms) if norms is not None else (None, None)
        self._functions["rotate_store_kv"](self._shape_ref, byref(step.batch), self._whole(qkv), *weights, eps,
                                           *self._rotary(step, rotary), self._whole(k_cache), self._whole(v_cache))

    def attend(self, step: Step, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """q: T rows that begin with [H_q, D], as [T, H_q, D] or the whole qkv does -> [T, H_q * D]."""
        assert q.shape[1:].numel() >= self.width
        out = torch.empty(step.batch.num_tokens, self.width, dtype=self.dtype)
        self._in_workspace(self._functions["attend_paged"], self._shape_ref, byref(step.batch), self._rows(step, q),
                           q.stride(0), self._whole(k_cache), self._whole(v_cache), out.data_ptr())
        return out

    def decoder_layers(self, step: Step, native: NativeDecoder, x: Tensor, rotary: tuple[Tensor, Tensor],
                       k_cache: Tensor, v_cache: Tensor, logits: Tensor | None) -> None:
        """x [T, hidden] through a whole decoder, in place; caches [layers, num_slots, H_kv, D].

        Where the decoder has an output matrix, `logits` [T, vocab], float32, may be given to be filled.
        """
        decoder = native.structure
        assert x.shape == (step.batch.num_tokens, decoder.hidden_size)
        assert k_cache.shape[0] == v_cache.shape[0] == decoder.num_layers
        assert logits is None or logits.shape == (step.batch.num_tokens, decoder.head.columns)
        self._in_workspace(_layers_function(native.kernels, self.dtype), self._shape_ref, byref(step.batch),
                           byref(decoder), self._whole(x), *self._rotary(step, rotary), self._whole(k_cache),
                           self._whole(v_cache), k_cache.stride(0),
                           None if logits is None else _address(logits, torch.float32))

    def _in_workspace(self, function: Any, *arguments: Any) -> None:
        """Call a kernel that works in our memory. Where that is too small, it does nothing and says how much it takes.

        So running out of memory is torch's exception, for this step alone.
        """
        while needed := function(*arguments, self._workspace.data_ptr(), self._workspace.nbytes):
            self._workspace = torch.empty(0, dtype=torch.uint8)     # the old one goes before there is a new one
            self._workspace = torch.empty(needed + needed // 8, dtype=torch.uint8)

    def _whole(self, x: Tensor) -> int:
        return _address(x, self.dtype)

    def _rows(self, step: Step, x: Tensor) -> int:
        """The address of x [T, H, D] or [T, n], whose rows may be apart from each other but not in pieces."""
        assert x.dtype is self.dtype and x.shape[0] == step.batch.num_tokens
        assert x.stride(-1) == 1 and (x.dim() == 2 or x.shape[1] == 1 or x.stride(1) == x.shape[2])
        return x.data_ptr()

    def _rotary(self, step: Step, rotary: tuple[Tensor, Tensor]) -> tuple[int, int]:
        cos, signed_sin = rotary
        assert cos.shape == signed_sin.shape == (step.batch.num_tokens, 1, self._shape.head_dim)
        return self._whole(cos), self._whole(signed_sin)


class CpuOps(ElementwiseOps):
    """The element-wise parts of a layer, each a single pass over its rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: float32 or bfloat16. Raises BuildError where the kernels cannot be built."""
        self.dtype = dtype
        self._bf16 = _is_bf16(dtype)
        self._functions = _functions(library())

    def add_rms_norm(self, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        assert (addend is None or addend.shape == x.shape) and weight.shape == x.shape[1:]
        out = torch.empty_like(x)
        self._functions["add_rms_norm"](self._bf16, x.shape[0], x.shape[1], _address(x, self.dtype),
                                        None if addend is None else _address(addend, self.dtype),
                                        _address(weight, self.dtype), eps, out.data_ptr())
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=self.dtype)
        self._functions["silu_mul"](self._bf16, out.shape[0], out.shape[1], _address(gate_up, self.dtype),
                                    out.data_ptr())
        return out


def _is_bf16(dtype: torch.dtype) -> int:
    assert dtype in DTYPES, f"the kernels know {DTYPES}"
    return int(dtype is torch.bfloat16)


def _address(x: Tensor, dtype: torch.dtype) -> int:
    assert x.dtype is dtype and x.is_contiguous()
    return x.data_ptr()


@cache
def _functions(kernels: CDLL) -> dict[str, Any]:
    shape, batch = POINTER(Shape), POINTER(Batch)
    signatures: dict[str, list[Any]] = {
        "store_kv": [shape, batch, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p],
        "rotate_store_kv": [shape, batch, *[c_void_p] * 3, c_float, *[c_void_p] * 4],
        "attend_paged": [shape, batch, c_void_p, c_int64, *[c_void_p] * 4, c_int64],
        "add_rms_norm": [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_float, c_void_p],
        "silu_mul": [c_int32, c_int64, c_int64, c_void_p, c_void_p]}
    functions = {}
    for name, argtypes in signatures.items():
        functions[name] = getattr(kernels, name)
        functions[name].argtypes = argtypes
        functions[name].restype = c_int64 if name == "attend_paged" else None      # 0, or the bytes that it lacks
    return functions


@cache
def _layers_function(kernels: CDLL, dtype: torch.dtype) -> Any:
    """All layers in one call, of any library that has them. Returns 0, or the bytes that its workspace lacks."""
    function = getattr(kernels, _LAYERS[dtype])
    function.argtypes = [POINTER(Shape), POINTER(Batch), *[c_void_p] * 6, c_int64, c_void_p, c_void_p, c_int64]
    function.restype = c_int64
    return function
