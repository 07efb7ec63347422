"""What dtype="auto" means on a CPU with these kernels: the format in which they are faster, by measurement.

    avx512_bf16   bfloat16    products of bfloat16 pairs, half the bytes
    avx2          bfloat16    half the bytes; widened on the way to float32 arithmetic, which costs next to nothing
    others        as milestone 0 says: they were not measured

In decode the bytes decide; in a batch, whether widening a weight takes longer than multiplying it.
`python -m m4_flash_attn bench` measures both.
"""
from __future__ import annotations

import ctypes
from dataclasses import replace
from typing import TypeVar

from m0_basics.loading.loader import resolve_device
from m4_flash_attn.config import EngineConfig

from .build import BuildError, library

Config = TypeVar("Config", bound=EngineConfig)
FASTER = {"avx512_bf16": "bfloat16", "avx2": "bfloat16"}


def with_auto_dtype(config: Config, has_cache_plugins: bool = False) -> Config:
    """The configuration with the kernels' own choice for dtype="auto", where they have one and will run."""
    model, attention = config.model_config, config.attention_config
    will_run = attention.fused_layers and attention.attention_backend in ("auto", "cpu") and not has_cache_plugins
    if model.dtype != "auto" or not will_run or resolve_device(model.device).type != "cpu":
        return config
    try:
        faster = FASTER.get(tier(), "auto")
    except BuildError:
        return config
    if config.cache_config.kv_cache_dtype not in ("auto", faster):      # the kernels' cache has the model's dtype
        return config
    return replace(config, model_config=replace(model, dtype=faster))


def tier() -> str:
    """The widest instructions that this machine's kernels use. Raises BuildError where there are none."""
    ask = library().kernels_tier
    ask.restype = ctypes.c_char_p
    return bytes(ask()).decode()
