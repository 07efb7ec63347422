"""The C++ kernels as Python functions over tensors, and the structures that they share.

Every pointer is checked here, at the border: type, layout, and that the tensor stays alive while it is used.
"""
from __future__ import annotations

from ctypes import POINTER, Array, Structure, byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...ops import ElementwiseOps
from .build import library

DTYPES = (torch.float32, torch.bfloat16)
MAX_HEAD_DIM = 1024                 # of attention.cpp


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
    """The C structure of a step, and the tensors that it points into."""

    batch: Batch
    tensors: tuple[Tensor, ...]


def make_step(query_start_loc: Tensor, seq_lens: Tensor, block_table: Tensor, slot_mapping: Tensor) -> Step:
    """query_start_loc [B + 1], seq_lens [B], block_table [B, max_blocks], slot_mapping [T], all int32."""
    tensors = (query_start_loc, seq_lens, block_table, slot_mapping)
    assert all(t.dtype is torch.int32 and t.is_contiguous() for t in tensors)
    return Step(Batch(slot_mapping.numel(), seq_lens.numel(), block_table.shape[1], *(t.data_ptr() for t in tensors)),
                tensors)


class PagedKernels:
    """Writing to the paged cache and attending over it, for one model and one layout of its cache."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: torch.dtype,
                 scale: float, window: int | None = None, num_sinks: int = 0) -> None:
        """`dtype`: float32 or bfloat16. A query sees the last `window` keys and the first `num_sinks`, or all of them.

        Raises BuildError where the kernels cannot be built.
        """
        self.dtype = dtype
        self.width = num_heads * head_dim
        self._shape = Shape(num_heads, num_kv_heads, head_dim, block_size, window or 0, num_sinks, _is_bf16(dtype),
                            scale)
        self._shape_ref = byref(self._shape)
        self._functions = _functions()

    def store_kv(self, step: Step, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
        """k, v [T, H_kv, D] (rows may be strided) into the caches [num_slots, H_kv, D], at the step's slots."""
        self._functions["store_kv"](self._shape_ref, byref(step.batch), _rows(k), _rows(v), k.stride(0), v.stride(0),
                                    k_cache.data_ptr(), v_cache.data_ptr())

    def rotate_store_kv(self, step: Step, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
                        rotary: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor) -> None:
        """qkv [T, (H_q + 2 H_kv) D]: q normed and rotated in place, k and v into the cache.

        rotary: cosines and signed sines [T, 1, D]; norms: weights [D] for q and k, where the model has them.
        """
        cos, signed_sin = rotary
        assert qkv.is_contiguous() and qkv.dtype is self.dtype
        q_norm, k_norm = (n.data_ptr() for n in norms) if norms is not None else (None, None)
        self._functions["rotate_store_kv"](self._shape_ref, byref(step.batch), qkv.data_ptr(), q_norm, k_norm, eps,
                                           cos.data_ptr(), signed_sin.data_ptr(), k_cache.data_ptr(),
                                           v_cache.data_ptr())

    def attend(self, step: Step, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        """q: T rows that begin with [H_q, D], as [T, H_q, D] or the whole qkv does -> [T, H_q * D]."""
        assert q.dtype is self.dtype and q.stride(-1) == 1
        out = torch.empty(step.batch.num_tokens, self.width, dtype=self.dtype)
        self._functions["attend_paged"](self._shape_ref, byref(step.batch), q.data_ptr(), q.stride(0),
                                        k_cache.data_ptr(), v_cache.data_ptr(), out.data_ptr())
        return out

    def decoder_layers(self, step: Step, layers: Array[Any], eps: float, x: Tensor, rotary: tuple[Tensor, Tensor],
                       k_cache: Tensor, v_cache: Tensor) -> None:
        """x [T, hidden] through all `layers` (`decoder.Layer`), in place; caches [layers, num_slots, H_kv, D]."""
        assert x.is_contiguous() and x.dtype is self.dtype
        cos, signed_sin = rotary
        self._functions["decoder_layers"](self._shape_ref, byref(step.batch), layers, len(layers), eps, x.data_ptr(),
                                          cos.data_ptr(), signed_sin.data_ptr(), k_cache.data_ptr(),
                                          v_cache.data_ptr(), k_cache.stride(0))


class CpuOps(ElementwiseOps):
    """The element-wise parts of a layer, each a single pass over its rows."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: float32 or bfloat16. Raises BuildError where the kernels cannot be built."""
        self.dtype = dtype
        self._bf16 = _is_bf16(dtype)
        self._functions = _functions()

    def add_rms_norm(self, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        assert x.is_contiguous() and (addend is None or addend.is_contiguous())
        out = torch.empty_like(x)
        self._functions["add_rms_norm"](self._bf16, x.shape[0], x.shape[1], x.data_ptr(),
                                        None if addend is None else addend.data_ptr(), weight.data_ptr(), eps,
                                        out.data_ptr())
        return out

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        assert gate_up.is_contiguous()
        out = torch.empty(gate_up.shape[0], gate_up.shape[1] // 2, dtype=self.dtype)
        self._functions["silu_mul"](self._bf16, out.shape[0], out.shape[1], gate_up.data_ptr(), out.data_ptr())
        return out


def _is_bf16(dtype: torch.dtype) -> int:
    assert dtype in DTYPES, f"the kernels know {DTYPES}"
    return int(dtype is torch.bfloat16)


def _rows(x: Tensor) -> int:
    """The address of x [T, H, D], whose rows may be apart from each other but not in pieces."""
    assert x.stride(2) == 1 and x.stride(1) == x.shape[2]
    return x.data_ptr()


@cache
def _functions() -> dict[str, Any]:
    shape, batch = POINTER(Shape), POINTER(Batch)
    signatures: dict[str, list[Any]] = {
        "store_kv": [shape, batch, c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p],
        "rotate_store_kv": [shape, batch, *[c_void_p] * 3, c_float, *[c_void_p] * 4],
        "attend_paged": [shape, batch, c_void_p, c_int64, c_void_p, c_void_p, c_void_p],
        "decoder_layers": [shape, batch, c_void_p, c_int32, c_float, *[c_void_p] * 5, c_int64],
        "add_rms_norm": [c_int32, c_int64, c_int64, c_void_p, c_void_p, c_void_p, c_float, c_void_p],
        "silu_mul": [c_int32, c_int64, c_int64, c_void_p, c_void_p]}
    functions = {}
    for name, argtypes in signatures.items():
        functions[name] = getattr(library(), name)
        functions[name].argtypes, functions[name].restype = argtypes, None
    return functions
