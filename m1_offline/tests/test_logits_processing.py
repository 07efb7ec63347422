"""F1.3: what changes logits before the draw, against values worked out by hand; the order is vLLM's."""
from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.tiny_models import byte_level_tokenizer
from m1_offline.logits_processing import adjust_logits, banned_by_words, count_tokens
from m1_offline.sampler import FullSampler

NEVER = float("-inf")
LOGITS = [1.0, -2.0, 3.0, 0.0, 4.0, -1.0]


def sequence(prompt: list[int], output: list[int], eos: tuple[int, ...] = (), **settings: Any) -> Sequence:
    return Sequence(next_seq_id(), SequenceData(prompt, output), SamplingParams(**settings), 0, eos)


def adjusted(prompt: list[int], output: list[int], eos: tuple[int, ...] = (), **settings: Any) -> list[float]:
    return adjust_logits(torch.tensor([LOGITS]), [sequence(prompt, output, eos, **settings)], None)[0].tolist()


@lru_cache
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(), {})


@pytest.mark.parametrize(("settings", "expected"), [
    ({}, LOGITS),
    # Repetition: tokens 0, 1 (prompt) and 2, 3 (output); a positive logit is divided, a negative one multiplied.
    ({"repetition_penalty": 2.0}, [0.5, -4.0, 1.5, 0.0, 4.0, -1.0]),
    ({"repetition_penalty": 0.5}, [2.0, -1.0, 6.0, 0.0, 4.0, -1.0]),
    # Presence: once for each token of the output. Frequency: each time (token 2 came twice).
    ({"presence_penalty": 1.5}, [1.0, -2.0, 1.5, -1.5, 4.0, -1.0]),
    ({"frequency_penalty": 0.5}, [1.0, -2.0, 2.0, -0.5, 4.0, -1.0]),
    ({"presence_penalty": -1.0, "frequency_penalty": -1.0}, [1.0, -2.0, 6.0, 2.0, 4.0, -1.0]),
    # All three: repetition first.
    ({"repetition_penalty": 2.0, "presence_penalty": 1.0, "frequency_penalty": 0.25},
     [0.5, -4.0, 0.0, -1.25, 4.0, -1.0]),
    ({"logit_bias": {0: 5.0, 4: -1.5}}, [6.0, -2.0, 3.0, 0.0, 2.5, -1.0]),
    # The bias comes before the penalty: -2 + 4 = 2 is halved (after it, it would be -4 + 4 = 0).
    ({"logit_bias": {1: 4.0}, "repetition_penalty": 2.0}, [0.5, 1.0, 1.5, 0.0, 4.0, -1.0]),
    ({"allowed_token_ids": [5, 1, 1]}, [NEVER, -2.0, NEVER, NEVER, NEVER, -1.0]),
    # No bias and no penalty brings back what is not allowed.
    ({"allowed_token_ids": [4], "logit_bias": {2: 100.0}, "presence_penalty": -2.0, "repetition_penalty": 0.1},
     [NEVER, NEVER, NEVER, NEVER, 4.0, NEVER]),
])
def test_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    """F1.3: prompt [0, 1], output [2, 3, 2]."""
    assert adjusted([0, 1], [2, 3, 2], **settings) == pytest.approx(expected, abs=1e-6)


def test_min_tokens() -> None:
    """F1.3, F1.5: end-of-sequence and stop tokens are impossible until `min_tokens` have come, whatever their bias."""
    settings: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": [3], "logit_bias": {4: 100.0}}
    banned = [1.0, -2.0, 3.0, NEVER, NEVER, -1.0]
    assert adjusted([0], [], (4,), **settings) == banned
    assert adjusted([0], [1], (4,), **settings) == banned
    assert adjusted([0], [1, 1], (4,), **settings) == [1.0, -2.0, 3.0, 0.0, 104.0, -1.0]
    assert adjusted([0], [1], (4,), ignore_eos=True, min_tokens=2)[4] == NEVER


def test_rows_that_ask_for_nothing_stay_as_they_are() -> None:
    """F1.3: each row of a batch gets its own treatment."""
    logits = torch.tensor([LOGITS] * 4)
    batch = [sequence([0], [2]), sequence([0], [2], presence_penalty=1.0), sequence([0], [2], allowed_token_ids=[0]),
             sequence([0], [2], temperature=0)]
    result = adjust_logits(logits, batch, None)
    assert result[0].tolist() == result[3].tolist() == LOGITS
    assert result[1].tolist() == [1.0, -2.0, 2.0, 0.0, 4.0, -1.0]
    assert result[2].tolist() == [1.0] + [NEVER] * 5


