"""The attention sink: how much of the attention the first token gets, and what quantising does to its value vector.

From some layer on most heads have nothing to say about most tokens, and park their attention on the first one. Its
value vector is then added to every token's output: an error in it is an error everywhere, though it is one token of a
window. The squared error that GPTQ keeps small counts tokens alike.

L layers, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from m0_basics.model import CausalLM

from ..calibration import WindowAttention


class WatchingAttention(AttentionBackend):
    """Attention over windows that notes, layer by layer, what the first token gets and what its value is."""

    def __init__(self, length: int, weights: bool) -> None:
        """`weights`: note where attention goes too, which takes the whole matrix of it."""
        self.length, self.weights, self.plain = length, weights, WindowAttention(length)
        self.mass = list[float]()           # L: the first token's share of the attention of all later tokens
        self.values = list[Tensor]()        # L: [windows, length, H_kv * D]

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        return self.plain.build_metadata(scheduled)

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        """As WindowAttention."""
        self.values.append(v.flatten(1).unflatten(0, (-1, self.length)).clone())
        if self.weights:
            self.mass.append(self._mass_of_first(q, k))
        return self.plain.forward(layer_idx, q, k, v, metadata)

    def _mass_of_first(self, q: Tensor, k: Tensor) -> float:
        group = q.shape[1] // k.shape[1]
        q, k = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, k.repeat_interleave(group, dim=1)))
        scores = q @ k.transpose(2, 3) / q.shape[3] ** 0.5
        later = torch.ones(self.length, self.length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        return float(weights[:, :, 1:, 0].mean())


@dataclass
class Watched:
    """What one run over some windows showed."""

    mass: list[float] = field(default_factory=list)         # L, where it was asked for
    values: list[Tensor] = field(default_factory=list)      # L: [windows, length, H_kv * D]


def watch(model: CausalLM, windows: Tensor, weights: bool = False) -> Watched:
    """Run a plain model over windows [num, length] and note what its attention sees."""
    num, length = windows.shape
    backend = WatchingAttention(length, weights)
    metadata = AttentionMetadata(list(range(0, num * length + 1, length)))
    with torch.no_grad():
        model(windows.flatten(), torch.arange(length).repeat(num), backend, metadata)
    return Watched(backend.mass, backend.values)


def value_errors(full: Watched, quantized: Watched) -> dict[str, list[float]]:
    """Per layer: |v' - v| / |v| of the first tokens, and of all others; norms over windows, tokens and inputs."""
    def relative(a: Tensor, b: Tensor) -> float:
        return float((b - a).norm() / a.norm())

    pairs = list(zip(full.values, quantized.values, strict=True))
    return {"first": [relative(a[:, :1], b[:, :1]) for a, b in pairs],
            "others": [relative(a[:, 1:], b[:, 1:]) for a, b in pairs]}
