"""Attention by libraries: `flash-attn` (2 or 4), and the variable-length attention that torch itself brings.

They take the cache as pages, [num_blocks, block_size, H_kv, D], which is the same memory: a block is a page. Nothing is
imported before a library is asked for, and where one cannot serve, the error says what to do instead.

T tokens in the step, B sequences, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from m0_basics.config import ConfigError

from ..metadata import FlashMetadata

PAGE_MULTIPLE = 256         # FlashAttention 2's tiles of keys divide it, so no tile crosses a page
_INSTALL_FLASH_ATTN = ("install it with `pip install flash-attn --no-build-isolation` (version 2: it is compiled, with "
                       "nvcc) or `pip install flash-attn-4` (Hopper and newer)")
_INSTALL_TORCH = "install torch 2.12 or newer"


class LibraryError(RuntimeError):
    """A library cannot serve; the message says why and what to do."""


class Attend(Protocol):
    """What every attention kernel of this milestone looks like."""

    def __call__(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: FlashMetadata, scale: float,
                 window: int | None = None, num_sinks: int = 0) -> Tensor:
        """q [T, H_q, D] over one layer's caches [num_slots, H_kv, D] -> [T, H_q, D]; k and v are stored already."""


def load_flash_attn(dtype: torch.dtype, block_size: int, capability: tuple[int, int]) -> Attend:
    """The `flash-attn` library: version 2 where it is installed and pages fit, else version 4.

    `capability` is the GPU's. Raises LibraryError. Version 4 reads whole pages, so slots that were never written must
    hold finite numbers.
    """
    _check_gpu(dtype, capability)
    version_2 = _functions("flash_attn", "flash_attn_varlen_func", "flash_attn_with_kvcache")
    if version_2 is not None and block_size % PAGE_MULTIPLE == 0:
        return _flash_attn_2(*version_2)
    version_4 = _functions("flash_attn.cute", "flash_attn_varlen_func") if capability >= (9, 0) else None
    if version_4 is not None:
        return _flash_attn_4(*version_4)
    if version_2 is not None:
        raise _pages_do_not_fit(block_size)
    raise LibraryError(f"the library is not installed; {_INSTALL_FLASH_ATTN}")


def load_torch_varlen(dtype: torch.dtype, block_size: int, capability: tuple[int, int]) -> Attend:
    """torch's `varlen_attn`, which takes a block table from version 2.12 on. Arguments and errors as above."""
    _check_gpu(dtype, capability)
    functions = _functions("torch.nn.attention.varlen", "varlen_attn")
    if functions is None or not {"block_table", "num_splits"} <= set(inspect.signature(functions[0]).parameters):
        raise LibraryError(f"torch {torch.__version__} has no varlen_attn with a block table; {_INSTALL_TORCH}")
    if block_size % PAGE_MULTIPLE:
        raise _pages_do_not_fit(block_size)
    return _torch_varlen(functions[0])


def _flash_attn_2(varlen: Callable[..., Any], with_kvcache: Callable[..., Any]) -> Attend:
    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: FlashMetadata, scale: float,
               window: int | None = None, num_sinks: int = 0) -> Tensor:
        _check_no_sinks("flash_attn", num_sinks)
        k, v = (_pages(cache, metadata.block_size) for cache in (k_cache, v_cache))
        left_right = (-1, -1) if window is None else (window - 1, 0)        # its window leaves out the query's own key
        if metadata.max_query_len == 1:         # this one splits the keys, the other does not
            return with_kvcache(q.unsqueeze(1), k, v, cache_seqlens=metadata.seq_lens,
                                block_table=metadata.block_table, softmax_scale=scale, causal=True,
                                window_size=left_right).squeeze(1)
        return varlen(q, k, v, metadata.query_starts, _key_starts(metadata), metadata.max_query_len,
                      metadata.max_seq_len, softmax_scale=scale, causal=True, window_size=left_right,
                      block_table=metadata.block_table)
    return attend


def _flash_attn_4(varlen: Callable[..., Any]) -> Attend:
    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: FlashMetadata, scale: float,
               window: int | None = None, num_sinks: int = 0) -> Tensor:
        _check_no_sinks("flash_attn", num_sinks)
        k, v = (_pages(cache, metadata.block_size) for cache in (k_cache, v_cache))
        out, _ = varlen(q, k, v, cu_seqlens_q=metadata.query_starts, max_seqlen_q=metadata.max_query_len,
                        seqused_k=metadata.seq_lens, page_table=metadata.block_table, softmax_scale=scale, causal=True,
                        window_size=(None, None) if window is None else (window - 1, 0))
        return out
    return attend


def _torch_varlen(varlen: Callable[..., Any]) -> Attend:
    def attend(q: Tensor, k_cache: Tensor, v_cache: Tensor, metadata: FlashMetadata, scale: float,
               window: int | None = None, num_sinks: int = 0) -> Tensor:
        _check_no_sinks("torch_varlen", num_sinks)
        k, v = (_pages(cache, metadata.block_size) for cache in (k_cache, v_cache))
        return varlen(q, k, v, metadata.query_starts, _key_starts(metadata), metadata.max_query_len,
                      metadata.max_seq_len, scale=scale, window_size=(-1 if window is None else window - 1, 0),
                      enable_gqa=q.shape[1] != k_cache.shape[1], seqused_k=metadata.seq_lens,
                      block_table=metadata.block_table,
                      num_splits=1)     # split keys over pages leave rows unwritten: pytorch#194167 (August 2026)
    return attend


def _pages(cache: Tensor, block_size: int) -> Tensor:
    """[num_slots, H_kv, D] -> [num_blocks, block_size, H_kv, D], the same memory."""
    return cache.view(-1, block_size, *cache.shape[1:])


def _key_starts(metadata: FlashMetadata) -> Tensor:
    """B + 1 offsets: where each sequence's keys would begin if they lay behind one another."""
    return F.pad(metadata.seq_lens.cumsum(0, dtype=torch.int32), (1, 0))


def _functions(module: str, *names: str) -> tuple[Callable[..., Any], ...] | None:
    """The functions of a module; None where it, or one of them, does not exist. LibraryError where it is broken."""
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.startswith(error.name):
            return None
        raise LibraryError(f"{module} is installed and cannot be imported: {error}") from error
    except Exception as error:                  # built for another torch, a library that is missing, ...
        raise LibraryError(f"{module} is installed and cannot be imported: {type(error).__name__}: {error}") from error
    return tuple(getattr(found, name) for name in names) if all(hasattr(found, name) for name in names) else None


def _check_gpu(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    if capability < (8, 0):
        raise LibraryError("it needs a GPU of compute capability 8.0 or newer, and this is {}.{}".format(*capability))
    if dtype not in (torch.float16, torch.bfloat16):
        raise LibraryError(f"it computes in float16 and bfloat16, not in {dtype}; set dtype='bfloat16'")


def _pages_do_not_fit(block_size: int) -> LibraryError:
    return LibraryError(f"its pages are {PAGE_MULTIPLE} tokens or a multiple of them, and block_size={block_size}; set "
                        f"block_size={PAGE_MULTIPLE}")


def _check_no_sinks(name: str, num_sinks: int) -> None:
    if num_sinks:
        raise ConfigError(f"num_sinks={num_sinks} is not valid; allowed: 0 with attention backend {name}")
