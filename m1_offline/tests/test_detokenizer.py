"""F1.5, F1.6: text that grows token by token is never taken back and ends as the whole; stop strings are found."""
from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from m0_basics.config import DEFAULT_MODEL, ModelConfig
from m0_basics.loading.loader import load_tokenizer
from m0_basics.loading.tokenizer import Tokenizer
from m0_basics.tools.testing.tiny_models import byte_level_tokenizer, sentencepiece_tokenizer
from m1_offline.detokenizer import IncrementalDetokenizer, StopAutomaton, StopChecker

REPLACEMENT = "\ufffd"
FAMILY, FLAG = "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466", "\U0001f1e8\U0001f1f3"
TEXTS = st.lists(st.sampled_from(["the ", "in", " an", " ", "\n", "naïve", "é", "e\u0301", "中", "中文，", "。", "한",
                                  "😀", FAMILY, "👍🏽", FLAG, "\u200d", "ß", "\x00"]), max_size=12).map("".join)
# Bytes that begin, continue and break characters of two, three and four bytes; and the bytes of U+FFFD itself.
BYTES = st.lists(st.sampled_from([b"a", b" ", b"\xc3", b"\xa9", b"\xe4", b"\xb8", b"\xad", b"\xf0", b"\x9f", b"\x98",
                                  b"\x80", b"\xff", b"\xc0", b"\xed", b"\xa0", b"\xef\xbf\xbd"]),
                 max_size=16).map(b"".join)
# Words, spaces, bytes that begin, continue and break characters, special tokens; the same numbers in every tokenizer.
TOKENS = st.one_of(st.integers(257, 268), st.integers(257, 268), st.integers(0, 268))
EXAMPLES = settings(max_examples=150, deadline=None)


def pieces(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool = True,
           prompt: list[int] | tuple[int, ...] = ()) -> list[str]:
    """What each token adds, and what is left at the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens, prompt)
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


@lru_cache
def sentencepiece(prepend: str) -> Tokenizer:
    return Tokenizer(sentencepiece_tokenizer(prepend), {})


@lru_cache
def reference(kind: str) -> Any:
    """The same tokenizer in transformers' hands."""
    from transformers import PreTrainedTokenizerFast
    backend = byte_level_tokenizer() if kind == "byte level" else sentencepiece_tokenizer(kind)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def reference_decode(kind: str, token_ids: list[int], skip_special_tokens: bool) -> str:
    text: str = reference(kind).decode(token_ids, skip_special_tokens=skip_special_tokens,
                                       clean_up_tokenization_spaces=False)
    return text


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

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["always", "first", "never", "byte level"])
    @EXAMPLES
    @given(prompt=st.lists(TOKENS, max_size=5), output=st.lists(TOKENS, max_size=8), skip=st.booleans())
    @example(prompt=[195, 129], output=[257], skip=False)           # a character of two bytes, then a word's space
    def test_the_prompt_is_the_context(self, kind: str, prompt: list[int], output: list[int], skip: bool) -> None:
        """What the output adds is what transformers' text of both has more than its text of the prompt."""
        tokenizer = byte_level() if kind == "byte level" else sentencepiece(kind)
        before, whole = (reference_decode(kind, ids, skip) for ids in (prompt, prompt + output))
        assume(REPLACEMENT not in before and whole.startswith(before))
        assert tokenizer.decode_output(output, prompt, skip) == whole[len(before):]
        assume(REPLACEMENT not in whole)            # how a broken run is written depends on when it is looked at
        assert "".join(pieces(tokenizer, output, skip, prompt)) == whole[len(before):]

    def test_the_space_before_the_first_token(self) -> None:
        tokenizer = sentencepiece("always")
        the, inside, dot, space, bos = map(tokenizer._backend.token_to_id, ("▁the", "▁in", ".", "▁", "<s>"))
        for prompt, output, texts in (
                ([the], [inside, the, dot], [" in", " the", "."]), ([bos, the], [inside], [" in"]),
                ([the, bos], [inside], [" in"]), ([bos], [inside, the], ["in", " the"]), ([], [inside], ["in"]),
                ([the, space], [space, inside], [" ", " in"]), ([space], [inside], [" in"]),
                ([1 + 0x0a], [space, space, inside], [" ", " ", " in"]), ([the, 1 + 0xe4], [inside], [" in"])):
            assert pieces(tokenizer, output, prompt=prompt) == [*texts, ""]
            assert tokenizer.decode_output(output, prompt) == "".join(texts)
        assert pieces(tokenizer, [inside], False, [bos]) == [" in", ""], "a special token that is shown"

    def test_the_text_of_a_token_in_the_middle(self) -> None:
        """As a list of tokens is shown: joined they give the text, with its spaces."""
        for kind in ("always", "first", "never"):
            tokenizer = sentencepiece(kind)
            words = tokenizer.encode("the in the.")
            assert "".join(map(tokenizer.token_text, words)).removeprefix(" ") == "the in the."
            assert [tokenizer.token_text(i) for i in (268, 1 + 0xe4)] == ["<s>", REPLACEMENT]
        for i in range(268):
            assert byte_level().token_text(i) == byte_level().decode([i], False)

    def test_half_a_character_at_the_end_of_a_prompt_is_the_prompts(self) -> None:
        first, *rest = byte_ids("中".encode())
        for prompt in ([first], [*byte_ids(b"a"), first]):
            assert "".join(pieces(byte_level(), rest, prompt=prompt)) == byte_level().decode(rest) == REPLACEMENT * 2
            assert byte_level().decode_output(rest, prompt) == REPLACEMENT * 2

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
        checker, grown, shown = StopChecker(StopAutomaton(stops), include), "", ""
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
        checker = StopChecker(StopAutomaton(stops), False)
        checker.skip(text[:skipped])
        expected = first_match(text, stops, skipped)
        assert checker.find(text) == (expected and (expected[2], expected[1]))

    def test_only_the_beginning_of_a_stop_string_is_held_back(self) -> None:
        for text, safe in (("", 0), ("a", 1), ("as", 1), ("asto", 1), ("astoo", 5), ("a top", 2), ("at!", 3)):
            checker = StopChecker(StopAutomaton(["stop", "top!"]), False)
            assert checker.find(text) is None
            assert checker.safe_length(text) == safe

    @EXAMPLES
    @given(text=st.text("ab", max_size=12), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=5),
           num_skipped=st.integers(0, 12), cuts=st.sets(st.integers(1, 12)))
    def test_against_a_search_of_every_string(self, text: str, stops: list[str], num_skipped: int,
                                              cuts: set[int]) -> None:
        """However the text grows: the match that ends first after what was skipped, and of those the longest."""
        checker, found = StopChecker(StopAutomaton(stops), True), None
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
            checker = StopChecker(StopAutomaton(f"{i:04d}." for i in range(num)), False)
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
            assert StopChecker(StopAutomaton(stops), False).find(text) == found
