"""Facts about formats: floating-point numbers, GGUF blocks, rotary frequencies, and the tokens a generation runs.

All are worked out from definitions (`torch.finfo`, the `gguf` package's table of block sizes, a model's shape), so
they need no model file. A test compares the predicted size of the default model's tensors with its file.
"""
from __future__ import annotations

import math
from dataclasses import replace

import torch

from m0_basics.config import DTYPES
from m0_basics.model import inverse_frequencies

from ..documents.factbook import Fact
from .calculators import count_parameters
from .model_specs import SPECS

BLOCK_TYPES = ("F16", "Q8_0", "Q6_K", "Q4_0", "Q4_1", "Q4_K")


def number_formats() -> dict[str, Fact]:
    """Bits, largest value and spacing of each format that weights may have."""
    facts: dict[str, Fact] = {}
    for name, dtype in DTYPES.items():
        info = torch.finfo(dtype)
        mantissa = round(-math.log2(info.eps))
        facts |= {f"dtype.{name}.exponent_bits": Fact(info.bits - 1 - mantissa),
                  f"dtype.{name}.mantissa_bits": Fact(mantissa),
                  f"dtype.{name}.max": Fact(info.max),
                  f"dtype.{name}.smallest_normal": Fact(info.smallest_normal),
                  f"dtype.{name}.eps": Fact(info.eps)}
    return facts


def bits_per_weight(block_type: str) -> float:
    """Bits that one weight takes in a GGUF block type, scales and minima included."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    weights, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[block_type]]
    return num_bytes * 8 / weights


def gguf_blocks() -> dict[str, Fact]:
    """Sizes of GGUF's block types, and of the default model in the types that its file gives its tensors.

    That file holds the linear layers as Q4_1, the (tied) embedding as Q8_0 and the norms as F32.
    """
    facts = {f"gguf.{t.lower()}.bits_per_weight": Fact(bits_per_weight(t), "bit") for t in BLOCK_TYPES}
    count = count_parameters(SPECS["SmolLM2-135M"])
    norms = count.num_layers * count.norms + count.final_norm
    linear = count.total - count.embedding - norms
    parts = {"linear": linear * bits_per_weight("Q4_1") / 8, "embedding": count.embedding * bits_per_weight("Q8_0") / 8,
             "norms": norms * 4.0}
    total = sum(parts.values())
    facts |= {f"smollm2.gguf.{name}_bytes": Fact(round(size), "B") for name, size in parts.items()}
    return facts | {
        "smollm2.gguf.tensor_bytes": Fact(round(total), "B"),
        "smollm2.gguf.bits_per_weight": Fact(total * 8 / count.total, "bit"),
        "smollm2.gguf.over_bfloat16": Fact(total / (count.total * 2), "ratio"),
        "smollm2.gguf.if_4_bits_bytes": Fact(count.total // 2, "B"),
    }


def rotary_frequencies() -> dict[str, Fact]:
    """How Llama 3.1 stretches its rotary frequencies; the wavelengths, in tokens, of the slowest ones."""
    spec = SPECS["Llama-3.1-8B"]
    assert spec.rope_scaling is not None
    factor = spec.rope_scaling.factor
    plain = inverse_frequencies(replace(spec, rope_scaling=None))
    stretch = plain / inverse_frequencies(spec)
    kept, divided = int((stretch < 1 + 1e-6).sum()), int((stretch > factor - 1e-4).sum())
    slowest = {"before": plain, "after": inverse_frequencies(spec)}
    return {
        "llama3_1_8b.rope.pairs": Fact(len(stretch)),
        "llama3_1_8b.rope.kept": Fact(kept),
        "llama3_1_8b.rope.blended": Fact(len(stretch) - kept - divided),
        "llama3_1_8b.rope.divided": Fact(divided),
        **{f"llama3_1_8b.rope.longest_wavelength.{name}": Fact(2 * math.pi / frequencies.min().item())
           for name, frequencies in slowest.items()},
        "smollm2.rope.longest_wavelength": Fact(
            2 * math.pi / inverse_frequencies(SPECS["SmolLM2-135M"]).min().item()),
    }


def tokens_run(prompt: int = 512, output: int = 128) -> dict[str, Fact]:
    """Tokens that go through the model to make `output` new ones: each once, or all so far at every step.

    The last token is sampled and never run.
    """
    name = f"tokens_run.{prompt}+{output}"
    return {f"{name}.cached": Fact(prompt + output - 1),
            f"{name}.uncached": Fact(sum(range(prompt, prompt + output)))}
