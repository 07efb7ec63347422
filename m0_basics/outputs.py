"""What a request returns, with vLLM's names: `outputs[0].outputs[0].text`."""
from __future__ import annotations

from dataclasses import dataclass, field

from .request import Logprob, Request, RequestMetrics, Sequence


@dataclass
class CompletionOutput:
    """One of the outputs of a request."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None                # "stop", "length", "abort"; None while it runs
    stop_reason: int | str | None = None            # the stop string or stop token, where one ended it

    @classmethod
    def from_sequence(cls, sequence: Sequence) -> CompletionOutput:
        """A snapshot: the lists are copies."""
        return cls(
            index=sequence.index,
            text=sequence.output_text,
            token_ids=sequence.output_token_ids.copy(),
            cumulative_logprob=sequence.cumulative_logprob,
            logprobs=sequence.logprobs.copy() if sequence.sampling_params.logprobs is not None else None,
            finish_reason=sequence.status.finish_reason,
            stop_reason=sequence.stop_reason,
        )


@dataclass
class RequestOutput:
    """Everything a request has returned so far; `finished` says whether more will come."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    metrics: RequestMetrics | None = field(default=None, repr=False)
    num_cached_tokens: int = 0                      # of the prompt, that were in the cache when the request began

    @classmethod
    def from_request(cls, request: Request) -> RequestOutput:
        """A snapshot of the request. Once it is finished, the best n of its best_of sequences are returned."""
        sequences, finished = request.sequences, request.is_finished
        params = request.sampling_params
        if finished and params.best_of != params.n:
            ranked = sorted(sequences, key=lambda s: -(s.cumulative_logprob or 0.0))
            sequences = ranked[:params.n]
        outputs = [CompletionOutput.from_sequence(s) for s in sequences]
        if finished:
            for index, output in enumerate(outputs):
                output.index = index
        prompt_logprobs = None
        if params.prompt_logprobs is not None and request.sequences[0].prompt_logprobs:
            prompt_logprobs = request.sequences[0].prompt_logprobs.copy()
        return cls(request.request_id, request.prompt, request.prompt_token_ids, outputs, finished, prompt_logprobs,
                   request.metrics, request.num_cached_tokens)