def test_count_tokens() -> None:
    """F1.3: occurrences per row, as a dense matrix; an empty list is a row of zeros."""
    assert count_tokens([[1, 1, 4], [], [0]], torch.zeros(3, 5)).tolist() == [
        [0, 2, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]


@pytest.mark.parametrize(("words", "output", "banned"), [
    (["é"], "a", []),                       # é has two bytes: neither is banned as long as the first has not come
    (["é"], b"a\xc3", [b"\xa9"]),
    (["z"], "", [b"z"]),                    # one token: never
    (["the"], "", [b"the", b" the"]),       # written with a space or without, it is banned at the start and inside
    ([" the"], "", [b"the", b" the"]),
    (["cat", "cow"], "c", []),
    (["cat", "cow"], "ca", [b"t"]),
    (["cat", "cow"], "xa", []),
    (["cat", "cow"], "xxco", [b"w"]),
    (["cat"], "ca ", []),
    (["aaa"], "aaaa", [b"a"]),
])
def test_bad_words(words: list[str], output: str | bytes, banned: list[bytes]) -> None:
    """F1.3: the last token of a bad word is impossible where the others have just been generated."""
    encoded = output if isinstance(output, bytes) else output.encode()
    ids = [byte_id(bytes([b])) for b in encoded]
    found = banned_by_words(sequence([5], ids, bad_words=words), tokenizer())
    spellings = {b"the": "the", b" the": " the"}
    expected = {tokenizer().encode(spellings[b])[0] if b in spellings else byte_id(b) for b in banned}
    assert set(found) == expected


def byte_id(byte: bytes) -> int:
    """The token of one byte."""
    character = {b" ": "Ġ", b"\xa9": "©", b"\xc3": "Ã"}.get(byte) or byte.decode("ascii")
    return byte_level_tokenizer().get_vocab()[character]


def test_a_bad_word_is_never_sampled() -> None:
    """F1.3: through the sampler, greedy and random; the log-probabilities stay the model's own."""
    vocab = 288
    logits = torch.zeros(1, vocab)
    bad, other = byte_id(b"z"), byte_id(b"y")
    logits[0, bad], logits[0, other] = 50.0, 40.0
    for temperature in (0.0, 1.0):
        s = sequence([5], [], bad_words=["z"], temperature=temperature, logprobs=2)
        output = FullSampler(tokenizer())(logits.clone(), [s])
        assert output.token_ids == [other]
        assert list(output.logprobs[0] or {}) == [bad, other]
        assert output.logprobs[0][bad].logprob == pytest.approx(0.0, abs=1e-3)


def test_logprobs_are_the_models() -> None:
    """F1.3: before bias, penalties, temperature and truncation, as in vLLM; the chosen token is always there."""
    raw = torch.tensor([LOGITS])
    s = sequence([0], [2], temperature=0.5, top_k=1, presence_penalty=1.0, logit_bias={5: 20.0}, logprobs=2)
    output = FullSampler()(raw.clone(), [s])
    expected: Tensor = raw.log_softmax(-1)[0]
    assert output.token_ids == [5]
    entry = output.logprobs[0]
    assert entry is not None
    assert {token: e.rank for token, e in entry.items()} == {4: 1, 2: 2, 5: 5}
    for token, e in entry.items():
        assert e.logprob == pytest.approx(expected[token].item(), abs=1e-6)


def test_best_of_keeps_the_chosen_logprob() -> None:
    """F1.4: what best_of ranks by is kept even where no log-probabilities were asked for; otherwise nothing is."""
    for settings, kept in (({"best_of": 3}, 1), ({"n": 3}, None), ({"n": 2, "best_of": 3, "logprobs": 1}, None)):
        output = FullSampler()(torch.tensor([LOGITS]), [sequence([0], [], **settings)])
        if "logprobs" in settings:
            assert len(output.logprobs[0]) in (1, 2)
        else:
            assert (output.logprobs[0] and len(output.logprobs[0])) == kept
