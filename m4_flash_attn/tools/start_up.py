"""From the start of the process to the first token: what somebody who types the command waits for.

    warm    the kernels lie in the cache: imports, weights, packing, the prompt
    cold    they do not: the same, and the compiler
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from m0_basics.loading.model_cache import cache_dir
from m0_basics.tools.bench import BenchError
from m0_basics.tools.cli.options import as_flags


def start_up(options: Mapping[str, Any], rounds: int = 3) -> dict[str, float]:
    """Seconds to the first token, kernels cold and warm, and what building them adds; medians of `rounds`.

    `options` are those of `LLM`; the model needs a tokenizer. Raises BenchError where the command fails.
    """
    pairs = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            _link_models(Path(folder))
            pairs.append((first_token_s(options, Path(folder)), first_token_s(options, Path(folder))))
    return {"cold_s": median(cold for cold, _ in pairs), "warm_s": median(warm for _, warm in pairs),
            "build_s": median(cold - warm for cold, warm in pairs)}


def first_token_s(options: Mapping[str, Any], cache: Path) -> float:
    """Start `generate` with this cache folder, and wait until it writes something."""
    command = [sys.executable, "-m", "m4_flash_attn", "generate", "The sea", "--max-tokens", "2", "--temperature", "0",
               "--no-stats", *as_flags(options)]
    environment = {**os.environ, "LLM_LAB_CACHE": str(cache)}
    with tempfile.TemporaryFile() as errors:
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment) as process:
            assert process.stdout is not None
            first = process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if not first or process.returncode != 0:
            errors.seek(0)
            raise BenchError(f"generate ended with status {process.returncode}: "
                             f"{errors.read().decode(errors='replace').strip()[-500:]}")
    return seconds



def _link_models(folder: Path) -> None:
    """The cache as it is, without kernels: converted models are not what is measured."""
    own = cache_dir()
    for entry in own.iterdir() if own.is_dir() else ():
        if entry.name != "kernels":
            (folder / entry.name).symlink_to(entry.resolve())
