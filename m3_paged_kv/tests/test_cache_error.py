"""F3.10: the error of a smaller cache, over a long text: what is measured, and that it behaves as it has to."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from m0_basics.config import ConfigError
from m0_basics.request import Sequence, SequenceData
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.fixtures import TinyModels
from m3_paged_kv import LLM
from m3_paged_kv.tools.cache_error import Dictation, Recorder, all_variants, cache_errors, write


def test_dictation_by_hand() -> None:
    """Two texts, their rows in the wrong order: KL(p || q) and the share of equal favourites are means over both."""
    plain = torch.tensor([[0.5, 0.5 - 1e-6, 1e-6], [0.1, 0.2, 0.7]]).log()
    variant = torch.tensor([[0.25, 0.75 - 1e-6, 1e-6], [0.1, 0.2, 0.7]])
    sequences = [Sequence(i, SequenceData([0]), SamplingParams(), seed=text) for i, text in ((7, 1), (8, 0))]
    dictation = Dictation([[11], [12]], [plain])
    output = dictation(variant.flip(0).log() + 5.0, sequences)       # logits: log-probabilities up to a constant
    assert output.token_ids == [12, 11]
    by_hand = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert dictation.kl == [pytest.approx(float(by_hand) / 2, rel=1e-3)]
    assert dictation.same == [0.5]


def test_the_same_cache_has_no_error(tiny_model: TinyModels) -> None:
    """F3.10: what is dictated is written, and an engine that is told its own text would have said the same."""
    def make() -> LLM:
        return LLM(str(tiny_model("llama")), dtype="float32", max_model_len=64, num_blocks=16)

    recorder = Recorder((llm := make()).engine.sampler)
    texts, _ = write(llm, recorder, 40, 3)
    assert len({tuple(text) for text in texts}) == 3
    assert [len(text) for text in texts] == [len(recorder.logprobs)] * 3 == [40] * 3
    dictation = Dictation(texts, recorder.logprobs)
    assert write(make(), dictation, 40, 3)[0] == texts
    assert dictation.kl == [0.0] * 40
    assert dictation.same == [1.0] * 40


@pytest.mark.slow
def test_errors_and_bytes(tiny_model: TinyModels) -> None:
    """F3.10: bytes halve and halve again; fewer bits, larger errors; who forgets is exact until then."""
    options: dict[str, Any] = {"model": str(tiny_model("qwen3")), "skip_tokenizer_init": True}
    errors = cache_errors(options, length=192, num_texts=3, budget=64, bucket=48)
    variants = errors["variants"]
    assert errors["positions"] == [48, 96, 144, 192]
    assert set(variants) == set(all_variants(64))
    assert all(len(v["kl"]) == len(v["same_token"]) == 4 for v in variants.values())
    sixteen, eight, four, channels = (variants[n] for n in (
        "16 bits", "8 bits, scale per block", "4 bits, scale per block", "4 bits, keys per channel"))
    assert sixteen["bytes_per_token"] == 2 * 3 * 2 * 32 * 2
    assert eight["bytes_per_token"] == pytest.approx(sixteen["bytes_per_token"] / 2, rel=0.01)
    assert four["bytes_per_token"] == pytest.approx(sixteen["bytes_per_token"] / 4, rel=0.02)
    assert four["bytes_per_token"] < channels["bytes_per_token"] < eight["bytes_per_token"]
    assert 0 < sixteen["mean_kl"] < eight["mean_kl"] < four["mean_kl"]
    assert sixteen["mean_same_token"] > four["mean_same_token"]
    for name in ("attention sinks", "heavy hitters"):
        forgets = variants[name]
        assert forgets["kl"][0] < 1e-9 < 1e-3 < forgets["kl"][-1]
        assert forgets["same_token"][0] == 1.0
        assert forgets["held_bytes"] <= 5 * 16 * forgets["bytes_per_token"], "the budget, and the block of a new token"
    assert eight["held_bytes"] == 12 * 16 * eight["bytes_per_token"]
    assert eight["mean_kl"] == pytest.approx(sum(eight["kl"]) / 4)


def test_bad_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="budget=63"):
        cache_errors({}, budget=63)
    with pytest.raises(ConfigError, match="length=0"):
        cache_errors({}, length=0)
