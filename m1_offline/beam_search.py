"""Beam search: keep the `beam_width` most probable beginnings, extend them all, keep the best again.

    step t      beams            each extended by every token       the best `beam_width` survive
                A  -0.9          A a -1.1   A b -2.9  ...           A a -1.1
                B  -1.2          B a -3.0   B c -1.4  ...           B c -1.4

A beam that ends (end-of-sequence token) leaves the search and is kept aside with its score. Each surviving
beam needs the cache of its parent: the first child keeps the parent's row, the others get copies.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from m0_basics.attention import ScheduledSequence
from m0_basics.config import reject
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.model_runner import Runner
from m0_basics.request import Request, Sequence, SequenceStatus, next_seq_id
from m0_basics.sampling_params import BeamSearchParams


class BeamCache(Protocol):
    """What the search asks of a cache."""

    @property
    def num_free(self) -> int: ...
    def allocate(self, sequence: Sequence) -> None: ...
    def reserve(self, sequence: Sequence, num_tokens: int) -> None: ...
    def fork(self, parent: Sequence, child: Sequence) -> None: ...
    def free(self, sequence: Sequence) -> None: ...


@dataclass(frozen=True)
class BeamSearchSequence:
    """One output. `tokens` holds prompt and output, as in vLLM; `score` is what the search ranks by."""

    tokens: list[int]
    cum_logprob: float
    score: float
    text: str | None = None
    finish_reason: str = "length"


@dataclass(frozen=True)
class BeamSearchOutput:
    """Best first."""

    sequences: list[BeamSearchSequence] = field(default_factory=list)


def score(cum_logprob: float, num_output_tokens: int, length_penalty: float) -> float:
    """Total log-probability over (output length ** penalty): above 1 favours long outputs, 0 ignores the length."""
    return cum_logprob / max(num_output_tokens, 1) ** length_penalty


def beam_search(runner: Runner, cache: BeamCache, request: Request, params: BeamSearchParams,
                tokenizer: Tokenizer | None, max_model_len: int) -> BeamSearchOutput:
    """Search the continuations of one request's prompt."""
    width = params.beam_width
    if width > cache.num_free:
        raise reject("beam_width", width, f"at most {cache.num_free}, the free rows of the cache")
    root = request.sequences[0]
    root.cumulative_logprob = 0.0
    cache.allocate(root)
    root.set_status(SequenceStatus.RUNNING)
    beams, finished = [root], list[BeamSearchSequence]()
    try:
        for _ in range(min(params.max_tokens, max_model_len - root.num_prompt_tokens)):
            candidates = _extend(runner, cache, beams, width)
            beams = _select(cache, beams, candidates, finished, params)
            if not beams or _cannot_improve(beams, finished, params):
                break
        finished += [_result(s.data.token_ids, s, params, "length") for s in beams]
    finally:
        for sequence in beams:
            cache.free(sequence)
    best = sorted(finished, key=lambda s: -s.score)[:width]
    return BeamSearchOutput([_with_text(s, root.num_prompt_tokens, tokenizer) for s in best])


def _extend(runner: Runner, cache: BeamCache, beams: list[Sequence],
            width: int) -> list[tuple[float, int, int]]:
    """Run the newest token of each beam; return the best extensions (total, beam, token), best first.

    More than `width` of them: each beam has an extension for each end-of-sequence token that ends it, and `width`
    must still survive.
    """
    scheduled = [ScheduledSequence.rest(s) for s in beams]
    for step in scheduled:
        cache.reserve(step.sequence, step.num_tokens)
    logits = runner.execute_model(scheduled)
    for s in beams:
        s.num_computed_tokens = s.num_tokens
    so_far = torch.tensor([s.cumulative_logprob for s in beams], device=logits.device).unsqueeze(1)
    totals = torch.log_softmax(logits, dim=-1) + so_far
    num_wanted = width * (1 + max(1, len(beams[0].eos_token_ids)))
    values, flat = totals.flatten().topk(min(num_wanted, totals.numel()))
    vocab = totals.shape[1]
    return [(value, i // vocab, i % vocab) for value, i in zip(values.tolist(), flat.tolist(), strict=True)]


def _select(cache: BeamCache, beams: list[Sequence], candidates: list[tuple[float, int, int]],
            finished: list[BeamSearchSequence], params: BeamSearchParams) -> list[Sequence]:
    """The next generation of beams; candidates that end go to `finished`."""
    chosen: list[tuple[float, int, int]] = []
    for rank, (total, parent, token_id) in enumerate(candidates):
        if len(chosen) == params.beam_width:
            break
        if token_id in beams[parent].eos_token_ids and not params.ignore_eos:
            if rank < params.beam_width:            # an ending outside the beam is no better than what it lost to
                ended = beams[parent].fork(next_seq_id(), 0)
                ended.cumulative_logprob = total
                finished.append(_result([*ended.data.token_ids, token_id], ended, params, "stop"))
        else:
            chosen.append((total, parent, token_id))
    # Rows of beams without children are free for the copies that others need.
    children = Counter(parent for _, parent, _ in chosen)
    for i, beam in enumerate(beams):
        if not children[i]:
            cache.free(beam)
    # Forks come before any parent grows, so that each copy is of the parent as it was.
    survivors = []
    for total, parent, token_id in reversed(chosen):
        beam = beams[parent]
        children[parent] -= 1
        if children[parent]:
            child = beam.fork(next_seq_id(), 0)
            cache.fork(beam, child)
            beam = child
        beam.append_token_id(token_id)
        beam.cumulative_logprob = total
        survivors.append(beam)
    return survivors[::-1]


def _cannot_improve(beams: list[Sequence], finished: list[BeamSearchSequence], params: BeamSearchParams) -> bool:
    """Whether `beam_width` finished outputs beat the best that a running beam could become at once."""
    if len(finished) < params.beam_width:
        return False
    worst = sorted((s.score for s in finished), reverse=True)[params.beam_width - 1]
    best = max(score(s.cumulative_logprob or 0.0, len(s.output_token_ids), params.length_penalty) for s in beams)
    return worst >= best


def _result(tokens: list[int], sequence: Sequence, params: BeamSearchParams, reason: str) -> BeamSearchSequence:
    total = sequence.cumulative_logprob or 0.0
    return BeamSearchSequence(tokens, total, score(total, len(tokens) - sequence.num_prompt_tokens,
                                                   params.length_penalty), finish_reason=reason)


def _with_text(result: BeamSearchSequence, num_prompt: int, tokenizer: Tokenizer | None) -> BeamSearchSequence:
    if tokenizer is None:
        return result
    return replace(result, text=tokenizer.decode(result.tokens[num_prompt:]))
