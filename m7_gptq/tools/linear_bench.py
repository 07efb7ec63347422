"""How fast packed matrices multiply beside m4's plain ones, and what of the memory's bandwidth one row gets.

    products    the shapes of SmolLM2's layers, each layer's weights in turn, so that they come from memory; a call from
                Python for each, which is a good part of the time at one row
    steps       a decode step of the whole model, layers and output matrix in one call, as the engine runs it

Kinds take turns, so that what disturbs the machine disturbs all of them; each figure is the best of its rounds. The
bandwidth is measured in the same rounds.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import nn

from m0_basics.attention import ScheduledSequence
from m0_basics.config import ModelConfig
from m0_basics.loading.loader import load_model
from m0_basics.model import CausalLM, DecoderLayer
from m0_basics.model_runner import ModelRunner
from m0_basics.request import Sequence as Generation
from m0_basics.request import SequenceData
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.analysis.cpu_roofline import read_bandwidth
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.kv_cache_manager import paged_manager
from m4_flash_attn.kernels.cpu.attention import CpuAttention
from m4_flash_attn.kernels.cpu.bindings import PagedKernels
from m4_flash_attn.kernels.cpu.linear import PackedLinear
from m4_flash_attn.kernels.cpu.runner import DecodeRunner
from m4_flash_attn.kernels.layer_kernels import layer_kernels_for
from m4_flash_attn.layers import fuse

from ..grid import QuantizedMatrix
from ..kernels.cpu.build import int8_tier
from ..kernels.cpu.linear import Activations, CpuQuantizedGatedLinear, CpuQuantizedLinear
from ..kernels.fuse_packed import fuse_packed
from ..linear import QuantizedEmbedding, QuantizedLinear

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536))         # qkv, o, gate and up, down
ROWS = (1, 4, 16, 64, 256)
_READ_BYTES = 256 << 20
_BLOCK_SIZE, _PROMPT = 16, 31
Run = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One kind at one number of rows: all its products, or a step."""

    kind: str
    rows: int
    seconds: float
    weight_bytes: int
    multiplications: int                # of weights with a row of x, for one row
    read_gbytes: float                  # 10^9 bytes per second that were read beside it

    @property
    def gbytes(self) -> float:
        """10^9 bytes of weights per second."""
        return 1e-9 * self.weight_bytes / self.seconds

    @property
    def gops(self) -> float:
        """10^9 operations per second, an addition and a multiplication each."""
        return 2e-9 * self.rows * self.multiplications / self.seconds


@dataclass(frozen=True)
class Kind:
    """Something to be timed, with its bytes; `prepare` makes the run for a number of rows."""

    name: str
    weight_bytes: int
    multiplications: int
    prepare: Callable[[int], Run]


