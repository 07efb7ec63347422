"""FLOPs per byte of the parts of a layer: which wait for arithmetic, which for memory, and what changes that.

A linear layer reads its weights once for all tokens of the step, so its intensity grows with the batch. Attention in
decode reads each sequence's own keys and values, so its intensity is that of one sequence, G FLOPs per byte in 16 bits,
whatever the batch: only query heads that share keys raise it. Attention in prefill meets each key with many queries.

Bytes of attention are those of `memory_traffic`. What a whole step costs is in `m0_basics.tools.analysis.roofline`.
"""
from __future__ import annotations

from dataclasses import dataclass

from .memory_traffic import Heads, formula


@dataclass(frozen=True)
class Part:
    """A piece of work between loading its operands and storing its result."""

    flops: int
    num_bytes: int

    @property
    def intensity(self) -> float:
        """FLOPs per byte moved."""
        return self.flops / self.num_bytes


def attention_part(shape: Heads, sram_elements: int, algorithm: str = "tiled", element_bytes: int = 2) -> Part:
    """Attention of one group of heads: two products of 2 rows x keys x D FLOPs each; the softmax is left out."""
    flops = 4 * shape.rows * shape.num_keys * shape.head_dim
    return Part(flops, formula(algorithm, shape, sram_elements, element_bytes).total)


def linear_part(num_tokens: int, in_features: int, out_features: int, element_bytes: int = 2) -> Part:
    """x [num_tokens, in] times a weight [out, in]: weights, input and output cross once."""
    elements = in_features * out_features + num_tokens * (in_features + out_features)
    return Part(2 * num_tokens * in_features * out_features, elements * element_bytes)


def attainable(intensity: float, peak: float, bandwidth: float) -> float:
    """FLOP/s that a machine of `peak` FLOP/s and `bandwidth` bytes/s reaches at most."""
    return min(peak, intensity * bandwidth)
