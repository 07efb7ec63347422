"""The roofline: no step is faster than its arithmetic allows, nor than its memory traffic allows.

    time >= max(FLOPs / peak FLOP/s, bytes / bandwidth)

A step whose FLOPs per byte lie below the ridge point, peak / bandwidth, waits for memory; above it, for
arithmetic. Decode lies far below, prefill of a long prompt far above: that one fact shapes every engine. The
bound is a limit; real code stays behind it, and `cpu_roofline.py` measures by how much.
Source: Williams, Waterman and Patterson, "Roofline", 2009.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from m0_basics.config import reject
from m0_basics.model_spec import ModelSpec

from .calculators import (
    Dtype,
    Flops,
    Traffic,
    Work,
    arithmetic_intensity,
    decode_bytes,
    decode_flops,
    dtype_name,
    kv_bytes,
    step_bytes,
    step_flops,
    weight_bytes,
)
from .model_specs import SPECS


@dataclass(frozen=True)
class Hardware:
    """A processor's two ceilings, and the size of its memory."""

    name: str
    flops_per_second: Mapping[str, float] = field(hash=False)    # by dtype; dense, without sparsity
    bytes_per_second: float
    memory_bytes: float
    source: str

    def peak(self, dtype: Dtype) -> float:
        """FLOP/s in `dtype`. Raises ConfigError where this hardware has no figure for it."""
        name = dtype_name(dtype)
        if name not in self.flops_per_second:
            raise reject("dtype", dtype, f"{', '.join(self.flops_per_second)} (known for {self.name})")
        return self.flops_per_second[name]

    def ridge_point(self, dtype: Dtype = "bfloat16") -> float:
        """FLOPs per byte at which arithmetic and memory take the same time."""
        return self.peak(dtype) / self.bytes_per_second


def _nvidia(name: str, tflops: float, fp32_tflops: float, gb_per_second: float, gb: float, source: str,
            float8_tflops: float | None = None) -> Hardware:
    peaks = {"bfloat16": tflops * 1e12, "float16": tflops * 1e12, "float32": fp32_tflops * 1e12}
    if float8_tflops is not None:
        peaks["float8"] = float8_tflops * 1e12
    return Hardware(name, peaks, gb_per_second * 1e9, gb * 1e9, source)


# Tensor cores, dense, accumulating in float32; float32 is that of the ordinary cores (no TF32). Where a data
# sheet gives figures with sparsity only, they are halved.
HARDWARE: dict[str, Hardware] = {hardware.name: hardware for hardware in (
    _nvidia("A100-80GB-SXM", 312, 19.5, 2039, 80, "NVIDIA A100 data sheet"),
    _nvidia("H100-SXM", 989.4, 67, 3350, 80, "NVIDIA H100 data sheet, halved (sparsity)", 1978.9),
    _nvidia("H200-SXM", 989.4, 67, 4800, 141, "NVIDIA H200 data sheet, halved (sparsity)", 1978.9),
    _nvidia("RTX-4090", 165.2, 82.6, 1008, 24, "NVIDIA Ada architecture white paper, appendix A", 330.3),
    _nvidia("L4", 121, 30.3, 300, 24, "NVIDIA L4 data sheet, halved (sparsity)", 242.5),
)}


@dataclass(frozen=True)
class Bound:
    """The least time a step can take, and which of the two ceilings sets it."""

    compute_seconds: float
    memory_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.compute_seconds, self.memory_seconds)

    @property
    def binds(self) -> str:
        """"memory" or "compute"."""
        return "memory" if self.memory_seconds >= self.compute_seconds else "compute"


def roofline_time(flops: float, num_bytes: float, hardware: Hardware, dtype: Dtype = "bfloat16") -> Bound:
    """The bound of a step that computes `flops` and moves `num_bytes`, arithmetic in `dtype`."""
    return Bound(flops / hardware.peak(dtype), num_bytes / hardware.bytes_per_second)


def largest_useful_batch(spec: ModelSpec, hardware: Hardware, context: int, dtype: Dtype = "bfloat16") -> int | None:
    """Decode batch from which a step is bound by arithmetic: beyond it, latency grows as fast as throughput.

    A step of b sequences computes b f and moves W + b k bytes, so memory binds while

        b f / peak < (W + b k) / bandwidth,   hence up to   b = W / (f x bandwidth / peak - k).

    Returns None where f x bandwidth / peak <= k: each further sequence brings more bytes of keys and values than
    its arithmetic hides, so that no batch makes decode compute-bound (see `memory_bound_context`).
    """
    first, second = (decode_bytes(spec, context, batch, dtype).total for batch in (1, 2))
    per_sequence = second - first
    hidden_bytes = decode_flops(spec, context).total / hardware.ridge_point(dtype)
    if hidden_bytes <= per_sequence:
        return None
    return math.ceil((first - per_sequence) / (hidden_bytes - per_sequence))


