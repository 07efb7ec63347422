"""The model runner: from a list of scheduled sequences to the logits that the sampler needs."""
from __future__ import annotations

import torch
from torch import Tensor

from .attention import AttentionBackend, AttentionMetadata, ScheduledSequence
from .model import CausalLM
from .outputs import Logprob

_PROMPT_ROWS = 256        # rows of prompt logits held at once: [256, vocab] in float32 is 50 MB for 49,152 tokens


class ModelRunner:
    """Owns the model and the attention backend; knows nothing of queues, requests or sampling."""

    def __init__(self, model: CausalLM, backend: AttentionBackend) -> None:
        self.model = model
        self.backend = backend

    @torch.inference_mode()
    def execute_model(self, scheduled: list[ScheduledSequence]) -> Tensor:
        """Run the scheduled tokens; return logits [R, vocab], one row per sequence whose newest token was reached."""
        hidden, metadata = self.forward(scheduled)
        starts = metadata.query_start_loc
        for s, start in zip(scheduled, starts, strict=False):
            if s.sequence.sampling_params.prompt_logprobs is not None:
                self._record_prompt_logprobs(s, hidden[start:start + s.num_tokens])
        rows = [stop - 1 for s, stop in zip(scheduled, starts[1:], strict=True) if s.reaches_newest]
        if len(rows) < hidden.shape[0]:
            hidden = hidden[torch.tensor(rows, dtype=torch.long, device=hidden.device)]
        return self.model.compute_logits(hidden)

    def forward(self, scheduled: list[ScheduledSequence]) -> tuple[Tensor, AttentionMetadata]:
        """Hidden states [T, hidden] of the scheduled tokens, packed in order, and the metadata they ran with."""
        input_ids: list[int] = []
        positions: list[int] = []
        for s in scheduled:
            start = s.sequence.num_computed_tokens
            input_ids += s.sequence.data.token_slice(start, s.end)
            positions += range(start, s.end)
        metadata = self.backend.build_metadata(scheduled)
        device = self.model.device
        hidden = self.model(torch.tensor(input_ids, device=device), torch.tensor(positions, device=device),
                            self.backend, metadata)
        return hidden, metadata

    def _record_prompt_logprobs(self, s: ScheduledSequence, hidden: Tensor) -> None:
        """Append to `sequence.prompt_logprobs` for prompt tokens that this step's rows [n, hidden] predict.

        Row i of the step sits at position `num_computed_tokens + i` and predicts the token after it. The first
        token of a prompt is predicted by nothing, so its entry is None. Rows already recorded (a recomputed
        sequence) are left alone.
        """
        sequence, k = s.sequence, s.sequence.sampling_params.prompt_logprobs
        assert k is not None
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        prompt = sequence.data.prompt_token_ids
        first = len(sequence.prompt_logprobs)                   # the next prompt token without an entry
        for begin in range(first, min(s.end + 1, len(prompt)), _PROMPT_ROWS):
            end = min(begin + _PROMPT_ROWS, s.end + 1, len(prompt))
            offset = 1 + sequence.num_computed_tokens       # the token at `begin` is predicted by row begin - offset
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
