"""Where the time of a decode step goes: the engine's own parts, each with a stopwatch around it.

    whole   as the engine runs: all layers and the output matrix are one call into C++, then the sampler
    apart   layer by layer and part by part, so that linear layers and attention can be told apart; calls cost more

What is in no part is Python's: scheduling, metadata, the calls themselves, outputs.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

from m0_basics.loading.loader import load_model
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Sequence as Generation
from m0_basics.sampler import Sampler, SamplerOutput
from m0_basics.sampling_params import SamplingParams
from m2_continuous_batching.engine import LLMEngine
from m2_continuous_batching.tools.step_costs import decode_steps

from ..elementwise import ElementwiseOps
from ..kernels.cpu.attention import CpuAttention
from ..kernels.cpu.bindings import NativeDecoder, PagedKernels, Step
from ..kernels.cpu.runner import DecodeRunner, can_decode
from ..kernels.layer_kernels import layer_kernels_for, one_by_one
from ..layers import FusedDecoderLayer, FusedRMSNorm, LayerKernels, Stacked, fuse
from ..llm import LLM

PARTS = ("lookups", "layers", "linear", "attention", "elementwise", "sampling")     # lookups: embeddings, rotary tables
P = ParamSpec("P")
R = TypeVar("R")


class Stopwatch:
    """Seconds by part, since the last lap."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def time(self, part: str, run: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `run`, and count its time as `part`'s."""
        start = time.perf_counter()
        result = run(*args, **kwargs)
        self.seconds[part] += time.perf_counter() - start
        return result

    def lap(self) -> dict[str, float]:
        """The seconds, which begin at 0 again."""
        seconds, self.seconds = self.seconds, dict.fromkeys(PARTS, 0.0)
        return seconds


class TimedModule(nn.Module):
    """Any module, as a part."""

    def __init__(self, watch: Stopwatch, part: str, inner: nn.Module) -> None:
        super().__init__()
        self.watch, self.part, self.inner = watch, part, inner

    def forward(self, *args: Any) -> Any:
        return self.watch.time(self.part, self.inner, *args)


class TimedOps(ElementwiseOps):
    """Any element-wise operations."""

    def __init__(self, watch: Stopwatch, inner: ElementwiseOps) -> None:
        self.watch, self.inner = watch, inner

    def add_rms_norm(self, x: Tensor, addend: Tensor | None, weight: Tensor, eps: float) -> Tensor:
        return self.watch.time("elementwise", self.inner.add_rms_norm, x, addend, weight, eps)

    def silu_mul(self, gate_up: Tensor) -> Tensor:
        return self.watch.time("elementwise", self.inner.silu_mul, gate_up)


class TimedKernels(PagedKernels):
    """The paged kernels: all of them in one call, or apart. Rotating and storing is counted as element-wise."""

    def __init__(self, watch: Stopwatch, *args: Any) -> None:
        super().__init__(*args)
        self.watch = watch

    def rotate_store_kv(self, step: Step, qkv: Tensor, norms: tuple[Tensor, Tensor] | None, eps: float,
                        rotary: tuple[Tensor, Tensor], k_cache: Tensor, v_cache: Tensor) -> None:
        self.watch.time("elementwise", super().rotate_store_kv, step, qkv, norms, eps, rotary, k_cache, v_cache)

    def decoder_layers(self, step: Step, native: NativeDecoder, x: Tensor, rotary: tuple[Tensor, Tensor],
                       k_cache: Tensor, v_cache: Tensor, logits: Tensor | None) -> None:
        self.watch.time("layers", super().decoder_layers, step, native, x, rotary, k_cache, v_cache, logits)

    def attend(self, step: Step, q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return self.watch.time("attention", super().attend, step, q, k_cache, v_cache)


class TimedSampler(Sampler):
    """Any sampler."""

    def __init__(self, watch: Stopwatch, inner: Sampler) -> None:
        self.watch, self.inner, self.supported = watch, inner, inner.supported

    def __call__(self, logits: Tensor, sequences: list[Generation]) -> SamplerOutput:
        return self.watch.time("sampling", self.inner, logits, sequences)

    def check(self, params: SamplingParams) -> None:
        self.inner.check(params)


def timed_parts(parts: LayerKernels, watch: Stopwatch, apart: bool) -> LayerKernels:
    """The same parts under the watch: the layers as a whole, or `apart`, one by one and each part by itself."""
    def timed(part: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], nn.Module]:
        return lambda linear: TimedModule(watch, part, make(linear))

    def stack(layers: list[FusedDecoderLayer], norm: FusedRMSNorm, head: nn.Module) -> Stacked:
        modules, norm_left, head_left = parts.stack(layers, norm, head)
        return Stacked(modules, norm_left, TimedModule(watch, "linear", head_left))

    if apart:
        return LayerKernels(TimedOps(watch, parts.ops), timed("linear", parts.pack), timed("linear", parts.gate),
                     timed("linear", parts.head), one_by_one)
    return replace(parts, stack=stack)


