"""Calibration: which inputs a layer sees, summed up in one matrix, while windows of a text run through the model.

All windows run together, layer by layer, by the engine's own model with a causal attention of its own.

    X  [T, K]   inputs of a linear layer, as they come from the layers before it, which are quantised already
    H  [K, K]   2/T X^T X, plus a share of the same over the first token of each window: the attention sink
    D  [K, K]   2/T (X_full - X)^T X: how the inputs of the full-precision model differ, seen from X

T tokens of all windows, K inputs, H_q / H_kv query / key-value heads, D_h head size.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence, query_start_loc
from m0_basics.config import ConfigError
from m0_basics.model import CausalLM, DecoderLayer

NUM_WINDOWS, LENGTH = 32, 512               # enough for matrices with some thousand inputs; few tokens overfit
_TOKENS = 2048                              # of a batch


class WindowAttention(AttentionBackend):
    """Causal attention over windows of equal length that follow each other in the batch; nothing is kept."""

    def __init__(self, length: int) -> None:
        self.length = length

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        assert all(s.start == 0 and s.num_tokens == self.length for s in scheduled)
        return AttentionMetadata(query_start_loc(scheduled))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        """q [T, H_q, D_h]; k, v [T, H_kv, D_h] -> [T, H_q, D_h]."""
        q, k, v = (x.unflatten(0, (-1, self.length)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)


class Batch(NamedTuple):
    """Some windows of one length that run at once, and what every layer needs to know about them."""

    num_windows: int
    rotary: tuple[Tensor, Tensor]
    backend: WindowAttention
    metadata: AttentionMetadata


# The same thing of every batch in turn: [tokens of the batch, ...]. So few tokens stay in the cache from one operation
# to the next, and the memory that one batch gave back serves the next.
Batches = list[Tensor]


def cut_batches(model: CausalLM, windows: Tensor) -> tuple[list[Batch], Batches]:
    """Token ids [num, length] -> the batches that they run in, and the ids of each, flat."""
    length, parts = windows.shape[1], windows.split(max(1, _TOKENS // windows.shape[1]))
    batches = [Batch(len(part), model.rotary(torch.arange(length).repeat(len(part))), WindowAttention(length),
                     AttentionMetadata(list(range(0, part.numel() + 1, length)))) for part in parts]
    return batches, [part.flatten() for part in parts]


def hidden_states(model: CausalLM, windows: Tensor) -> Tensor:
    """Token ids [num, length] -> what the output matrix reads, [num, length, hidden]. For plain models."""
    out = []
    for batch, ids in zip(*cut_batches(model, windows), strict=True):
        x = model.embed_tokens(ids)
        for layer in model.layers:
            x = layer(x, batch.rotary, batch.backend, batch.metadata)
        out.append(model.norm(x))
    return torch.cat(out).view(*windows.shape, -1)


# (name of a linear layer within its decoder layer, its inputs): called before the layer runs
Arrived = Callable[[str, Batches], None]


def run_layer(layer: DecoderLayer, x: Batches, batches: list[Batch], arrived: Arrived) -> Batches:
    """One plain decoder layer over all batches, x [tokens, hidden] each; `arrived` may change a linear layer's weights.

    The layer is run in four pieces, each over all batches before the next: so a linear layer's weights can depend on
    all of its inputs.
    """
    attention, mlp = layer.self_attn, layer.mlp
    inputs = [layer.input_layernorm(part) for part in x]
    arrived("self_attn.qkv_proj", inputs)
    with set_aside(attention, "o_proj") as o_proj:
        inputs = [attention(part, batch.rotary, batch.backend, batch.metadata)
                  for part, batch in zip(inputs, batches, strict=True)]
    arrived("self_attn.o_proj", inputs)
    x = [part + o_proj(more) for part, more in zip(x, inputs, strict=True)]
    inputs = [layer.post_attention_layernorm(part) for part in x]
    arrived("mlp.gate_up_proj", inputs)
    with set_aside(mlp, "down_proj") as down_proj:
        inputs = [mlp(part) for part in inputs]
    arrived("mlp.down_proj", inputs)
    return [part + down_proj(more) for part, more in zip(x, inputs, strict=True)]


@contextmanager
def set_aside(module: nn.Module, name: str) -> Iterator[nn.Module]:
    """Within the block, `module` ends before its last product, called `name`; yields that product."""
    last = module.get_submodule(name)
    module.set_submodule(name, nn.Identity())
    try:
        yield last
    finally:
        module.set_submodule(name, last)


@dataclass
class InputStatistics:
    """H and, where a full-precision model ran beside, D."""

    hessian: Tensor                         # float32 [K, K]
    difference: Tensor | None = None        # float32 [K, K]


def collect(x: Batches, full: Batches | None, length: int, sink: float) -> InputStatistics:
    """Sum up inputs x [tokens, K] of windows of `length`; `full`: the same of the full-precision model.

    A token at the head of its window counts as the others do, and then by `sink` times the mean over such tokens:
    later tokens may attend to it more than to all others together, and it is one of `length`.
    """
    width, num_tokens = x[0].shape[1], sum(len(part) for part in x)
    hessian = x[0].new_zeros(width, width)
    difference = None if full is None else torch.zeros_like(hessian)
    for i, part in enumerate(x):
        delta = None if full is None else full[i] - part
        for step, share in ((1, 1 / num_tokens), (length, sink * length / num_tokens)):
            if share:
                hessian.addmm_(part[::step].T, part[::step], alpha=2 * share)
                if difference is not None and delta is not None:
                    difference.addmm_(delta[::step].T, part[::step], alpha=2 * share)
    return InputStatistics(hessian, difference)


def corrected_weight(weight: Tensor, statistics: InputStatistics, damp_percent: float, share: float) -> Tensor:
    """The weights [N, K] that, on the inputs of the quantised model, come closest to the full-precision outputs.

    GPTAQ's target (arXiv 2504.02692) min ||W' X - W X_full||^2, solved before rounding instead of within it, as QEP
    does (arXiv 2504.09629): W' = W + share * W D H^-1, the Hessian damped.
    """
    if statistics.difference is None:
        return weight
    h = statistics.hessian.double()
    diagonal = h.diagonal()
    diagonal.add_(torch.where(diagonal > 0, damp_percent * diagonal.mean(), 1.0))      # dead inputs: W stays
    wanted = torch.linalg.solve(h, statistics.difference.double(), left=False)
    return weight + share * (weight @ wanted.float())


def cut_windows(token_ids: list[int], length: int, num_windows: int | None = None) -> Tensor:
    """Consecutive windows of a text, int64 [num_windows, length], spread evenly over it where there are more.

    Raises ConfigError for a text that is shorter than one window.
    """
    available = len(token_ids) // length
    if available == 0:
        raise ConfigError(f"the text has {len(token_ids)} tokens; allowed: at least {length}, one window")
    windows = torch.tensor(token_ids[:available * length]).view(available, length)
    if num_windows is None or num_windows >= available:
        return windows
    return windows[torch.linspace(0, available - 1, num_windows).long()]
