"""The two ceilings of this CPU, measured: no data sheet says what PyTorch gets out of it.

A roofline is made of peaks, so each figure is the best of several rounds: a round that another process
disturbed says nothing about the machine.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import psutil
import torch
from torch import Tensor

from m0_basics.attention import FullAttention, ScheduledSequence
from m0_basics.config import ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Sequence, SequenceData
from m0_basics.sampling_params import SamplingParams

from ..documents.factbook import Fact
from .calculators import prefill_bytes, prefill_flops
from .machine import cpu_name
from .roofline import Hardware, roofline_time

_MATRIX = {"float32": 1024, "bfloat16": 1024, "float16": 256}    # many CPUs have no fast float16 kernel: keep it short
_READ_BYTES = 256 << 20                                          # far beyond any cache


def measure_cpu(rounds: int = 9, read_bytes: int = _READ_BYTES, max_matrix: int = 1024) -> Hardware:
    """This CPU as `Hardware`, with the number of threads that PyTorch uses now.

    FLOP/s: a square matrix product in each format. Bytes/s: the sum over a large tensor, which only reads, as
    decode does.
    """
    peaks = {}
    for name, size in _MATRIX.items():
        size = min(size, max_matrix)
        a, b = (torch.randn(size, size).to(getattr(torch, name)) for _ in range(2))
        peaks[name] = 2 * size**3 / best_seconds(partial(torch.mm, a, b), rounds)
    bandwidth = read_bandwidth(torch.ones(read_bytes // 4), rounds)
    source = f"measured by m0_basics.tools.analysis.cpu_roofline, {torch.get_num_threads()} threads"
    return Hardware(cpu_name(), peaks, bandwidth, psutil.virtual_memory().total, source)


def read_bandwidth(values: Tensor, rounds: int = 9, choose: Callable[[list[float]], float] = min) -> float:
    """Bytes/s at which `values`, which no cache holds, are read, and only read: their sum.

    `choose` makes one time of all: the shortest for a peak, the median for what a moment offers.
    """
    return values.nbytes / choose(times_of(values.sum, rounds))


def matrix_vector_bandwidth(rounds: int = 9, read_bytes: int = _READ_BYTES) -> float:
    """Bytes/s of weights at which a bfloat16 matrix meets one row: what decode gets of the bandwidth."""
    weight = torch.zeros(read_bytes // 2 // 4096, 4096, dtype=torch.bfloat16)
    row = torch.zeros(1, 4096, dtype=torch.bfloat16)
    return read_bytes / best_seconds(partial(torch.nn.functional.linear, row, weight), rounds)


def best_seconds(run: Callable[[], object], rounds: int) -> float:
    """Shortest of `rounds` runs, after one that warms up."""
    return min(times_of(run, rounds))


def times_of(run: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each of `rounds` runs, after one that warms up."""
    run()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def attained(cpu: Hardware, prompt_len: int = 512, rounds: int = 5) -> dict[str, Fact]:
    """What the naive engine's model reaches of its bound: the default model prefills `prompt_len` tokens in bfloat16.

    The bound counts causal pairs only, so a kernel that computes masked ones too cannot reach it.
    """
    model = load_model(ModelConfig(dtype="bfloat16", device="cpu"))
    runner = ModelRunner(model, FullAttention())
    sequence = Sequence(0, SequenceData(list(range(1000, 1000 + prompt_len))), SamplingParams(temperature=0), 0)
    seconds = best_seconds(partial(runner.execute_model, [ScheduledSequence.rest(sequence)]), rounds)
    flops = prefill_flops(model.spec, prompt_len, causal=True).total
    num_bytes = prefill_bytes(model.spec, prompt_len).total
    bound = roofline_time(flops, num_bytes, cpu)
    name = f"cpu.prefill.{prompt_len}"
    return {f"{name}.measured_ms": Fact(seconds * 1e3, "ms"), f"{name}.bound_ms": Fact(bound.seconds * 1e3, "ms"),
            f"{name}.share_of_roofline": Fact(bound.seconds / seconds, "ratio"),
            f"{name}.tokens_per_second": Fact(prompt_len / seconds, "tokens/s")}


def ceilings(cpu: Hardware) -> dict[str, Fact]:
    """The measured peaks and the ridge points that follow."""
    facts = {f"cpu.{name}_gflops": Fact(peak / 1e9, "GFLOP/s") for name, peak in cpu.flops_per_second.items()}
    facts |= {f"cpu.ridge.{name}": Fact(cpu.ridge_point(name), "FLOP/byte") for name in ("float32", "bfloat16")}
    facts["cpu.bfloat16_over_float32"] = Fact(cpu.peak("bfloat16") / cpu.peak("float32"), "ratio")
    facts["cpu.float32_over_float16"] = Fact(cpu.peak("float32") / cpu.peak("float16"), "ratio")
    facts["cpu.read_gb_per_second"] = Fact(cpu.bytes_per_second / 1e9, "GB/s")
    return facts
