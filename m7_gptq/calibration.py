"""Calibration: which inputs a layer sees, summed up in one matrix, while windows of a text run through the model.

All windows run at once, layer by layer, by the engine's own model with a causal attention of its own.

    X  [T, K]   inputs of a linear layer, as they come from the layers before it, which are quantised already
    H  [K, K]   2/T X^T X, plus a share of the same over the first token of each window: the attention sink
    D  [K, K]   2/T (X_full - X)^T X: how the inputs of the full-precision model differ, seen from X

T tokens of all windows, K inputs, H_q / H_kv query / key-value heads, D_h head size.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from m0_basics.attention import AttentionBackend, AttentionMetadata, ScheduledSequence, query_start_loc
from m0_basics.config import ConfigError
from m0_basics.model import CausalLM

_TOKENS = 4096                              # summed up at once


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


class Batch:
    """What every layer needs to know about some windows of one length."""

    def __init__(self, model: CausalLM, num_windows: int, length: int) -> None:
        self.num_windows, self.length = num_windows, length
        self.backend = WindowAttention(length)
        self.metadata = AttentionMetadata(list(range(0, num_windows * length + 1, length)))
        self.rotary: tuple[Tensor, Tensor] = model.rotary(torch.arange(length).repeat(num_windows))


def hidden_states(model: CausalLM, windows: Tensor) -> Tensor:
    """Token ids [windows, length] -> what the output matrix reads, [windows, length, hidden]. For plain models."""
    batch = Batch(model, *windows.shape)
    x = model.embed_tokens(windows.flatten())
    for layer in model.layers:
        x = layer(x, batch.rotary, batch.backend, batch.metadata)
    return model.norm(x).view(*windows.shape, -1)


@dataclass
class InputStatistics:
    """H and, where a full-precision model ran beside, D."""

    hessian: Tensor                         # float32 [K, K]
    difference: Tensor | None = None        # float32 [K, K]


def collect(x: Tensor, full: Tensor | None, length: int, sink: float) -> InputStatistics:
    """Sum up inputs x [T, K] of windows of `length`; `full` [T, K]: the same of the full-precision model.

    A token at the head of its window counts as the others do, and then by `sink` times the mean over such tokens:
    later tokens may attend to it more than to all others together, and it is one of `length`.
    """
    num_tokens, width = x.shape
    hessian = x.new_zeros(width, width)
    difference = None if full is None else torch.zeros_like(hessian)

    def add(rows: Tensor, full_rows: Tensor | None, share: float) -> None:
        hessian.addmm_(rows.T, rows, alpha=2 * share)
        if difference is not None and full_rows is not None:
            difference.addmm_((full_rows - rows).T, rows, alpha=2 * share)

    for start in range(0, num_tokens, _TOKENS):
        part = slice(start, start + _TOKENS)
        add(x[part], None if full is None else full[part], 1 / num_tokens)
    if sink:
        add(x[::length], None if full is None else full[::length], sink * length / num_tokens)
    return InputStatistics(hessian, difference)


def corrected_weight(weight: Tensor, statistics: InputStatistics, damp_percent: float, share: float) -> Tensor:
    """The weights [N, K] that, on the inputs of the quantised model, come closest to the full-precision outputs.

    GPTAQ's target (arXiv 2504.02692) min ||W' X - W X_full||^2, solved before rounding instead of within it, as QEP
    does (arXiv 2504.09629): W' = W + share * W D H^-1, the Hessian damped.
    """
    if statistics.difference is None:
        return weight
    h = statistics.hessian.double()
    damp = damp_percent * float(h.diagonal().mean()) or 1.0
    h.diagonal().add_(damp)
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
