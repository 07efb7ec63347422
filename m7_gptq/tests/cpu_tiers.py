"""The C++ kernels as other processors run them, as far as this one can.

    native         this machine's, as the engine runs them
    avx512_bf16    vdpbf16ps and vpdpbusd
    avx512         vpmaddubsw in registers of 512 bits
    avx_vnni       vpdpbusd in registers of 256 bits
    avx2           vpmaddubsw
    plain          the least there is on x86; elsewhere what the compiler makes of the same lines
"""
from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

from m7_gptq.kernels.cpu import build


@dataclass(frozen=True)
class Tier:
    """For which processor to compile, what that one must have, and which name its integer products go by."""

    flags: tuple[str, ...]
    needs: frozenset[str]
    int8: str


_V4 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq"})
TIERS = {
    "avx512_bf16": Tier(("-march=cooperlake",), _V4 | {"avx512_vnni", "avx512_bf16"}, "avx512_vnni"),
    "avx512": Tier(("-march=x86-64-v4",), _V4, "avx512"),
    "avx_vnni": Tier(("-march=x86-64-v3", "-mavxvnni"), frozenset({"avx2", "fma", "f16c", "avx_vnni"}), "avx_vnni"),
    "avx2": Tier(("-march=x86-64-v3",), frozenset({"avx2", "fma", "f16c"}), "avx2"),
    "plain": Tier(("-march=x86-64",), frozenset(), "plain"),
}


def _can_run(tier: Tier) -> bool:
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.exists() else ""
    return tier.needs <= set(flags.split())


RUNNABLE = ["native", *(name for name, tier in TIERS.items() if _can_run(tier))]


def tier_library(name: str) -> ctypes.CDLL:
    """The kernels of a tier, built where this was not done before. Raises BuildError."""
    return build.library(None if name == "native" else TIERS[name].flags)
