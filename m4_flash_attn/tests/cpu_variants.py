"""The C++ kernels as other processors run them, as far as this one can.

    native    this machine's, as the engine runs them
    avx512    without products of bfloat16 pairs
    avx2      registers of 8 numbers
    sse2      the least there is on x86: registers of 4, as on Arm
"""
from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest
import torch

from m4_flash_attn.kernels.cpu import bindings, linear
from m4_flash_attn.kernels.cpu.build import library

_FLAGS = {"avx512": ("-march=x86-64-v4",), "avx2": ("-march=x86-64-v3",), "sse2": ("-march=x86-64",)}
_ABLE = {"AVX512": ["avx512", "avx2", "sse2"], "AVX2": ["avx2", "sse2"]}

VARIANTS = ["native", *_ABLE.get(torch.backends.cpu.get_cpu_capability(), [])]


def variant_library(name: str) -> ctypes.CDLL:
    """The kernels of that variant, built where this was not done before. Raises BuildError."""
    return library(_FLAGS.get(name))


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The kernels as they are compiled for several processors."""
    for module in (bindings, linear):
        monkeypatch.setattr(module, "library", lambda: variant_library(request.param))
    linear.choose.cache_clear()
    yield request.param
    linear.choose.cache_clear()


@pytest.fixture
def own_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Linear products by linear.hpp in bfloat16 too. On a processor with matrix tiles the engine takes oneDNN's, which
    are no part of a native call, and do not promise the same bits."""
    monkeypatch.setattr(linear, "_has_matrix_tiles", lambda: False)
    linear.choose.cache_clear()
    yield
    linear.choose.cache_clear()
