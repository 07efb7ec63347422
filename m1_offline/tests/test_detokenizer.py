"""F1.5, F1.6: text that grows token by token is never taken back and ends as the whole; stop strings are found."""
from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m0_basics.config import DEFAULT_MODEL, ModelConfig
from m0_basics.loading.loader import load_tokenizer
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.request import Logprob, Request, Sequence, SequenceData, SequenceStatus, next_seq_id
from m0_basics.sampling_params import SamplingParams
from m0_basics.tools.testing.tiny_models import BOS, EOS, byte_level_tokenizer
from m1_offline.detokenizer import IncrementalDetokenizer, StopChecker
from m1_offline.output_processor import OutputProcessor

REPLACEMENT = "\ufffd"
FAMILY, FLAG = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1e8\U0001f1f3"
TEXTS = st.lists(st.sampled_from(["the ", "in", " an", " ", "\n", "naïve", "é", "e\u0301", "中", "中文，", "。", "한",
                                  "😀", FAMILY, "👍🏽", FLAG, "\u200d", "ß", "\x00"]), max_size=12).map("".join)
# Bytes that begin, continue and break characters of two, three and four bytes; and the bytes of U+FFFD itself.
BYTES = st.lists(st.sampled_from([b"a", b" ", b"\xc3", b"\xa9", b"\xe4", b"\xb8", b"\xad", b"\xf0", b"\x9f", b"\x98",
                                  b"\x80", b"\xff", b"\xc0", b"\xed", b"\xa0", b"\xef\xbf\xbd"]),
                 max_size=16).map(b"".join)
EXAMPLES = settings(max_examples=150, deadline=None)


