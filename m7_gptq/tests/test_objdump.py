"""The instructions that a tier is named after are in its library: a build that calls itself VNNI uses it."""
from __future__ import annotations

import platform
import re
import shutil
import subprocess
from functools import cache

import pytest

from m7_gptq.tests.cpu_tiers import TIERS, tier_library

pytestmark = [
    pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these are x86's instructions"),
]

USED = {"avx512_bf16": {"vpdpbusd": "zmm", "vdpbf16ps": "zmm", "vfmadd": "zmm"},
        "avx512": {"vpmaddubsw": "zmm", "vpmaddwd": "zmm", "vfmadd": "zmm"},
        "avx_vnni": {"vpdpbusd": "ymm", "vfmadd": "ymm"},
        "avx2": {"vpmaddubsw": "ymm", "vpmaddwd": "ymm", "vfmadd": "ymm"},
        "plain": {"pmullw": "xmm", "mulps": "xmm"}}
FOREIGN = {"avx512": r"vpdpbusd|vdpbf16ps", "avx_vnni": r"zmm|vpmaddubsw|vdpbf16ps", "avx2": r"zmm|vpdpbusd|vdpbf16ps",
           "plain": r"ymm|zmm|vpmadd|vfmadd"}


@cache
def code_of(tier: str) -> str:
    path = tier_library(tier)._name     # loading needs none of the instructions
    command = ["objdump", "-d", "--no-show-raw-insn", path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("tier", TIERS)
def test_instructions(tier: str) -> None:
    code = code_of(tier)
    for instruction, register in USED[tier].items():
        assert len(re.findall(rf"\b{instruction}\w*\s[^\n]*{register}", code)) >= 12, instruction
    if tier in FOREIGN:
        assert not re.search(FOREIGN[tier], code)
