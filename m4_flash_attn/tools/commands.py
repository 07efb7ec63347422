"""`serve` and `soak` over this milestone's engine, and `env`: what this machine can run."""
from __future__ import annotations

from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from m0_basics.config import DTYPES
from m0_basics.loading.loader import load_spec, resolve_device, resolve_dtype, resolve_model
from m2_continuous_batching.tools.commands import online_commands

from ..backends import BACKENDS, Situation, choose
from ..config import EngineConfig
from ..kernels.cpu.build import BuildError, describe
from ..kernels.cpu.dtype import tier, with_auto_dtype
from ..llm import LLM


def env(engine_options: dict[str, Any]) -> None:
    """What attention can run on this machine, with this model: which is chosen, and why others are not available."""
    asked = EngineConfig.from_options(**engine_options)
    config = with_auto_dtype(asked)
    device = resolve_device(config.model_config.device)
    dtype = resolve_dtype(str(config.model_config.dtype), device)
    spec = load_spec(resolve_model(config.model_config.model, dtype))
    cache_dtype = DTYPES.get(config.cache_config.kv_cache_dtype, dtype)
    situation = Situation(device, dtype, cache_dtype, spec, config.cache_config.block_size)
    chosen = choose(config.attention_config.attention_backend, situation)
    table = Table(title=f"attention on {device}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}")
    for title in ("backend", "what it is", "here"):
        table.add_column(title, overflow="fold")
    for name, backend in BACKENDS.items():
        reason = backend.why_not(situation)
        table.add_row(name, backend.idea, "chosen" if backend is chosen else "available" if reason is None else reason)
    console = Console()
    console.print(table)
    if asked.model_config.dtype == "auto":
        why = f", measured to be the faster one with {tier()}" if config is not asked else ""
        console.print(f"dtype auto: {str(dtype).removeprefix('torch.')}{why}", soft_wrap=True)
    try:
        console.print(f"C++ kernels: {describe()}", soft_wrap=True)
    except BuildError as error:
        console.print(f"C++ kernels: {error}", soft_wrap=True)


COMMANDS = [*online_commands(LLM), env]