def pieces(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    """What each token adds, and what is left at the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    return [*(detokenizer.push(i) for i in token_ids), detokenizer.flush()]


def check_growth(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool = True) -> None:
    """Wherever the output ends, the pieces and what was held back join to the decoded whole."""
    for length in range(len(token_ids) + 1):
        parts = pieces(tokenizer, token_ids[:length], skip_special_tokens)
        assert "".join(parts) == tokenizer.decode(token_ids[:length], skip_special_tokens)


@lru_cache
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer(), {})


@lru_cache
def default_tokenizer() -> Tokenizer:
    tokenizer = load_tokenizer(ModelConfig(model=DEFAULT_MODEL, dtype="float32"))
    assert tokenizer is not None
    return tokenizer


def sentencepiece_like(prepend: str) -> Tokenizer:
    """A small Unigram model with byte fallback that writes a space as U+2581, decoded as Llama 2's or T5's is."""
    from tokenizers import AddedToken, decoders, pre_tokenizers
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import Unigram
    words = ["▁", "▁the", "▁in", "the", "in", "a", "n", "中", "，", "é", "."]
    vocab = [("<unk>", 0.0), *((f"<0x{i:02X}>", -20.0) for i in range(256)), *((word, -2.0) for word in words)]
    backend = Backend(Unigram(vocab, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    if prepend == "always":             # Llama 2's
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                             decoders.Strip(" ", 1, 0)])
    else:
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    backend.add_special_tokens([AddedToken("<s>", normalized=False)])
    return Tokenizer(backend, {})


@lru_cache
def sentencepiece(prepend: str) -> Tokenizer:
    return sentencepiece_like(prepend)


def split_at_random(data: st.DataObject, text: str) -> list[str]:
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


class TestIncrementalDetokenizer:
    """F1.6: also where a character spans tokens."""

    @EXAMPLES
    @given(text=TEXTS)
    def test_valid_text_byte_by_byte(self, text: str) -> None:
        """Each byte a token: every character comes whole, with its last byte."""
        tokenizer = byte_level()
        ids = byte_ids(text.encode())
        assert pieces(tokenizer, ids) == [*(c for char in text for c in [""] * (len(char.encode()) - 1) + [char]), ""]
        check_growth(tokenizer, ids)

    @EXAMPLES
    @given(data=BYTES)
    def test_any_bytes(self, data: bytes) -> None:
        check_growth(byte_level(), byte_ids(data))
        assert "".join(pieces(byte_level(), byte_ids(data))) == data.decode("utf-8", errors="replace")

    @EXAMPLES
    @given(token_ids=st.lists(st.integers(0, 267), max_size=30), skip=st.booleans())
    def test_any_tokens(self, token_ids: list[int], skip: bool) -> None:
        """Merged tokens that cut characters, and special tokens, which have no text or a text of their own."""
        check_growth(byte_level(), token_ids, skip)

    @pytest.mark.real_model
    @EXAMPLES
    @given(text=TEXTS, specials=st.lists(st.integers(0, 20), max_size=3))
    def test_default_model(self, text: str, specials: list[int]) -> None:
        tokenizer = default_tokenizer()
        ids = tokenizer.encode(text)
        for at in specials:
            ids.insert(at, tokenizer.eos_token_id)
        check_growth(tokenizer, ids)
        if not specials:
            assert "".join(pieces(tokenizer, ids)) == text

    @pytest.mark.real_model
    @EXAMPLES
    @given(token_ids=st.lists(st.integers(0, 49151), max_size=20), skip=st.booleans())
    def test_default_model_any_tokens(self, token_ids: list[int], skip: bool) -> None:
        check_growth(default_tokenizer(), token_ids, skip)

    @pytest.mark.parametrize("prepend", ["always", "first", "never"])
    @EXAMPLES
    @given(text=TEXTS, specials=st.lists(st.integers(0, 20), max_size=3))
    def test_sentencepiece(self, prepend: str, text: str, specials: list[int]) -> None:
        """A leading space belongs to the first token alone, wherever special tokens stand between the others."""
        tokenizer = sentencepiece(prepend)
        ids = tokenizer.encode(text)
        for at in specials:
            ids.insert(at, 268)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids)

    def test_byte_fallback_shows_no_broken_character(self) -> None:
        """Its decoder writes one replacement per byte, and spoils whole runs: nothing of it may be shown early."""
        tokenizer = sentencepiece("always")
        ids = [1 + byte for byte in "😀\n😀中".encode()]
        assert pieces(tokenizer, ids) == ["", "", "", "😀", "\n", "", "", "", "😀", "", "", "中", ""]
        assert tokenizer.decode(ids[:11]) == REPLACEMENT * 11, "the library gives up the whole run"
        assert pieces(tokenizer, ids[:11]) == ["", "", "", "😀", "\n", "", "", "", "😀", "", "", REPLACEMENT * 2]

    def test_a_long_output_decodes_short_windows(self) -> None:
        """The cost of a token does not grow with the text before it."""
        tokenizer, decoded = byte_level(), list[int]()

        class Counting(Tokenizer):
            def decode(self, token_ids: Any, skip_special_tokens: bool = True) -> str:
                decoded.append(len(token_ids))
                return tokenizer.decode(token_ids, skip_special_tokens)

        pieces(Counting(byte_level_tokenizer(), {}), byte_ids(("the cat 中😀" * 40).encode()))
        assert max(decoded) <= 8            # a character's four bytes, and those of the one before


def byte_ids(data: bytes) -> list[int]:
    """One token per byte: printable bytes are written as themselves, the others as the characters from U+0100 on."""
    vocab = byte_level_tokenizer().get_vocab()
    printable = [*range(0x21, 0x7f), *range(0xa1, 0xad), *range(0xae, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    character = {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}
    return [vocab[character[byte]] for byte in data]


def first_match(text: str, stops: list[str], searched: int) -> tuple[int, int, str] | None:
    """The definition: the stop string that is complete first; of those that end together, the longest.

    A match has to end after the first `searched` characters. Returns (end, start, stop string).
    """
    for end in range(searched + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return end, end - len(longest), longest
    return None


STOP_TEXTS = st.text("abc中", max_size=30)
STOPS = st.lists(st.text("abc中", min_size=1, max_size=4), min_size=1, max_size=4)


class TestStopChecker:
    """F1.5: a stop string split over pieces is found and cut."""

    @EXAMPLES
    @given(text=STOP_TEXTS, stops=STOPS, include=st.booleans(), data=st.data())
    def test_any_pieces(self, text: str, stops: list[str], include: bool, data: st.DataObject) -> None:
        checker, grown, shown = StopChecker(stops, include), "", ""
        expected = first_match(text, stops, 0)
        for piece in split_at_random(data, text):
            grown += piece
            if found := checker.find(grown):
                assert expected is not None
                end, start, stop = expected
                assert found == (stop, end if include else start)
                assert grown[:found[1]].startswith(shown), "characters were shown that the stop string takes back"
                return
            length = checker.safe_length(grown)
            assert length >= len(shown), "text is held back that was shown already"
            assert include is False or length == len(grown)
            shown = grown[:length]
        assert expected is None
        assert not shown.startswith(tuple(stops)) or include

    @EXAMPLES
    @given(text=STOP_TEXTS, stops=STOPS, skipped=st.integers(0, 20))
    def test_skipped_text_stops_nothing(self, text: str, stops: list[str], skipped: int) -> None:
        """What `min_tokens` lets pass, also where one stop string is longer than another that lies in it."""
        skipped = min(skipped, len(text))
        checker = StopChecker(stops, False)
        checker.skip(text[:skipped])
        expected = first_match(text, stops, skipped)
        assert checker.find(text) == (expected and (expected[2], expected[1]))

    def test_only_the_beginning_of_a_stop_string_is_held_back(self) -> None:
        for text, safe in (("", 0), ("a", 1), ("as", 1), ("asto", 1), ("astoo", 5), ("a top", 2), ("at!", 3)):
            checker = StopChecker(["stop", "top!"], False)
            assert checker.find(text) is None
            assert checker.safe_length(text) == safe

    @EXAMPLES
    @given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=5),
           num_skipped=st.integers(0, 12), cuts=st.sets(st.integers(1, 12)))
    def test_against_a_search_of_every_string(self, text: str, stops: list[str], num_skipped: int,
                                              cuts: set[int]) -> None:
        """However the text grows: the match that ends first after what was skipped, and of those the longest."""
        checker, found = StopChecker(stops, True), None
        checker.skip(text[:num_skipped])
        for end in (*sorted(cuts), len(text)):
            if found is None and end >= num_skipped:
                found = checker.find(text[:end])
        matches = [(end, -len(stop), stop) for stop in stops for end in range(num_skipped + 1, len(text) + 1)
                   if text[:end].endswith(stop)]
        assert found == ((min(matches)[2], min(matches)[0]) if matches else None)

    def test_a_thousand_strings_cost_a_step_what_one_does(self) -> None:
        """Each character is looked at once; held back is what may become one of them."""
        steps = []
        for num in (1, 1000):
            checker = StopChecker([f"{i:04d}." for i in range(num)], False)
            automaton, seen = checker._automaton, []
            checker._automaton = SimpleNamespace(step=lambda state, c, a=automaton, s=seen: (s.append(c),
                                                                                            a.step(state, c))[1])
            for text in ("x0", "x00", "x000x", "x000x0000"):
                assert checker.find(text) is None
            assert checker.safe_length("x000x0000") == 5
            assert checker.find("x000x0000.") == ("0000.", 5)
            steps.append(seen)
        assert steps[0] == steps[1] == list("x000x0000.")

    def test_examples(self) -> None:
        for text, stops, found in (("xabcdz", ["abcd", "bc"], ("bc", 2)), ("xabc", ["c", "abc", "bc"], ("abc", 1)),
                                   ("aab", ["ab"], ("ab", 1)), ("aaaa", ["aa"], ("aa", 0)), ("abc", ["d"], None)):
            assert StopChecker(stops, False).find(text) == found


class TestOutputProcessor:
    """F1.5, F1.6: detokenizer and stop strings together, as the engine uses them."""

    @EXAMPLES
    @given(text=TEXTS, stops=st.lists(st.sampled_from(["中", "a", "in", " the", "😀", "é\n", "文，", "\u200d"]),
                                      max_size=3), include=st.booleans(),
           min_tokens=st.integers(0, 12))
    def test_text_tokens_and_reason(self, text: str, stops: list[str], include: bool, min_tokens: int) -> None:
        ids = byte_ids(text.encode()) or byte_ids(b"x")
        text = text or "x"
        params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min(min_tokens, len(ids)),
                                max_tokens=len(ids))
        sequence, processor = running(params), OutputProcessor(byte_level(), 1000)
        shown = ""
        for i in ids:
            processor.process(sequence, i, None)
            assert sequence.output_text.startswith(shown), "text was taken back"
            shown = sequence.output_text
            if sequence.is_finished:
                break
        # Characters that are complete after min_tokens tokens cannot end the output.
        free = len(text.encode()[:params.min_tokens].decode("utf-8", errors="ignore"))
        expected = first_match(text, stops, free)
        if expected is None:
            assert (shown, sequence.status) == (text, SequenceStatus.FINISHED_LENGTH_CAPPED)
            assert sequence.stop_reason is None
        else:
            end, start, stop = expected
            assert (shown, sequence.status) == (text[:end if include else start], SequenceStatus.FINISHED_STOPPED)
            assert (sequence.stop_reason, len(sequence.output_token_ids)) == (stop, len(text[:end].encode()))

    @pytest.mark.parametrize(("min_tokens", "num_tokens"), [(0, 3), (2, 3), (3, 7), (6, 7), (7, 8)])
    def test_min_tokens(self, min_tokens: int, num_tokens: int) -> None:
        """None of the first `min_tokens` tokens ends the output, as in vLLM: not even one that completes a match."""
        params = SamplingParams(stop=["z"], min_tokens=min_tokens, max_tokens=8)
        sequence, processor = running(params), OutputProcessor(byte_level(), 1000)
        for i in byte_ids(b"xyzxyyzx"):
            if not sequence.is_finished:
                processor.process(sequence, i, None)
        assert len(sequence.output_token_ids) == num_tokens
        assert sequence.output_text == "xyzxyyzx"[:num_tokens - (num_tokens < 8)]

    def test_the_token_that_ends_the_output_has_no_text_unless_it_is_asked_for(self) -> None:
        tokenizer = byte_level()
        eos = tokenizer.encode(EOS)[0]
        for include, skip, text in ((False, False, "a"), (True, False, "a" + EOS), (True, True, "a")):
            params = SamplingParams(include_stop_str_in_output=include, skip_special_tokens=skip)
            sequence, processor = running(params, eos), OutputProcessor(tokenizer, 1000)
            for i in (*byte_ids(b"a"), eos):
                processor.process(sequence, i, None)
            assert (sequence.output_text, sequence.status) == (text, SequenceStatus.FINISHED_STOPPED)

    def test_a_broken_character_at_the_end_is_shown_as_one(self) -> None:
        sequence, processor = running(SamplingParams(max_tokens=3)), OutputProcessor(byte_level(), 1000)
        for i in byte_ids("a中".encode()[:3]):
            processor.process(sequence, i, None)
        assert sequence.output_text == "a" + REPLACEMENT

    def test_no_text_without_detokenize(self) -> None:
        sequence, processor = running(SamplingParams(detokenize=False, max_tokens=1)), OutputProcessor(byte_level(), 9)
        processor.process(sequence, 3, None)
        assert (sequence.output_text, sequence.is_finished) == ("", True)

    def test_nothing_is_kept_of_a_finished_sequence(self) -> None:
        sequence, processor = running(SamplingParams(max_tokens=2)), OutputProcessor(byte_level(), 1000)
        for kept in (1, 0):
            processor.process(sequence, 3, None)
            assert len(processor._states) == kept

    def test_the_log_probabilities_of_a_prompt_are_turned_into_text_once(self) -> None:
        """However often a request reports; also where a prompt is run in pieces, or run again."""
        tokenizer = CountingTokenizer(byte_level_tokenizer(), {})
        processor = OutputProcessor(tokenizer, 1000)
        prompt = byte_ids(b"the one")
        entries = [None, *({i: Logprob(-1.0, 2), 5: Logprob(-0.5, 1)} for i in prompt[1:])]
        request = Request("r", None, prompt, SamplingParams(prompt_logprobs=1, max_tokens=99), stream=True)
        [sequence] = request.sequences
        sequence.set_status(SequenceStatus.RUNNING)
        sequence.prompt_logprobs += entries[:3]
        five = tokenizer.decode([5], skip_special_tokens=False)
        assert [e and e[5].decoded_token for e in made(processor, request)] == [None, five, five]
        sequence.prompt_logprobs += entries[3:]
        early = made(processor, request)
        tokenizer.num_calls = 0
        for _ in range(5):
            processor.process(sequence, 3, None)
            during = tokenizer.num_calls
            assert made(processor, request) == early
            assert tokenizer.num_calls == during, "nothing is left to be decoded"
        assert [None, *("".join(e[i].decoded_token for i in e if i != 5) for e in early[1:])] == [None, *"he one"]

    @pytest.mark.parametrize("ending", ["length", "stop token", "abort"])
    @pytest.mark.parametrize("stop", [[], ["zz"]])
    def test_text_is_written_when_it_is_read(self, ending: str, stop: list[str]) -> None:
        """Nobody reads it: nothing is decoded until the end, unless a stop string may come. The text is the same."""
        tokens = byte_ids("größer als zuvor".encode())
        params = SamplingParams(max_tokens=len(tokens), stop=stop, stop_token_ids=tokens[-1:], min_tokens=len(tokens))
        if ending != "stop token":
            params = SamplingParams(max_tokens=len(tokens) + (ending == "abort"), stop=stop)
        texts = []
        for text_is_read in (False, True):
            processor = OutputProcessor(byte_level(), 1000)
            sequence = running(params)
            for token_id in tokens:
                processor.record(sequence, token_id, None)
                processor.conclude(sequence, text_is_read)
                if not (text_is_read or stop or sequence.is_finished):
                    assert sequence.output_text == ""
            if ending == "abort":
                sequence.set_status(SequenceStatus.FINISHED_ABORTED)
            processor.close(sequence)
            texts.append(sequence.output_text)
        assert texts[0] == texts[1] == ("größer als zuvo" if ending == "stop token" else "größer als zuvor"), texts

    @given(text=st.text("abc é", min_size=1, max_size=24), stop=st.sampled_from([[], ["b"], ["ca", "bb"], ["é"]]),
           min_tokens=st.integers(0, 6), sizes=st.lists(st.integers(1, 5), min_size=24, max_size=24))
    def test_several_tokens_at_once(self, text: str, stop: list[str], min_tokens: int, sizes: list[int]) -> None:
        """A step may give several tokens: text, tokens, log-probabilities and reason are those of one at a time."""
        tokens = byte_ids(text.encode())
        params = SamplingParams(max_tokens=len(tokens), stop=stop, min_tokens=min(min_tokens, len(tokens)), logprobs=1,
                                stop_token_ids=byte_ids(b"c"))
        ends = []
        for step_sizes in ([1] * len(tokens), sizes):
            processor, sequence, left = OutputProcessor(byte_level(), 1000), running(params), tokens.copy()
            for size in step_sizes:
                for token_id in left[:size]:
                    if sequence.ends_as is None:
                        processor.record(sequence, token_id, {token_id: Logprob(-1 / (1 + token_id), 1)})
                del left[:size]
                processor.conclude(sequence)
                if sequence.is_finished:
                    break
            ends.append((sequence.output_text, sequence.output_token_ids, sequence.status, sequence.stop_reason,
                         sequence.cumulative_logprob, [list(entry) for entry in sequence.logprobs]))
        assert ends[0] == ends[1]
        assert ends[0][2].is_finished

    def test_nothing_is_recorded_behind_the_end(self) -> None:
        processor, sequence = OutputProcessor(byte_level(), 1000), running(SamplingParams(max_tokens=1))
        processor.record(sequence, 3, None)
        assert (sequence.ends_as, sequence.status) == (SequenceStatus.FINISHED_LENGTH_CAPPED, SequenceStatus.RUNNING)
        with pytest.raises(AssertionError, match="has its last token"):
            processor.record(sequence, 3, None)

    def test_an_abort_keeps_its_reason(self) -> None:
        """A stop string in a token that was recorded, and not looked at, cuts the text and explains nothing."""
        processor, sequence = OutputProcessor(byte_level(), 1000), running(SamplingParams(max_tokens=9, stop=["c"]))
        for token_id in byte_ids(b"abc"):
            processor.record(sequence, token_id, None)
        sequence.set_status(SequenceStatus.FINISHED_ABORTED)
        sequence.stop_reason = "shutdown"
        processor.close(sequence)
        assert (sequence.stop_reason, sequence.output_text) == ("shutdown", "ab")
        assert not processor._states


class CountingTokenizer(Tokenizer):
    """Counts how often it decodes."""

    num_calls = 0

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        self.num_calls += 1
        return super().decode(token_ids, skip_special_tokens)


def made(processor: OutputProcessor, request: Request) -> list[dict[int, Logprob] | None]:
    """The prompt's log-probabilities as the request reports them."""
    entries = processor.make_output(request).prompt_logprobs
    assert entries is not None
    return entries


def running(params: SamplingParams, *eos: int) -> Sequence:
    """A sequence with a prompt of one token, in the engine's batch."""
    return Sequence(next_seq_id(), SequenceData(byte_level().encode(BOS)), params, 0, eos,
                    status=SequenceStatus.RUNNING)
