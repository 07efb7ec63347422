"""The sampler seam, and the simplest sampler: always the most probable token."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import reject
from .request import Logprob, Sequence
from .sampling_params import SamplingParams


@dataclass(frozen=True)
class SamplerOutput:
    """One token per sequence, and its log-probabilities where they were asked for."""

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]       # the chosen token is always among the keys

    @classmethod
    def of_tokens(cls, token_ids: list[int]) -> SamplerOutput:
        return cls(token_ids, [None] * len(token_ids))


class Sampler(ABC):
    """Turns logits into tokens. Keeps no state of its own between calls."""

    supported: Iterable[str]        # the SamplingParams fields that it, or the engine around it, obeys

    @abstractmethod
    def __call__(self, logits: Tensor, sequences: list[Sequence]) -> SamplerOutput:
        """logits [R, vocab] (float32, may be overwritten), the R sequences they belong to -> one token each."""

    def check(self, params: SamplingParams) -> None:
        """Raise ConfigError for a parameter that this sampler would ignore."""
        params.require_supported(self.supported, type(self).__name__)


class GreedySampler(Sampler):
    """argmax. The request has to ask for it: temperature 0."""

    supported = frozenset({"temperature", "max_tokens", "min_tokens", "ignore_eos", "stop_token_ids", "seed",
                           "detokenize", "skip_special_tokens"})

    def check(self, params: SamplingParams) -> None:
        super().check(params)
        if params.sampling_type.name != "GREEDY":
            raise reject("temperature", params.temperature, "0 (this sampler is greedy)")

    @torch.inference_mode()     # the runner's logits come from there, and may be changed only there
    def __call__(self, logits: Tensor, sequences: list[Sequence]) -> SamplerOutput:
        for row, sequence in enumerate(sequences):
            if banned := [i for i in tokens_too_early(sequence) if i < logits.shape[1]]:
                logits[row, torch.tensor(banned, device=logits.device)] = float("-inf")
        return SamplerOutput.of_tokens(argmax(logits))


def argmax(logits: Tensor) -> list[int]:
    """logits [R, V], float32 -> the id of each row's largest, the first of equals; of a row with NaN the first NaN.

    On a CPU numpy's, which gives the same and takes a fraction of the time: it compares a vector register at a time.
    """
    token_ids: list[int] = (logits.numpy() if logits.device.type == "cpu" else logits).argmax(-1).tolist()
    return token_ids


def tokens_too_early(sequence: Sequence) -> list[int]:
    """Token ids that would end the sequence before `min_tokens`; none once that many have come.

    The model's own may lie beyond its vocabulary: some configurations name tokens that the matrix has no row for.
    """
    params = sequence.sampling_params
    if len(sequence.output_token_ids) >= params.min_tokens:
        return []
    assert params.stop_token_ids is not None
    return [*sequence.eos_token_ids, *params.stop_token_ids]
