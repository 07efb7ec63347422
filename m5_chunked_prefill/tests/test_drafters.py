"""F5.6: guesses that are looked up, and the automaton behind the longer ones."""
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m0_basics.request import Request, Sequence, SequenceData
from m0_basics.sampling_params import SamplingParams
from m5_chunked_prefill.drafter import Drafter
from m5_chunked_prefill.lookup_drafters import NGramDrafter, SuffixDrafter
from m5_chunked_prefill.suffix_automaton import SuffixAutomaton

TEXTS = st.lists(st.integers(0, 2), max_size=40)


def sequence_of(prompt: list[int], output: list[int], seq_id: int = 0) -> Sequence:
    return Sequence(seq_id, SequenceData(prompt, output), SamplingParams(temperature=0), 0)


def occurs_before(text: list[int], length: int) -> list[int]:
    """Where the last `length` tokens end, other than at the end."""
    end = text[len(text) - length:]
    return [i + length for i in range(len(text) - length) if text[i:i + length] == end]


@given(TEXTS)
def test_the_longest_repeated_suffix(text: list[int]) -> None:
    automaton = SuffixAutomaton()
    for i, token in enumerate(text, start=1):
        automaton.append(token)
        found = automaton.repeated_suffix()
        longest = max((n for n in range(i) if occurs_before(text[:i], n)), default=0)
        assert found.length == longest
        assert found.length == 0 or found.end in occurs_before(text[:i], longest)


@given(TEXTS, TEXTS)
def test_another_text_is_followed(text: list[int], other: list[int]) -> None:
    """How much of the end of `other` occurs in `text`, and where."""
    automaton = SuffixAutomaton()
    for token in text:
        automaton.append(token)
    state, length = 0, 0
    for i, token in enumerate(other, start=1):
        state, length = automaton.step(state, length, token)
        inside = [n for n in range(i + 1) if any(text[j:j + n] == other[i - n:i] for j in range(len(text) - n + 1))]
        assert length == max(inside)
        if length:
            end = automaton.ends[state]
            assert text[end - length:end] == other[i - length:i]


@given(TEXTS, TEXTS, st.integers(1, 30))
def test_the_text_may_grow_while_it_is_followed(text: list[int], other: list[int], cut: int) -> None:
    """States are split meanwhile; a place in the old automaton is one in the new."""
    automaton, state, length = SuffixAutomaton(), 0, 0
    for token in text[:cut]:
        automaton.append(token)
    for token in other:
        state, length = automaton.step(state, length, token)
    for token in text[cut:]:
        automaton.append(token)
    read = list(other)
    for token in other:
        state, length = automaton.step(state, length, token)
        read.append(token)
        if length:
            end = automaton.ends[state]
            assert text[end - length:end] == read[len(read) - length:]


@pytest.mark.parametrize("drafter", [NGramDrafter(), SuffixDrafter()], ids=["ngram", "suffix"])
class TestLookUp:
    def propose(self, drafter: Drafter, prompt: list[int], output: list[int], length: int = 4) -> list[int]:
        return drafter.propose([sequence_of(prompt, output)], [length])[0]

    def test_what_followed_before(self, drafter: Drafter) -> None:
        assert self.propose(drafter, [1, 2, 3, 4, 5, 6, 7, 1], [2]) == [3, 4, 5, 6]
        assert self.propose(drafter, [1, 2, 3, 4, 5, 6, 7, 1], [2], length=2) == [3, 4]

    def test_the_longer_match_decides(self, drafter: Drafter) -> None:
        """7 1 2 goes on with 9, and 1 2 with 3."""
        assert self.propose(drafter, [7, 1, 2, 9, 8, 1, 2, 3, 7, 1], [2], length=2) == [9, 8]

    def test_the_newest_of_equals(self, drafter: Drafter) -> None:
        assert self.propose(drafter, [1, 2, 3, 1, 2, 4, 1], [2], length=1) == [4]

    def test_nothing_to_go_by(self, drafter: Drafter) -> None:
        assert self.propose(drafter, [1, 2, 3], [4]) == []
        assert self.propose(drafter, [1], [1]) == []

    def test_a_sequence_grows_and_is_cut(self, drafter: Drafter) -> None:
        sequence = sequence_of([1, 2, 3, 4], [1, 2])
        assert drafter.propose([sequence], [2]) == [[3, 4]]
        sequence.append_token_id(3)
        assert drafter.propose([sequence], [1]) == [[4]]
        sequence.truncate(1)
        assert drafter.propose([sequence], [2]) == [[]]
        sequence.append_token_id(2)
        assert drafter.propose([sequence], [2]) == [[3, 4]]


def test_earlier_requests_are_remembered() -> None:
    drafter = SuffixDrafter()
    request = Request("a", None, [5, 6, 7, 8, 9], SamplingParams())
    request.sequences[0].append_token_id(10)
    drafter.on_request_completion(request)
    assert drafter.propose([sequence_of([7], [8], seq_id=1)], [4]) == [[9, 10]], "and not into the next text"
    assert drafter.propose([sequence_of([7], [9], seq_id=2)], [4]) == [[]]


def test_what_is_remembered_is_bounded() -> None:
    """Also what has not been read yet."""
    drafter = SuffixDrafter(max_earlier_tokens=100)
    for i in range(30):
        drafter.on_request_completion(Request(str(i), None, [100 * i + j for j in range(20)], SamplingParams()))
        assert drafter._earlier._num_unread <= 100
    assert drafter.propose([sequence_of([2900], [2901])], [2]) == [[2902, 2903]]
    assert sum(len(automaton) for automaton in drafter._earlier.automata) <= 130


def test_a_long_text_is_read_a_piece_at_a_time() -> None:
    """Nobody waits for all of it: no guesses until it is read."""
    drafter, sequence = SuffixDrafter(), sequence_of(list(range(3000)), [7, 8])
    drafts = [drafter.propose([sequence], [2])[0] for _ in range(6)]
    assert drafts == [[]] * 5 + [[9, 10]]
    earlier = Request("0", None, list(range(4000, 6000)), SamplingParams())
    drafter.on_request_completion(earlier)
    other = sequence_of([4700], [4701])
    drafts = []
    for token in range(4702, 4706):
        drafts.append(drafter.propose([other], [1])[0])
        other.append_token_id(token)
    assert drafts == [[], [], [4704], [4705]]           # two of the tokens since then are the least that is looked for
