"""The full sampler: every request of a batch with its own parameters, all in a handful of tensor operations.

    raw logits -> allowed / banned tokens, bias -> penalties -> (greedy: argmax)
               -> temperature -> min-p -> top-k -> top-p -> draw

Order and meaning are vLLM's. `distribution` is the readable definition for one request; the batch takes a
shorter way to the same numbers: it never sorts the vocabulary where a partial selection is enough.

R rows (sequences), V vocabulary.
"""
from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.model_runner import top_logprobs
from m0_basics.request import Logprob, Sequence
from m0_basics.sampler import Sampler, SamplerOutput, argmax
from m0_basics.sampling_params import SamplingParams, SamplingType

from .logits_processing import KeptFor, LogitEdits, TokenCounts, adjust_logits

_BLOCK = 256            # columns of a row whose masses are added up first
_CANDIDATES = 512       # tokens first tried for a nucleus; rows whose nucleus is larger are sorted in full


class FullSampler(Sampler):
    """Everything in `SamplingParams` but structured output."""

    supported = frozenset(f.name for f in dataclasses.fields(SamplingParams)) - {"structured_outputs"}

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer          # for bad_words, which are given as text
        self._edits = KeptFor[SamplingParams, LogitEdits](lambda params: LogitEdits(params, tokenizer))
        self._seen = TokenCounts()

    def check(self, params: SamplingParams) -> None:
        """As the base; tokenises bad words, so that the first step finds them ready."""
        super().check(params)
        if params.bad_words:
            self._edits(params)

    @torch.inference_mode()     # the runner's logits come from there, and may be changed only there
    def __call__(self, logits: Tensor, sequences: list[Sequence]) -> SamplerOutput:
        wanted = [i for i, s in enumerate(sequences) if num_logprobs(s.sampling_params) is not None]
        raw = logits[wanted] if wanted else None        # a copy: log-probabilities are those of the model
        logits = adjust_logits(logits, sequences, self._edits, self._seen)
        token_ids = self._choose(logits, sequences)
        logprobs: list[dict[int, Logprob] | None] = [None] * len(sequences)
        if raw is not None:
            ks = [num_logprobs(sequences[i].sampling_params) or 0 for i in wanted]
            for i, entry in zip(wanted, top_logprobs(raw, [token_ids[i] for i in wanted], ks), strict=True):
                logprobs[i] = entry
        return SamplerOutput(token_ids, logprobs)

    @staticmethod
    def _choose(logits: Tensor, sequences: list[Sequence]) -> list[int]:
        """Greedy rows by argmax, the others by a draw."""
        random = [i for i, s in enumerate(sequences) if s.sampling_params.sampling_type is not SamplingType.GREEDY]
        if not random:
            return argmax(logits)
        drawn = draw(logits[random] if len(random) < len(sequences) else logits, [sequences[i] for i in random])
        if len(random) == len(sequences):
            return drawn
        token_ids = argmax(logits)
        for i, token_id in zip(random, drawn, strict=True):
            token_ids[i] = token_id
        return token_ids


def num_logprobs(params: SamplingParams) -> int | None:
    """How many log-probabilities to keep per token; 0 keeps the chosen token's, which best_of ranks by."""
    return 0 if params.logprobs is None and params.best_of != params.n else params.logprobs


def uniform(sequence: Sequence) -> float:
    """The random number in [0, 1) that decides the sequence's next token.

    It is a hash of (seed, output index, position), not the state of a generator: the same request draws the
    same numbers whatever runs beside it, and however often it is preempted or forked.
    """
    key = struct.pack("<qqq", _signed64(sequence.seed), sequence.index, len(sequence.output_token_ids))
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0 ** -53


def _signed64(value: int) -> int:
    return (value + 2 ** 63) % 2 ** 64 - 2 ** 63


def draw(logits: Tensor, sequences: list[Sequence]) -> list[int]:
    """logits [R, V] of rows that sample -> one token each, by inverting the cumulative distribution."""
    params = [s.sampling_params for s in sequences]
    device = logits.device

    def column(value: Callable[[SamplingParams], float]) -> Tensor:
        return torch.tensor([value(p) for p in params], device=device, dtype=torch.float32).unsqueeze(1)

    logits = logits / column(lambda p: p.temperature)
    if any(p.min_p > 0 for p in params):
        # p >= min_p * p_max, in logarithms; min_p = 0 gives -inf, which keeps everything.
        floor = logits.amax(dim=-1, keepdim=True) + column(lambda p: p.min_p).log()
        logits = logits.masked_fill(logits < floor, float("-inf"))
    numbers = torch.tensor([uniform(s) for s in sequences], device=device, dtype=torch.float64)

    truncated = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
    if not truncated:
        return _invert(torch.softmax(logits, dim=-1), numbers).tolist()
    tokens = torch.empty(len(params), dtype=torch.long, device=device)
    whole = sorted(set(range(len(params))) - set(truncated))
    if whole:
        tokens[whole] = _invert(torch.softmax(logits[whole], dim=-1), numbers[whole])
    vocab = logits.shape[1]
    top_ks = torch.tensor([min(params[i].top_k or vocab, vocab) for i in truncated], device=device)
    # In double precision, in which a top_p just above 0 is above 0.
    top_ps = torch.tensor([params[i].top_p for i in truncated], device=device, dtype=torch.float64)
    tokens[truncated] = _draw_truncated(logits[truncated], top_ks, top_ps, numbers[truncated])
    return tokens.tolist()