def timed_engine(llm: LLM, watch: Stopwatch, apart: bool) -> LLMEngine:
    """`llm`'s engine over its cache, with weights of its own and all parts under the watch. Its backend is "cpu"."""
    assert llm.attention_backend == "cpu", "the parts are those of the C++ kernels"
    model = load_model(llm.config.model_config)
    model = fuse(model, timed_parts(layer_kernels_for(model.device, model.dtype), watch, apart))
    model.embed_tokens = TimedModule(watch, "lookups", model.embed_tokens)
    model.rotary = TimedModule(watch, "lookups", model.rotary)                  # type: ignore[assignment]
    spec, engine = model.spec, llm.engine
    shape = (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, llm.manager.tables.block_size,
             model.dtype, spec.head_dim ** -0.5)
    model_runner = ModelRunner(model, CpuAttention(llm.cache, llm.manager.tables, TimedKernels(watch, *shape)))
    runner = DecodeRunner(model_runner) if can_decode(model_runner) else model_runner
    return LLMEngine(engine.scheduler, runner, TimedSampler(watch, engine.sampler), engine.output_processor,
                       engine.copy_slots)


def step_parts(llm: LLM, sizes: Sequence[int], prompt_len: int = 64, steps: int = 24) -> list[dict[str, Any]]:
    """For each number of greedy sequences: seconds and shares of the parts of a decode step, medians over steps.

    The numbers of "whole" stand in the entry itself, those of "apart" under that name; only parts that ran are there.
    """
    by_way = []
    for apart in (False, True):
        watch = Stopwatch()
        engine = timed_engine(llm, watch, apart)
        by_way.append([_decode(llm, engine, watch, size, prompt_len, steps) for size in sizes])
    return [{"num_sequences": size, "prompt_len": prompt_len, **whole, "apart": apart}
            for size, whole, apart in zip(sizes, *by_way, strict=True)]


def _decode(llm: LLM, engine: LLMEngine, watch: Stopwatch, num_sequences: int, prompt_len: int,
            steps: int) -> dict[str, float]:
    """Decode that many sequences side by side."""
    costs = decode_steps(llm, engine, partial(_timed_step, engine, watch), num_sequences, steps, prompt_len)
    return {f"{part}_{key}": median(cost[part] / (cost["step"] if key == "share" else 1) for cost in costs)
            for part in costs[0] if any(cost[part] for cost in costs) for key in ("s", "share")}


def _timed_step(engine: LLMEngine, watch: Stopwatch) -> dict[str, float]:
    """Seconds of the parts, of the whole step, and of what is left of it."""
    watch.lap()
    start = time.perf_counter()
    engine.step()
    step = time.perf_counter() - start
    parts = watch.lap()
    return {**parts, "step": step, "python": step - sum(parts.values())}