def measure(kinds: Sequence[Kind], rows: Sequence[int], rounds: int) -> list[Timing]:
    """The best of `rounds` for each kind and number of rows; kinds take turns within a round."""
    values, timings = torch.ones(_READ_BYTES // 4), []
    for number in rows:
        runs = [kind.prepare(number) for kind in kinds]
        best, read = [float("inf")] * len(kinds), 0.0
        for round_number in range(rounds + 1):
            for i, run in enumerate(runs):
                start = perf_counter()
                run()
                if round_number:                # the first one warms up
                    best[i] = min(best[i], perf_counter() - start)
            read = max(read, read_bandwidth(values, rounds=1) / 1e9)
        timings += [Timing(kind.name, number, seconds, kind.weight_bytes, kind.multiplications, read)
                    for kind, seconds in zip(kinds, best, strict=True)]
    return timings


def random_matrix(outputs: int, inputs: int, bits: int = 4, group_size: int = 64) -> QuantizedMatrix:
    """Any codes will do: no product takes longer for some than for others."""
    groups = inputs // group_size
    return QuantizedMatrix(torch.randint(0, 2 ** bits, (outputs, inputs), dtype=torch.uint8),
                           torch.full((outputs, groups), 2.0 ** -8), bits,
                           torch.randint(0, 2 ** bits, (outputs, groups), dtype=torch.uint8))


def product_kinds(num_layers: int, dtype: torch.dtype) -> list[Kind]:
    """Plain products, and packed ones with both kinds of activations, over `num_layers` layers' weights."""
    multiplications = num_layers * sum(n * k for n, k in SHAPES)

    def kind(name: str, layers: Sequence[PackedLinear | CpuQuantizedLinear]) -> Kind:
        def prepare(rows: int) -> Run:
            inputs = {width: torch.randn(rows, width).to(dtype) for _, width in SHAPES}
            return lambda: [layer(inputs[layer.in_features]) for layer in layers]

        return Kind(name, sum(layer.nbytes for layer in layers), multiplications, prepare)

    def packed(activations: Activations) -> list[CpuQuantizedLinear]:
        return [CpuQuantizedLinear(random_matrix(n, k), None, dtype, activations)
                for _ in range(num_layers) for n, k in SHAPES]

    plain = [PackedLinear(torch.randn(n, k).to(dtype)) for _ in range(num_layers) for n, k in SHAPES]
    return [kind(f"m4 {_name(dtype)}", plain), kind("4 bits, int8", packed("int8")),
            kind("4 bits, exact", packed("exact"))]


def step_kinds(dtype: torch.dtype) -> list[Kind]:
    """A decode step of SmolLM2 with plain weights, and with random ones of 4 bits, output matrix included."""
    def load() -> CausalLM:
        return load_model(ModelConfig(dtype=_name(dtype), device="cpu"))

    def kind(name: str, model: CausalLM, size: int) -> Kind:
        return Kind(name, size, multiplications, partial(decode_step, model))

    plain = load()
    linears = [module for module in plain.modules() if isinstance(module, nn.Linear)]
    multiplications = sum(linear.weight.numel() for linear in linears)
    kinds = [kind(f"m4 {_name(dtype)}", fuse(plain, layer_kernels_for(plain.device, dtype)),
                  multiplications * dtype.itemsize)]
    for activations in ("int8", "exact"):
        model = fuse_packed(with_random_codes(load()), activations)
        size = sum(module.nbytes for module in model.modules()
                   if isinstance(module, CpuQuantizedLinear | CpuQuantizedGatedLinear))
        kinds.append(kind(f"4 bits, {activations}", model, size))
    return kinds


def with_random_codes(model: CausalLM) -> CausalLM:
    """The model with random matrices of 4 bits in the place of its linear layers; returns the same model."""
    def packed(linear: nn.Module) -> nn.Module:
        assert isinstance(linear, nn.Linear)
        return QuantizedLinear(random_matrix(linear.out_features, linear.in_features), linear.bias, model.dtype)

    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        for module, name in ((layer.self_attn, "qkv_proj"), (layer.self_attn, "o_proj"), (layer.mlp, "gate_up_proj"),
                             (layer.mlp, "down_proj")):
            setattr(module, name, packed(getattr(module, name)))
    head = packed(model.lm_head)
    assert isinstance(head, QuantizedLinear)
    model.lm_head = head                                    # type: ignore[assignment]
    model.embed_tokens = QuantizedEmbedding(head.matrix, model.dtype)
    return model


def decode_step(model: CausalLM, num_sequences: int) -> Run:
    """A step of `num_sequences` sequences that decode, a short prompt behind each."""
    spec, blocks = model.spec, 3 * num_sequences + 8
    manager = paged_manager(blocks, _BLOCK_SIZE, 0)
    cache = SlotCache(spec, blocks * _BLOCK_SIZE, model.dtype, model.device)
    kernels = PagedKernels(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim, _BLOCK_SIZE, model.dtype,
                           spec.head_dim ** -0.5)
    runner = DecodeRunner(ModelRunner(model, CpuAttention(cache, manager.tables, kernels)))
    step = []
    for i in range(num_sequences):
        sequence = Generation(i, SequenceData(list(range(100, 101 + _PROMPT))), SamplingParams(temperature=0), 0)
        assert manager.allocate_slots(sequence, 0, _PROMPT + 1)
        step.append(ScheduledSequence(sequence, _PROMPT, 1))
    inputs = runner.prepare_inputs(step)
    return partial(runner.execute, inputs)


def table(timings: Sequence[Timing]) -> str:
    """A line per number of rows, and what each kind gains over the first, as markdown."""
    kinds = list(dict.fromkeys(t.kind for t in timings))
    lines = ["| rows | memory GB/s | " + " | ".join(f"{kind} ms | GB/s | GOP/s | gain" for kind in kinds) + " |",
             "|---:" * (2 + 4 * len(kinds)) + "|"]
    for rows in dict.fromkeys(t.rows for t in timings):
        line = [t for t in timings if t.rows == rows]
        cells = [f"{t.seconds * 1e3:.3f} | {t.gbytes:.1f} | {t.gops:.0f} | {line[0].seconds / t.seconds:.2f}"
                 for t in line]
        lines.append(f"| {rows} | {line[0].read_gbytes:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", action="store_true", help="decode steps of the whole model instead of products")
    chosen = parser.parse_args(arguments)
    dtype = getattr(torch, chosen.dtype)
    print(f"{int8_tier()}, {torch.get_num_threads()} threads")
    with torch.inference_mode():
        kinds = step_kinds(dtype) if chosen.steps else product_kinds(chosen.layers, dtype)
        print(table(measure(kinds, chosen.rows, chosen.rounds)))


if __name__ == "__main__":
    main()
