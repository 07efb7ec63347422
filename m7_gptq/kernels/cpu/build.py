"""The C++ kernels of quantised layers, as a library of their own, built against m4's headers."""
from __future__ import annotations

import ctypes
from pathlib import Path

from m4_flash_attn.kernels.cpu import build

SOURCES = Path(__file__).parent


def library(processor: tuple[str, ...] | None = None) -> ctypes.CDLL:
    """The library, built where this was not done before. Raises BuildError. `processor`: as of m4's `library`."""
    return build.library(processor, SOURCES, (build.SOURCES,))


def int8_tier() -> str:
    """The instructions that multiply activations of 8 bits on this machine.

    avx512_vnni, avx_vnni: vpdpbusd; avx512, avx2: vpmaddubsw; plain: what the compiler makes of it. Raises BuildError.
    """
    ask = library().quantized_int8_tier
    ask.restype = ctypes.c_char_p
    return bytes(ask()).decode()
