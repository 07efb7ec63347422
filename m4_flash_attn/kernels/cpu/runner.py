"""A decode step as one call: where every row goes on to the output matrix, the layers' call ends with it.

Each return to Python in between would find cold caches, and the threads asleep. m4's other runner does the same for a
GPU's launches (cuda_graph.py).

T tokens in the step, which is as many sequences.
"""
from __future__ import annotations

import torch
from torch import Tensor

from m0_basics.attention import ScheduledSequence
from m0_basics.model_runner import ModelInputs, ModelRunner, Runner

from .attention import CpuAttention, CpuMetadata
from .decoder import CpuDecoder


class DecodeRunner(Runner):
    """Runs a step of decodes alone in one call; all other steps go to the runner it is put around."""

    def __init__(self, runner: ModelRunner) -> None:
        """Around a runner that `can_decode`."""
        assert can_decode(runner)
        self.runner, self.model, self.backend = runner, runner.model, runner.backend

    def prepare_inputs(self, scheduled: list[ScheduledSequence]) -> ModelInputs:
        return self.runner.prepare_inputs(scheduled)

    def execute_model(self, scheduled: list[ScheduledSequence]) -> Tensor:
        return self.execute(self.prepare_inputs(scheduled))

    @torch.inference_mode()
    def execute(self, inputs: ModelInputs) -> Tensor:
        """Logits [R, vocab] of prepared inputs, valid until the next call."""
        metadata, backend, decoder = inputs.metadata, self.backend, self.model.layers[0]
        if not _is_decode(inputs):
            return self.runner.execute(inputs)
        assert isinstance(decoder, CpuDecoder) and isinstance(backend, CpuAttention)
        assert isinstance(metadata, CpuMetadata)
        x, rotary = self.model.embed_tokens(inputs.input_ids), self.model.rotary(inputs.positions)
        return decoder.decode(x, rotary, backend, metadata)


def can_decode(runner: ModelRunner) -> bool:
    """Whether all layers and the output matrix are one call, and nothing stands around the attention."""
    layers = list(runner.model.layers)
    return (len(layers) == 1 and isinstance(layers[0], CpuDecoder) and layers[0].has_head
            and isinstance(runner.backend, CpuAttention))


def _is_decode(inputs: ModelInputs) -> bool:
    """Whether the step is one new token per sequence, each the newest, and nothing but logits is asked for."""
    return (len(inputs.sampled) == len(inputs.scheduled) == len(inputs.input_ids)
            and all(s.sequence.sampling_params.prompt_logprobs is None for s in inputs.scheduled))


def with_decode_call(runner: ModelRunner) -> Runner:
    """The runner, with decode steps as one call where that is possible."""
    return DecodeRunner(runner) if can_decode(runner) else runner
