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
from typing import NamedTuple, Protocol

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


class Candidate(NamedTuple):
    """A beam with one more token, before it is known whether it survives."""

    total: float            # log-probability of the whole output
    parent: int             # index of the beam that it extends
    token_id: int


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
            chosen = _choose(beams, candidates, finished, params)
            beams = _grow(cache, beams, chosen)
            if not beams or _cannot_improve(beams, finished, params):
                break
        finished += [_result(s.data.token_ids, s, params, "length") for s in beams]
    finally:
        for sequence in beams:
            cache.free(sequence)
    best = sorted(finished, key=lambda s: -s.score)[:width]
    return BeamSearchOutput([_with_text(s, root.num_prompt_tokens, tokenizer) for s in best])


def _extend(runner: Runner, cache: BeamCache, beams: list[Sequence],
            width: int) -> list[Candidate]:
    """Run the newest token of each beam; return the best extensions, best first.

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
    return [Candidate(value, i // vocab, i % vocab) for value, i in zip(values.tolist(), flat.tolist(), strict=True)]


def _choose(beams: list[Sequence], candidates: list[Candidate], finished: list[BeamSearchSequence],
            params: BeamSearchParams) -> list[Candidate]:
    """The best `beam_width` candidates that go on, best first; better ones that end go to `finished`."""
    chosen: list[Candidate] = []
    for rank, candidate in enumerate(candidates):
        if len(chosen) == params.beam_width:
            break
        parent = beams[candidate.parent]
        if candidate.token_id not in parent.eos_token_ids or params.ignore_eos:
            chosen.append(candidate)
        elif rank < params.beam_width:              # an ending outside the beam is no better than what it lost to
            ended = parent.fork(next_seq_id(), 0)
            ended.cumulative_logprob = candidate.total
            finished.append(_result([*ended.data.token_ids, candidate.token_id], ended, params, "stop"))
    return chosen


def _grow(cache: BeamCache, beams: list[Sequence], chosen: list[Candidate]) -> list[Sequence]:
    """The next generation of beams: of a parent's children one grows in its place, the others are forked off it."""
    num_children = Counter(candidate.parent for candidate in chosen)
    for i, beam in enumerate(beams):
        if not num_children[i]:
            cache.free(beam)                        # first: others need the room for their copies
    # From the worst to the best: forks come before the parent grows, so that each copy is of the parent as it was.
    grown = []
    for candidate in reversed(chosen):
        beam = beams[candidate.parent]
        num_children[candidate.parent] -= 1
        if num_children[candidate.parent]:
            child = beam.fork(next_seq_id(), 0)
            cache.fork(beam, child)
            beam = child
        beam.append_token_id(candidate.token_id)
        beam.cumulative_logprob = candidate.total
        grown.append(beam)
    return grown[::-1]


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
    return replace(result, text=tokenizer.decode_output(result.tokens[num_prompt:], result.tokens[:num_prompt]))
