"""F1.3: what is drawn follows the definition exactly, whatever is in the batch."""
from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampler import argmax
from m0_basics.sampling_params import SamplingParams
from m1_offline import sampler
from m1_offline.sampler import FullSampler, candidates, distribution, uniform

EXAMPLES = settings(max_examples=80, deadline=None)


def sequence(params: SamplingParams, seed: int = 0, index: int = 0, output: int = 0) -> Sequence:
    """A sequence with `output` tokens generated so far."""
    return Sequence(next_seq_id(), SequenceData([1, 2], [3] * output), params, seed, index=index)


def by_definition(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """The distribution, written from vLLM's description and sharing nothing with the code under test.

    Temperature; min_p relative to the most probable token; the k best; the smallest set of the rest with mass
    top_p. Equal tokens rank by their ids.
    """
    p = np.exp((logits - logits.max()) / params.temperature)
    p /= p.sum()
    p[p < params.min_p * p.max()] = 0
    ranked = sorted(range(len(p)), key=lambda token: (-p[token], token))
    if params.top_k:
        p[ranked[params.top_k:]] = 0
    p /= p.sum()
    mass = 0.0
    for token in ranked:
        if mass >= params.top_p:
            p[token] = 0
        mass += p[token]
    return p / p.sum()


def decidable(logits: np.ndarray, params: SamplingParams) -> bool:
    """Whether no threshold falls so close to a token that rounding decides."""
    p = by_definition(logits, SamplingParams(temperature=params.temperature))
    if params.min_p and (abs(p - params.min_p * p.max()) < 1e-4 * p.max()).any() and params.min_p < 1:
        return False
    kept = by_definition(logits, SamplingParams(temperature=params.temperature, min_p=params.min_p, top_k=params.top_k))
    return params.top_p == 1 or bool((abs(np.sort(kept)[::-1].cumsum() - params.top_p) > 1e-5).all())


PARAMS = st.builds(
    SamplingParams, temperature=st.sampled_from([0.3, 1.0, 2.5]), top_k=st.sampled_from([0, 0, 1, 2, 5, 20, 600]),
    top_p=st.sampled_from([1.0, 1.0, 0.05, 0.6, 0.93]), min_p=st.sampled_from([0.0, 0.0, 0.02, 0.4, 1.0]))


def random_logits(seed: int, vocab: int, scale: float = 2.0, ties: bool = False) -> Tensor:
    """Normal logits [vocab]; with `ties` in bfloat16 of the coarsest kind, so that many are equal."""
    logits = scale * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    return (logits * 4).round() / 4 if ties else logits


LOGITS = st.builds(random_logits, st.integers(0, 10 ** 6), st.sampled_from([3, 17, 700]),
                   st.sampled_from([0.1, 2.0, 8.0]), st.booleans())


class TestDistribution:
    """F1.3: the readable definition against an independent one, and against numbers worked out by hand."""

    @EXAMPLES
    @given(logits=LOGITS, params=PARAMS)
    def test_equals_the_independent_definition(self, logits: Tensor, params: SamplingParams) -> None:
        reference = logits.double().numpy()
        assume(decidable(reference, params))
        np.testing.assert_allclose(distribution(logits, params).numpy(), by_definition(reference, params), atol=1e-12)

    @pytest.mark.parametrize(("settings_", "expected"), [
        ({}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_p": 0.65}, [4 / 7, 3 / 7, 0, 0]),                # 0.4 is not enough: the token that crosses stays
        ({"top_p": 0.75}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_p": 0.01}, [1, 0, 0, 0]),
        ({"top_k": 3}, [4 / 9, 3 / 9, 2 / 9, 0]),
        ({"top_k": 9}, [0.4, 0.3, 0.2, 0.1]),
        ({"top_k": 2, "top_p": 0.5}, [1, 0, 0, 0]),             # of 4/7 and 3/7: top-k first, and its mass is the whole
        ({"min_p": 0.6}, [4 / 7, 3 / 7, 0, 0]),                 # at least 0.24
        ({"min_p": 0.3, "top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),   # of 4/9, 3/9 and 2/9
        ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        ({"temperature": 0.5, "top_p": 0.6}, [16 / 25, 9 / 25, 0, 0]),      # the heat comes before the cut
        ({"temperature": 0.5, "min_p": 0.3}, [16 / 25, 9 / 25, 0, 0]),
    ])
    def test_by_hand(self, settings_: dict[str, Any], expected: list[float]) -> None:
        logits, order = torch.tensor([0.4, 0.3, 0.2, 0.1]).log(), [2, 0, 3, 1]
        np.testing.assert_allclose(distribution(logits[order], SamplingParams(**settings_)).numpy(),
                                   np.array(expected)[order], atol=1e-7)


class TestDraws:
    """F1.3: FullSampler draws from exactly that distribution."""

    @pytest.mark.slow
    @pytest.mark.parametrize("settings_", [
        {}, {"temperature": 0.5}, {"temperature": 3.0}, {"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1},
        {"top_k": 12, "top_p": 0.9, "temperature": 1.5}, {"top_k": 10, "min_p": 0.05, "top_p": 0.95}])
    def test_chi_square(self, settings_: dict[str, Any]) -> None:
        """F1.3: 20,000 draws; the seeds are fixed, so the test passes or fails for ever."""
        params, vocab, draws = SamplingParams(**settings_), 40, 20_000
        logits = random_logits(5, vocab)
        expected = distribution(logits, params).numpy() * draws
        np.testing.assert_allclose(expected, by_definition(logits.double().numpy(), params) * draws, atol=1e-6)
        tokens: list[int] = []
        for seed in range(draws // 500):
            batch = [sequence(params, seed=seed, index=i // 50, output=i % 50) for i in range(500)]
            tokens += FullSampler()(logits.repeat(500, 1), batch).token_ids
        observed = np.bincount(tokens, minlength=vocab)
        assert (observed[expected == 0] == 0).all()
        likely = expected >= 5
        rare = (expected > 0) & ~likely         # too few for the approximation: together, if they are enough then
        observed_, expected_ = list(observed[likely]), list(expected[likely])
        if expected[rare].sum() >= 5:
            observed_.append(observed[rare].sum())
            expected_.append(expected[rare].sum())
        else:
            expected_[0] += expected[rare].sum()
            observed_[0] += observed[rare].sum()
        assert stats.chisquare(observed_, expected_).pvalue > 1e-3

    @EXAMPLES
    @given(logits=LOGITS, params=PARAMS, seeds=st.lists(st.integers(), min_size=1, max_size=8))
    def test_a_drawn_token_is_never_impossible(self, logits: Tensor, params: SamplingParams, seeds: list[int]) -> None:
        """F1.3: also at the ends of the interval that the random number comes from."""
        assume(decidable(logits.double().numpy(), params))
        possible = by_definition(logits.double().numpy(), params) > 0
        batch = [sequence(params, seed=seed) for seed in seeds]
        for token in FullSampler()(logits.repeat(len(batch), 1), batch).token_ids:
            assert possible[token]

    @pytest.mark.parametrize("number", [0.0, 2.0 ** -53, 0.5, 1 - 2.0 ** -53])
    @pytest.mark.parametrize("settings_", [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 700}])
    @pytest.mark.parametrize("vocab", [9, 256, 257, 1000])
    def test_ends_of_the_interval(self, monkeypatch: pytest.MonkeyPatch, number: float, settings_: dict[str, Any],
                                  vocab: int) -> None:
        """F1.3: the first and the last number there are draw the first and the last token that can be drawn."""
        monkeypatch.setattr(sampler, "uniform", lambda _: number)
        logits = random_logits(1, vocab, scale=1.0)
        logits[[0, 1, vocab - 1]] = float("-inf")           # nothing to draw at either end of the vocabulary
        params = SamplingParams(**settings_)
        token = FullSampler()(logits.unsqueeze(0).clone(), [sequence(params)]).token_ids[0]
        p = by_definition(logits.double().numpy(), params)
        possible = np.flatnonzero(p)
        truncated = params.top_k or params.top_p < 1        # then the line of tokens is by rank, else by id
        line = sorted(possible, key=lambda t: (-p[t], t)) if truncated else list(possible)
        if number == 0.5:
            assert token in possible
        else:
            assert token == (line[0] if number < 0.5 else line[-1])

    @pytest.mark.parametrize("scale", [1.0, 100.0])
    @pytest.mark.parametrize("settings_", [{}, {"top_k": 50}, {"top_p": 0.9}, {"min_p": 0.1}])
    def test_the_coldest_temperature(self, scale: float, settings_: dict[str, Any]) -> None:
        """F1.3: at 1e-4 logits of hundreds become millions; nothing overflows, the best token comes."""
        logits = scale * random_logits(3, 1000)
        logits[7] = float("-inf")
        batch = [sequence(SamplingParams(temperature=1e-4, **settings_), seed=i) for i in range(16)]
        assert set(FullSampler()(logits.repeat(16, 1), batch).token_ids) == {int(logits.argmax())}


class TestPartialSelection:
    """F1.3: sorting part of the vocabulary gives what sorting all of it gives."""

    @EXAMPLES
    @given(seed=st.integers(0, 10 ** 6), ties=st.booleans(), scale=st.sampled_from([0.02, 1.0, 3.0, 12.0]),
           top_k=st.sampled_from([1, 5, 8, 9, 40, 64, 100]), top_p=st.sampled_from([1.0, 0.9, 0.3]),
           width=st.sampled_from([8, 9, 41, 64]))
    def test_complete_rows_equal_the_full_sort(self, seed: int, ties: bool, scale: float, top_k: int, top_p: float,
                                               width: int) -> None:
        vocab = 100
        assume(top_k < vocab or top_p < 1)
        logits = random_logits(seed, vocab, scale, ties).unsqueeze(0)
        ks, ps = torch.tensor([top_k]), torch.tensor([top_p])
        part, part_ids, complete = candidates(logits, ks, ps, width)
        full, full_ids, all_complete = candidates(logits, ks, ps, vocab)
        assert bool(all_complete)
        kept = int((full > 0).sum())
        best = logits.sort(descending=True).values[0]
        if bool(complete):
            assert kept < width
            assert torch.equal(part_ids[0, :kept], full_ids[0, :kept])
            torch.testing.assert_close(part[0], full[0, :width])
        else:
            # There is a reason: something beyond the width belongs to the row, or equals what does.
            assert kept >= width or best[kept - 1] == best[width - 1] or top_k > width

    def test_full_sort_equals_the_definition(self) -> None:
        logits = random_logits(9, 300, ties=True)
        params = SamplingParams(top_k=90, top_p=0.85)
        probabilities, ids, _ = candidates(logits.unsqueeze(0), torch.tensor([90]), torch.tensor([0.85]), 300)
        ours = torch.zeros(300, dtype=torch.float64).index_put_((ids[0],), probabilities[0])
        np.testing.assert_allclose((ours / ours.sum()).numpy(), by_definition(logits.double().numpy(), params),
                                   atol=1e-7)

    @pytest.mark.parametrize("ties", [False, True])
    def test_a_nucleus_larger_than_the_first_guess(self, ties: bool) -> None:
        """F1.3: 900 nearly equal tokens, of which top-p keeps most: drawn by inverting the ranked distribution."""
        vocab = 900
        flat, spiky = random_logits(2, vocab, 0.05), random_logits(3, vocab, 6.0, ties)
        params = SamplingParams(top_p=0.95)
        p = by_definition(flat.double().numpy(), params)
        assert (p > 0).sum() > sampler._CANDIDATES
        batch = [sequence(params, seed=i) for i in range(60)]
        logits = torch.stack([flat if i % 2 else spiky for i in range(60)])
        tokens = FullSampler()(logits, batch).token_ids
        for i, (token, s) in enumerate(zip(tokens, batch, strict=True)):
            row = (flat if i % 2 else spiky).double().numpy()
            q = by_definition(row, params)
            ranked = np.array(sorted(range(vocab), key=lambda t: (-q[t], t)))
            edges = q[ranked].cumsum()
            assert token == ranked[np.searchsorted(edges, uniform(s) * edges[-1], side="right")]
        assert len({t for i, t in enumerate(tokens) if i % 2}) > 20


class TestMixedBatch:
    """F1.3: a request draws the same tokens in any company."""

    @settings(max_examples=60, deadline=None)
    @given(data=st.data(), ties=st.booleans())
    def test_equals_single_runs(self, data: st.DataObject, ties: bool) -> None:
        """Greedy and random rows, all kinds of truncation, penalties and bias; equal logits too."""
        some = st.one_of(PARAMS, PARAMS, st.builds(
            SamplingParams, temperature=st.sampled_from([0.0, 1.0]), top_k=st.sampled_from([0, 4]),
            repetition_penalty=st.sampled_from([1.0, 1.7]), presence_penalty=st.sampled_from([0.0, 1.0]),
            logit_bias=st.sampled_from([None, {2: 3.0, 5: -2.0}]), logprobs=st.sampled_from([None, 2]),
            allowed_token_ids=st.sampled_from([None, [3, 5, 8, 13, 21]])))
        params = data.draw(st.lists(some, min_size=2, max_size=7))
        seeds = data.draw(st.lists(st.integers(0, 99), min_size=len(params), max_size=len(params)))
        logits = torch.stack([random_logits(s, 700, 1.0, ties) for s in seeds])
        batch = [sequence(p, seed=s, output=s % 5) for p, s in zip(params, seeds, strict=True)]
        together = FullSampler()(logits.clone(), batch)
        for i, s in enumerate(batch):
            alone = FullSampler()(logits[i:i + 1].clone(), [s])
            assert alone.token_ids == together.token_ids[i:i + 1]
            assert (alone.logprobs[0] is None) == (together.logprobs[i] is None)
            for token, entry in (alone.logprobs[0] or {}).items():
                assert together.logprobs[i][token].rank == entry.rank
                assert together.logprobs[i][token].logprob == pytest.approx(entry.logprob, abs=1e-6)


class TestSeeds:
    """F1.3, F1.4: the number that decides a token depends on seed, output and position, and on nothing else."""

    def test_reproducible_and_position_dependent(self) -> None:
        params = SamplingParams()
        numbers = {(seed, index, output): uniform(sequence(params, seed, index, output))
                   for seed in range(6) for index in range(6) for output in range(6)}
        assert len(set(numbers.values())) == len(numbers)
        for (seed, index, output), number in numbers.items():
            assert uniform(sequence(SamplingParams(top_k=3, temperature=0.1), seed, index, output)) == number

    def test_a_fork_draws_its_own(self) -> None:
        parent = sequence(SamplingParams(), seed=4, output=3)
        child = parent.fork(next_seq_id(), 1)
        assert uniform(child) == uniform(sequence(SamplingParams(), 4, index=1, output=3)) != uniform(parent)

    @given(seed=st.integers())
    def test_any_integer_is_a_seed(self, seed: int) -> None:
        assert 0 <= uniform(sequence(SamplingParams(), seed)) < 1

    def test_signs_and_sizes_differ(self) -> None:
        seeds = [0, 1, -1, 2 ** 31, 2 ** 32, 2 ** 63 - 1, -2 ** 63, 2 ** 62]
        assert len({uniform(sequence(SamplingParams(), seed)) for seed in seeds}) == len(seeds)

    def test_uniform(self) -> None:
        """Kolmogorov-Smirnov along positions, along seeds and along outputs; neighbours are not correlated."""
        params, n = SamplingParams(), 3000
        for numbers in ([uniform(sequence(params, 11, 0, i)) for i in range(n)],
                        [uniform(sequence(params, i)) for i in range(n)],
                        [uniform(sequence(params, 11, i)) for i in range(n)]):
            assert stats.kstest(numbers, "uniform").pvalue > 1e-3
            assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 4 / math.sqrt(n)


class CountOperations(TorchDispatchMode):
    """Counts tensor operations below the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class TestNumberOfOperations:
    """F1.3: vectorised. No loop runs over the vocabulary, and none over rows that asks for more than a few each."""

    ALL = (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_k=50, top_p=0.9),
           SamplingParams(min_p=0.1, logprobs=5),
           SamplingParams(top_p=0.5, repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={3: 1.0},
                          allowed_token_ids=list(range(900)), min_tokens=4, stop_token_ids=[8]))

    def count(self, rows: int, vocab: int, params: tuple[SamplingParams, ...] = ALL) -> int:
        logits = random_logits(0, vocab, 6.0).repeat(rows, 1)
        batch = [sequence(params[i % len(params)], seed=i, output=2) for i in range(rows)]
        with CountOperations() as counter:
            FullSampler()(logits, batch)
        return counter.count

    def test_independent_of_the_vocabulary(self) -> None:
        assert self.count(10, 1_000) == self.count(10, 150_000)

    def test_at_most_linear_in_the_rows(self) -> None:
        at_10, at_20, at_40 = (self.count(rows, 1_000) for rows in (10, 20, 40))
        assert at_40 - at_20 <= 2 * (at_20 - at_10)

    @pytest.mark.parametrize("settings_", [{}, {"temperature": 0}, {"top_k": 50}, {"top_p": 0.5}, {"min_p": 0.2},
                                           {"top_k": 50, "top_p": 0.9, "min_p": 0.1}, {"repetition_penalty": 1.2}])
    def test_independent_of_the_rows_without_lists_of_tokens(self, settings_: dict[str, Any]) -> None:
        """Temperature, truncation and penalties cost the same number of operations for two rows and for 32."""
        params = (SamplingParams(**settings_),)
        assert self.count(2, 1_000, params) == self.count(32, 1_000, params) < 120


@pytest.mark.parametrize("special", [[], [float("nan")], [float("inf"), float("-inf")], [float("nan"), float("inf")]])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 49), (3, 5000), (17, 333)])
def test_argmax_is_torchs(rows: int, vocab: int, special: list[float]) -> None:
    """F1.3: of equals the first, as torch and transformers choose; NaN before everything. Few values, many equals."""
    generator = torch.Generator().manual_seed(vocab)
    values = torch.tensor([-1.0, -0.0, 0.0, 2.0, *special])
    for _ in range(20):
        logits = values[torch.randint(len(values), (rows, vocab), generator=generator)]
        assert argmax(logits) == logits.argmax(dim=-1).tolist()
        assert argmax(logits[:, ::2]) == logits[:, ::2].argmax(dim=-1).tolist()


def test_top_k_alone_keeps_all_k() -> None:
    """F1.3: without top-p no candidate is lost to rounding, however steep the distribution."""
    logits = torch.randn(200, 1000, generator=torch.Generator().manual_seed(0)) * 8 + 20
    probabilities, _, _ = candidates(logits, torch.full((200,), 50), torch.ones(200), 164)
    assert (probabilities[:, :50] > 0).all()
    assert (probabilities[:, 50:] == 0).all()