def _draw_truncated(logits: Tensor, top_ks: Tensor, top_ps: Tensor, numbers: Tensor) -> Tensor:
    """Draw from the top-k / top-p candidates of each row, sorting no more of the vocabulary than needed."""
    vocab = logits.shape[1]
    # A row with top-k needs k candidates, and more, to get past the equals of the k-th (16-bit logits have many);
    # one with top-p alone does not say how many, so it gets a first guess.
    width = min(vocab, max(2 * k + 64 if k < vocab else _CANDIDATES for k in top_ks.tolist()))
    probabilities, ids, complete = candidates(logits, top_ks, top_ps, width)
    tokens = ids.gather(1, _invert(probabilities, numbers).unsqueeze(1)).squeeze(1)
    if width < vocab and not bool(complete.all()):
        rest = ~complete
        probabilities, ids, _ = candidates(logits[rest], top_ks[rest], top_ps[rest], vocab)
        tokens[rest] = ids.gather(1, _invert(probabilities, numbers[rest]).unsqueeze(1)).squeeze(1)
    return tokens


def candidates(logits: Tensor, top_ks: Tensor, top_ps: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `width` best tokens of each row, cut to top-k and then to the nucleus of what is left.

    Returns probabilities [R, width] (not normalised, 0 for tokens cut off), token ids [R, width], and [R] whether
    the row is complete, that is, whether no token beyond `width` belongs to it, or is the equal of one that does.
    """
    vocab, rank = logits.shape[1], torch.arange(width, device=logits.device)
    best, ids = _best(logits, width)
    values = best.masked_fill(rank >= top_ks.unsqueeze(1), float("-inf"))
    # Mass to which top_p refers: what top-k left, or everything where there is no top-k.
    everything, has_top_k = values.logsumexp(dim=-1), top_ks < vocab
    if not bool(has_top_k.all()):
        everything = torch.where(has_top_k, everything, logits.logsumexp(dim=-1))
    probabilities = (values.double() - everything.double().unsqueeze(1)).exp()
    cumulative = probabilities.cumsum(dim=-1)
    # The nucleus is the smallest set with mass >= top_p, so the token that crosses top_p is in it.
    # A row without top-p keeps everything, also where rounding lets the sum reach 1 early.
    limit = torch.where(top_ps < 1, top_ps.double(), torch.inf).unsqueeze(1)
    probabilities = probabilities * (cumulative - probabilities < limit)
    last = probabilities.count_nonzero(dim=-1).clamp(min=1) - 1
    complete = (best.gather(1, last.unsqueeze(1)).squeeze(1) > best[:, -1]) & ((top_ks <= width) | ~has_top_k)
    return probabilities, ids, complete | (width == vocab)


def _best(logits: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest logits of each row and their token ids, equal ones in order of their ids.

    16-bit logits are often equal. `topk` orders equals as it likes, which depends on `width`, and that on what else
    is in the batch: a request would draw other tokens in other company.
    """
    if width == logits.shape[1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    values, ids = logits.topk(width, dim=-1, sorted=False)
    ids, by_id = ids.sort(dim=-1)
    values, by_value = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(1, by_value)


def _invert(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """probabilities [R, n] (any positive scale), numbers [R] in [0, 1) -> the column each number falls into.

    A long row is searched in two steps, first for the block of columns and then inside it, so that the running
    sum in double precision is never taken over the whole vocabulary.
    """
    num_rows, n = probabilities.shape
    if n <= _BLOCK:
        return _find(probabilities.double(), numbers)[0]
    blocks = F.pad(probabilities, (0, -n % _BLOCK)).view(num_rows, -1, _BLOCK)
    block, rest = _find(blocks.sum(dim=-1, dtype=torch.float64), numbers)
    inside = blocks[torch.arange(num_rows, device=block.device), block].double()
    return block * _BLOCK + _find(inside, rest)[0]


def _find(weights: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """weights [R, n] -> the column each number falls into, and how far into it, both [R]; the latter in [0, 1)."""
    cumulative = weights.cumsum(dim=-1)
    target = (numbers * cumulative[:, -1]).unsqueeze(1)
    # right=True: the first column whose cumulative mass exceeds the target, so a column of mass 0 is never hit.
    column = torch.searchsorted(cumulative, target, right=True).clamp_(max=weights.shape[1] - 1)
    weight = weights.gather(1, column)
    into = (target - (cumulative.gather(1, column) - weight)) / weight
    return column.squeeze(1), into.clamp_(0, 1 - 2.0 ** -53).squeeze(1)


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The definition, for one request: adjusted logits [V] -> the exact probabilities [V] it is drawn from."""
    probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
    keep = probabilities >= params.min_p * probabilities.max()
    probabilities = probabilities * keep / (probabilities * keep).sum()
    order = probabilities.argsort(descending=True, stable=True)         # equals in order of their ids
    if params.top_k > 0:
        probabilities[order[params.top_k:]] = 0
        probabilities = probabilities / probabilities.sum()
    if params.top_p < 1:
        before = probabilities[order].cumsum(dim=-1) - probabilities[order]
        probabilities[order[before >= params.top_p]] = 0
    return probabilities / probabilities.sum()
