"""The model runner: from a list of scheduled sequences to the logits that the sampler needs."""
from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from .model import CausalLM
from .outputs import Logprob
from .request import Sequence

_PROMPT_ROWS = 256        # rows of prompt logits held at once: [256, vocab] in float32 is 50 MB for 49,152 tokens


class Span(NamedTuple):
    """A scheduled sequence as it stood when the step began: its rows of the packed batch, and where they start."""

    sequence: Sequence
    start: int                      # position of the first token that runs
    num_tokens: int
    first_row: int                  # the tokens are rows [first_row, first_row + num_tokens)
    reaches_newest: bool


@dataclass(frozen=True)
class ModelInputs:
    """Everything a step needs to know, read from the sequences once: they may move on while the model runs."""

    input_ids: Tensor               # T
    positions: Tensor               # T
    metadata: AttentionMetadata
    spans: list[Span]               # B

    @property
    def sampled(self) -> list[Sequence]:
        """The R sequences whose newest token is reached, in the order of the logits' rows."""
        return [span.sequence for span in self.spans if span.reaches_newest]


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
        """Run the scheduled tokens; return logits [R, vocab], one row per sequence whose newest token was reached."""
        return self.execute(self.prepare_inputs(scheduled))

    def prepare_inputs(self, scheduled: list[ScheduledSequence]) -> ModelInputs:
        """Pack the scheduled tokens in order, and build the backend's metadata."""
        input_ids: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for s in scheduled:
            start, end = s.sequence.num_computed_tokens, s.end
            spans.append(Span(s.sequence, start, s.num_tokens, len(input_ids), s.reaches_newest))
            input_ids += s.sequence.data.token_slice(start, end)
            positions += range(start, end)
        # numpy turns a list into an array in a fraction of the time that torch takes; one copy brings both over.
        both = torch.as_tensor(np.array([input_ids, positions], dtype=np.int64), device=self.model.device)
        ids, places = both.unbind(0)
        return ModelInputs(ids, places, self.backend.build_metadata(scheduled), spans)

    @torch.inference_mode()
    def execute(self, inputs: ModelInputs) -> Tensor:
        """Run prepared inputs; return logits [R, vocab]."""
        hidden = self.forward(inputs)
        for span in inputs.spans:
            if span.sequence.sampling_params.prompt_logprobs is not None:
                self._record_prompt_logprobs(span, hidden[span.first_row:span.first_row + span.num_tokens])
        rows = [span.first_row + span.num_tokens - 1 for span in inputs.spans if span.reaches_newest]
        if len(rows) < hidden.shape[0]:
            hidden = hidden[torch.tensor(rows, dtype=torch.long, device=hidden.device)]
        return self.model.compute_logits(hidden)

    def forward(self, inputs: ModelInputs) -> Tensor:
        """Hidden states [T, hidden] of the inputs' tokens, packed in order."""
        return self.model(inputs.input_ids, inputs.positions, self.backend, inputs.metadata)

    def _record_prompt_logprobs(self, span: Span, hidden: Tensor) -> None:
        """Append to `sequence.prompt_logprobs` for prompt tokens that this step's rows [n, hidden] predict.

        Row i of the span sits at position `start + i` and predicts the token after it. The first token of a prompt
        is predicted by nothing, so its entry is None. Rows already recorded (a recomputed sequence) are left alone.
        """
        sequence, k = span.sequence, span.sequence.sampling_params.prompt_logprobs
        assert k is not None
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        prompt = sequence.data.prompt_token_ids
        first, stop = len(sequence.prompt_logprobs), span.start + span.num_tokens + 1
        for begin in range(first, min(stop, len(prompt)), _PROMPT_ROWS):
            end = min(begin + _PROMPT_ROWS, stop, len(prompt))
            offset = 1 + span.start                         # the token at `begin` is predicted by row begin - offset
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