def memory_bound_context(spec: ModelSpec, hardware: Hardware, dtype: Dtype = "bfloat16") -> int | None:
    """Context from which decode is bound by memory at every batch size, however large; None if there is none.

    About 2 P / (ridge point x KV bytes per token) for P parameters: fewer key-value heads move it out.
    """
    ridge = hardware.ridge_point(dtype)
    flops = [decode_flops(spec, context).total for context in (1, 2)]
    num_bytes = [decode_bytes(spec, c, 2, dtype).total - decode_bytes(spec, c, 1, dtype).total for c in (1, 2)]
    gap = flops[0] / ridge - num_bytes[0]                                       # at a context of one token
    shrinks = (num_bytes[1] - num_bytes[0]) - (flops[1] - flops[0]) / ridge     # with each further token
    if gap <= 0:
        return 1
    return None if shrinks <= 0 else 1 + math.ceil(gap / shrinks)


def max_sequences(spec: ModelSpec, hardware: Hardware, context: int, dtype: Dtype = "bfloat16",
                  memory_utilization: float = 0.9) -> int:
    """Sequences of `context` tokens whose keys and values fit beside the weights; 0 where the weights do not fit.

    `memory_utilization` is the share of the memory that an engine claims; activations are left out.
    """
    free = hardware.memory_bytes * memory_utilization - weight_bytes(spec, dtype)
    return max(0, int(free // kv_bytes(spec, context, dtype=dtype)))


@dataclass(frozen=True)
class RooflineRow:
    """One kind of step on one piece of hardware."""

    step: str                   # "prefill" or "decode"
    batch: int
    tokens: int                 # prompt tokens of each sequence, or the context each new token attends to
    flops: Flops
    traffic: Traffic
    bound: Bound

    @property
    def intensity(self) -> float:
        return arithmetic_intensity(self.flops, self.traffic)

    @property
    def tokens_per_second(self) -> float:
        """Tokens run per second at the bound: prompt tokens, or new ones."""
        return self.batch * (self.tokens if self.step == "prefill" else 1) / self.bound.seconds


def roofline_table(spec: ModelSpec, hardware: Hardware, dtype: Dtype = "bfloat16", prompt_len: int = 512,
                   context: int = 512, batch_sizes: Iterable[int] = (1, 4, 16, 64, 256)) -> list[RooflineRow]:
    """Prefill of `prompt_len` tokens and decode at `context`, at each batch size. Attention counts causal pairs."""
    rows = []
    for step, works in (("prefill", Work(prompt_len, prompt_len)), ("decode", Work(1, context))):
        for batch in batch_sizes:
            flops = step_flops(spec, [works] * batch, causal=True)
            traffic = step_bytes(spec, [works] * batch, dtype)
            bound = roofline_time(flops.total, traffic.total, hardware, dtype)
            rows.append(RooflineRow(step, batch, works.seq_len, flops, traffic, bound))
    return rows


def format_table(rows: Iterable[RooflineRow]) -> str:
    """The rows as a Markdown table."""
    lines = ["| step | batch | tokens | GFLOP | MB moved | FLOP/byte | ms at least | bound by | tokens/s at most |",
             "|---|--:|--:|--:|--:|--:|--:|---|--:|"]
    lines += [f"| {r.step} | {r.batch} | {r.tokens} | {r.flops.total / 1e9:,.1f} | {r.traffic.total / 1e6:,.1f} | "
              f"{r.intensity:,.1f} | {r.bound.seconds * 1e3:,.3f} | {r.bound.binds} | {r.tokens_per_second:,.0f} |"
              for r in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table: `python -m m0_basics.tools.analysis.roofline Qwen3-8B H100-SXM --context 2048`."""
    parser = argparse.ArgumentParser(prog="python -m m0_basics.tools.analysis.roofline",
                                     description="What the roofline allows.")
    parser.add_argument("model", choices=list(SPECS))
    parser.add_argument("hardware", choices=list(HARDWARE))
    parser.add_argument("--prompt-len", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--context", type=int, default=512, help="tokens that each new token attends to")
    options = parser.parse_args(arguments)
    spec, hardware = SPECS[options.model], HARDWARE[options.hardware]
    print(format_table(roofline_table(spec, hardware, prompt_len=options.prompt_len, context=options.context)))
    context = memory_bound_context(spec, hardware)
    print(f"\nridge point {hardware.ridge_point():,.0f} FLOP/byte ({hardware.source}); from a context of {context} "
          "tokens on, decode is bound by memory at every batch size")


if __name__ == "__main__":
    main()
