"""The attention seam, and the simplest backend behind it: recompute everything, remember nothing.

The model hands over the new tokens' queries, keys and values, packed without padding, and asks for the
attention output. Where keys and values of earlier tokens come from is the backend's business alone.
Here they come from nowhere: the engine runs the whole sequence again at each step.

T tokens in the step, B sequences, H_q / H_kv query / key-value heads, D head size.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .request import Sequence


class ScheduledSequence(NamedTuple):
    """Run tokens [start, start + num_tokens) of `sequence` in this step, the drafted ones last.

    [ computed (0 .. start) | tokens of the sequence | draft_token_ids ]
                            |<------- num_tokens of this step -------->|

    `start` stays what it was when the step was scheduled: the sequence may move on while the step runs. Drafted tokens
    are guesses at what follows the sequence's newest token: they run behind it, and the step tells which were right.
    A sequence whose first output token is still to come has none.
    A tuple, because every step makes one for every sequence, and a frozen dataclass takes twice as long.
    """

    sequence: Sequence
    start: int                              # position of the first token that runs
    num_tokens: int                         # drafted ones included
    draft_token_ids: tuple[int, ...] = ()

    @classmethod
    def rest(cls, sequence: Sequence) -> ScheduledSequence:
        """Everything of `sequence` that is not computed yet."""
        return cls(sequence, sequence.num_computed_tokens, sequence.num_tokens - sequence.num_computed_tokens)

    def without_drafts(self) -> ScheduledSequence:
        """The same, and no guesses."""
        return ScheduledSequence(self.sequence, self.start, self.num_tokens - len(self.draft_token_ids))

    @property
    def end(self) -> int:
        """Tokens computed once the step is done, drafted ones included."""
        return self.start + self.num_tokens

    @property
    def reaches_newest(self) -> bool:
        """Whether the step computes the sequence's newest token, so that the next one can be sampled."""
        return self.end - len(self.draft_token_ids) == self.sequence.num_tokens

    @property
    def is_decode(self) -> bool:
        """Whether the first token that runs is the newest one that was sampled. All else is prefill.

        By its position: a piece of a prompt may be one token long as well.
        """
        return bool(self.sequence.output_token_ids) and self.start == self.sequence.num_tokens - 1


@dataclass(frozen=True)
class AttentionMetadata:
    """Where each sequence's tokens lie in the packed batch: rows [start[i], start[i + 1]) are sequence i's."""

    query_start_loc: list[int]              # B + 1


class AttentionBackend(ABC):
    """How attention is computed, and where keys and values are kept."""

    @abstractmethod
    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        """Everything `forward` needs to know about the batch; built once per step, used by every layer."""

    @abstractmethod
    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        """q [T, H_q, D]; k, v [T, H_kv, D] -> [T, H_q, D]. Stores k and v (where it keeps them), then attends."""


def query_start_loc(scheduled: list[ScheduledSequence]) -> list[int]:
    """B + 1 offsets: the running sum of the sequences' token counts, starting with 0."""
    return [0, *accumulate(s.num_tokens for s in scheduled)]


class FullAttention(AttentionBackend):
    """Causal attention of each sequence over itself; nothing is kept between steps."""

    def build_metadata(self, scheduled: list[ScheduledSequence]) -> AttentionMetadata:
        assert all(s.start == 0 for s in scheduled), "nothing is kept, so nothing is computed"
        return AttentionMetadata(query_start_loc(scheduled))

    def forward(self, layer_idx: int, q: Tensor, k: Tensor, v: Tensor, metadata: AttentionMetadata) -> Tensor:
        out = torch.empty_like(q)
        starts = metadata.query_start_loc
        for start, stop in pairwise(starts):
            # SDPA wants [heads, tokens, D]; enable_gqa lets H_q / H_kv query heads read one key-value head.
            qi, ki, vi = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            oi = F.scaled_dot_product_attention(qi, ki, vi, is_causal=True, enable_gqa=True)
            out[start:stop] = oi.squeeze(0).transpose(0, 1)
        return out
