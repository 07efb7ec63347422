"""F1.3: what changes logits before the draw, against values worked out by hand; the order is vLLM's."""
from __future__ import annotations

import gc
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.request import Sequence, SequenceData, next_seq_id
from m0_basics.sampler import GreedySampler
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.tiny_models import byte_level_tokenizer
from m1_offline.logits_processing import BadWords, KeptFor, LogitEdits, TokenCounts, adjust_logits
from m1_offline.sampler import FullSampler, distribution

NEVER = float("-inf")
LOGITS = [1.0, -2.0, 3.0, 0.0, 4.0, -1.0]


def sequence(prompt: list[int], output: list[int], eos: tuple[int, ...] = (), **settings: Any) -> Sequence:
    return Sequence(next_seq_id(), SequenceData(prompt, output), SamplingParams(**settings), 0, eos)


def adjusted(prompt: list[int], output: list[int], eos: tuple[int, ...] = (), **settings: Any) -> list[float]:
    return adjust(torch.tensor([LOGITS]), [sequence(prompt, output, eos, **settings)])[0].tolist()


def adjust(logits: Tensor, sequences: list[Sequence]) -> Tensor:
    return adjust_logits(logits, sequences, lambda params: LogitEdits(params, None), TokenCounts())


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
    result = adjust(logits, batch)
    assert result[0].tolist() == result[3].tolist() == LOGITS
    assert result[1].tolist() == [1.0, -2.0, 2.0, 0.0, 4.0, -1.0]
    assert result[2].tolist() == [1.0] + [NEVER] * 5


def test_token_counts() -> None:
    """F1.3: of each row, what is in its prompt and how often each token is in its output, as the output grows."""
    counts, like = TokenCounts(), torch.zeros(3, 5)
    rows = [sequence([2, 2], [1, 1, 4]), sequence([0], []), sequence([3, 4], [0])]
    in_prompt, in_output = counts(rows, like)
    assert (in_prompt > 0).int().tolist() == [[0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    assert in_output.tolist() == [[0, 2, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    rows[1].output_token_ids.extend([3, 3])
    rows[0].append_token_id(1)
    for _ in range(2):                      # a step that is run twice counts once
        assert counts(rows[:2], like[:2])[1].tolist() == [[0, 3, 0, 0, 1], [0, 0, 0, 2, 0]]
    del rows[0].output_token_ids[1:]        # tokens that are taken back
    assert counts(rows[:1], like[:1])[1].tolist() == [[0, 1, 0, 0, 0]]


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
    found = [i for node in BadWords(words, tokenizer()).reached(ids) for i in node.last]
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


def test_what_is_kept_for_an_object_ends_with_it() -> None:
    """By identity: equal parameters are two owners, and nothing is left of one that is gone."""
    made: list[SamplingParams] = []
    kept = KeptFor[SamplingParams, int](lambda params: (made.append(params), len(made))[1])
    one, other = SamplingParams(stop=["x"]), SamplingParams(stop=["x"])
    assert [kept(one), kept(other), kept(one), kept(other)] == [1, 2, 1, 2]
    made.clear()
    del one
    gc.collect()
    assert len(kept) == 1
    assert kept(other) == 2


def test_lists_are_read_once_and_not_in_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """F1.3: 20,000 bad words, biases, allowed and stop tokens: a step makes no tensor of them, and tokenises nothing.

    The trie is followed as far as the output agrees with it: to the end of one word, whatever the number of words.
    """
    words = [f"{i:05d}" for i in range(20_000)]
    params = SamplingParams(bad_words=words, logit_bias=dict.fromkeys(range(280), 0.5), min_tokens=50,
                            allowed_token_ids=list(range(5, 280)) * 50, stop_token_ids=[7] * 20_000, temperature=0,
                            max_tokens=60)
    tokenised: list[int] = []
    encode_batch = Tokenizer.encode_batch
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts, **rest: (
        tokenised.append(len(texts)), encode_batch(self, texts, **rest))[1])
    sampler = FullSampler(Tokenizer(byte_level_tokenizer(), {}))
    sampler.check(params)
    s = Sequence(next_seq_id(), SequenceData([5], []), params, 0, (4,))
    sampler(torch.zeros(1, 288), [s])
    made: list[int] = []
    tensor = torch.tensor
    monkeypatch.setattr(torch, "tensor", lambda data, **rest: (made.append(len(data)), tensor(data, **rest))[1])
    for byte in (b"0", b"0", b"1", b"2"):
        s.append_token_id(byte_id(byte))
        logits = torch.arange(288.0).unsqueeze(0)
        sampler(logits, [s])
    assert tokenised == [40_000]
    assert sum(made) == 10, "the ten digits that may follow 0012, when that was reached"
    assert {i for i in range(5, 280) if logits[0, i] == NEVER} == {7, *(byte_id(b"%d" % i) for i in range(10))}
    edits = sampler._edits(params)
    assert [len(node.last) for node in edits.bad_words.reached(s.output_token_ids)] == [10]


@pytest.mark.parametrize(("settings", "bad"), [
    ({"allowed_token_ids": [4, 9], "min_tokens": 1}, [4, 9]), ({"bad_words": ["y", "z"]}, None)])
def test_no_token_is_left(settings: dict[str, Any], bad: list[int] | None) -> None:
    """F1.3: an error rather than a token that was ruled out. m2 ends the one request with it."""
    bad = bad or [byte_id(b"y"), byte_id(b"z")]
    s = sequence([5], [], (4, 9), **({"allowed_token_ids": bad} | settings))
    with pytest.raises(ValueError, match="no token is left"):
        FullSampler(tokenizer())(torch.zeros(1, 288), [s])
    s = sequence([5], [], (4,), **({"allowed_token_ids": [*bad, 11]} | settings))
    assert FullSampler(tokenizer())(torch.zeros(1, 288), [s]).token_ids in ([11], [9])


@pytest.mark.parametrize("sampler", [FullSampler(), GreedySampler()])
def test_an_end_token_beyond_the_vocabulary(sampler: Any) -> None:
    """F1.5: some configurations name one that the matrix has no row for: with min_tokens it can only be left out."""
    s = sequence([0], [], (4, 6, 10 ** 12), min_tokens=1, temperature=0)
    assert sampler(torch.tensor([LOGITS]), [s]).token_ids == [2]


@pytest.mark.parametrize("settings", [
    {"top_k": 2 ** 63}, {"top_k": 10 ** 30, "top_p": 0.5}, {"top_p": 1e-300}, {"top_p": 5e-324, "top_k": 3},
    {"min_p": 5e-324}, {"min_p": 1.0, "top_p": 1e-30}, {"temperature": 1e-5}, {"temperature": 1e6},
    {"logit_bias": {2: 1e9, 0: -1e9}, "repetition_penalty": 1e-6, "temperature": 1e-5},
    {"logit_bias": {2: 1e9}, "repetition_penalty": 1e6, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    {"logit_bias": {2: 1e9}, "allowed_token_ids": [2, 3], "repetition_penalty": 1e-6}, {"seed": -2 ** 200},
])
def test_numbers_at_the_edge(settings: dict[str, Any]) -> None:
    """F1.3, F1.4: the token is one that the definition gives a chance; nothing overflows on the way to it."""
    for seed in range(20):
        s = sequence([0, 1], [2, 3, 2], **({"seed": seed} | settings))
        raw = torch.tensor([LOGITS])
        [token_id] = FullSampler()(raw.clone(), [s]).token_ids
        adjusted_row = adjust(raw.clone(), [s])[0]
        assert not adjusted_row.isnan().any()
        assert distribution(adjusted_row, s.sampling_params)[token_id] > 0
