"""The model runner: from a list of scheduled sequences to the logits that the sampler needs."""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from .model import CausalLM
from .request import Logprob, Sequence

_PROMPT_ROWS = 256        # rows of prompt logits held at once: [256, vocab] in float32 is 50 MB for 49,152 tokens


@dataclass(frozen=True)
class ModelInputs:
    """Everything a step needs to know, read from the sequences once: they may move on while the model runs."""

    input_ids: Tensor               # T
    positions: Tensor               # T
    metadata: AttentionMetadata
    scheduled: list[ScheduledSequence]      # B: sequence b's tokens are rows query_start_loc[b] to [b + 1] of the batch
    logit_rows: Tensor              # R: rows of the batch whose logits are needed, in order
    sampled: list[Sequence]         # R: whom each of them samples for; behind a drafted token, who it would be by then


class Runner(ABC):
    """The runner seam: what an engine asks of whoever runs the model."""

    model: CausalLM
    backend: AttentionBackend

    @abstractmethod
    def prepare_inputs(self, scheduled: list[ScheduledSequence]) -> ModelInputs:
        """Read from the sequences all that the step needs."""

    @abstractmethod
    def execute(self, inputs: ModelInputs) -> Tensor:
        """Run prepared inputs; return logits [R, vocab], valid until the next call."""

    @abstractmethod
    def execute_model(self, scheduled: list[ScheduledSequence]) -> Tensor:
        """Both at once."""


class ModelRunner(Runner):
    """Owns the model and the attention backend; knows nothing of queues, requests or sampling."""

    def __init__(self, model: CausalLM, backend: AttentionBackend) -> None:
        self.model = model
        self.backend = backend

    def execute_model(self, scheduled: list[ScheduledSequence]) -> Tensor:
        """Run the scheduled tokens; return logits [R, vocab]: of each newest token, and of drafted ones."""
        return self.execute(self.prepare_inputs(scheduled))

    def prepare_inputs(self, scheduled: list[ScheduledSequence]) -> ModelInputs:
        """Pack the scheduled tokens in order, and build the backend's metadata."""
        input_ids, positions, logit_rows = list[int](), list[int](), list[int]()
        sampled: list[Sequence] = []
        for s in scheduled:
            drafts = s.draft_token_ids
            assert not drafts or s.sequence.output_token_ids, "drafts follow an output token"
            input_ids += s.sequence.data.token_slice(s.start, s.end - len(drafts))
            if s.reaches_newest:
                logit_rows += range(len(input_ids) - 1, len(input_ids) + len(drafts))
                sampled.append(s.sequence)
                sampled += [s.sequence.with_drafts(drafts[:n]) for n in range(1, len(drafts) + 1)]
            input_ids += drafts
            positions += range(s.start, s.end)
        # numpy turns a list into an array in a fraction of the time that torch takes; one copy brings all over.
        numbers = np.array(input_ids + positions + logit_rows, dtype=np.int64)
        sizes = [len(input_ids), len(positions), len(logit_rows)]
        ids, places, rows = torch.as_tensor(numbers, device=self.model.device).split(sizes)
        return ModelInputs(ids, places, self.backend.build_metadata(scheduled), scheduled, rows, sampled)

    @torch.inference_mode()
    def execute(self, inputs: ModelInputs) -> Tensor:
        """Run prepared inputs; return logits [R, vocab]."""
        hidden = self.forward(inputs)
        starts = inputs.metadata.query_start_loc
        for s, first_row in zip(inputs.scheduled, starts, strict=False):        # starts has one entry more
            if s.sequence.sampling_params.prompt_logprobs is not None:
                self._record_prompt_logprobs(s, hidden[first_row:first_row + s.num_tokens])
        if len(inputs.sampled) < hidden.shape[0]:
            hidden = hidden[inputs.logit_rows]
        return self.model.compute_logits(hidden)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Hidden states [T, hidden] of the inputs' tokens, packed in order."""
        return self.model(inputs.input_ids, inputs.positions, self.backend, inputs.metadata)

    def _record_prompt_logprobs(self, scheduled: ScheduledSequence, hidden: Tensor) -> None:
        """Append to `sequence.prompt_logprobs` for prompt tokens that this step's rows [n, hidden] predict.

        Row i sits at position `start + i` and predicts the token after it. The first token of a prompt
        is predicted by nothing, so its entry is None. Rows already recorded (a recomputed sequence) are left alone.
        """
        sequence, k = scheduled.sequence, scheduled.sequence.sampling_params.prompt_logprobs
        assert k is not None
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        prompt = sequence.data.prompt_token_ids
        first, stop = len(sequence.prompt_logprobs), scheduled.end + 1
        for begin in range(first, min(stop, len(prompt)), _PROMPT_ROWS):
            end = min(begin + _PROMPT_ROWS, stop, len(prompt))
            offset = 1 + scheduled.start                    # the token at `begin` is predicted by row begin - offset
            assert begin >= offset, "the rows that predict these tokens were skipped"
            logits = self.model.compute_logits(hidden[begin - offset:end - offset])
            sequence.prompt_logprobs += top_logprobs(logits, prompt[begin:end], [k] * (end - begin))


def top_logprobs(logits: Tensor, token_ids: list[int], ks: list[int]) -> list[dict[int, Logprob]]:
    """logits [R, vocab], one chosen token and one k per row -> per row its top k and the chosen token, best first."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logits.device).unsqueeze(1))
    ranks = (logprobs > chosen).sum(dim=1).add(1).tolist()
    values, ids = logprobs.topk(min(max(ks), logprobs.shape[1]), dim=-1)
    result = []
    rows = zip(token_ids, ks, chosen[:, 0].tolist(), ranks, values.tolist(), ids.tolist(), strict=True)
    for token_id, k, logprob, rank, top_values, top_ids in rows:
        top = zip(top_ids[:k], top_values[:k], strict=True)
        entry = {i: Logprob(v, r) for r, (i, v) in enumerate(top, start=1)}
        entry.setdefault(token_id, Logprob(logprob, rank))
        result.append(entry)
    return result
