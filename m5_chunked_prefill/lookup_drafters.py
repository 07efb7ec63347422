"""Drafters that look up what was said before.

    ... the cat sat on the mat . the cat
                                 ^^^^^^^     occurred before: guess what followed there: sat on the mat

Nothing is computed by a model. It pays where texts repeat themselves: quotes, code, JSON, summaries.
"""
from __future__ import annotations

from collections import deque
from weakref import WeakKeyDictionary

from m0_basics.request import Request, Sequence

from .drafter import Drafter, Drafts
from .suffix_automaton import Match, SuffixAutomaton

_MOST_READ = 512            # tokens of a long text that are read between two steps


class NGramDrafter(Drafter):
    """Prompt look-up: the last n tokens, where they occurred before, and what followed then (the longest n first)."""

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.longest, self.shortest = longest, shortest
        self._indices: WeakKeyDictionary[Sequence, _NGrams] = WeakKeyDictionary()

    def propose(self, sequences: list[Sequence], lengths: list[int]) -> Drafts:
        drafts = []
        for sequence, length in zip(sequences, lengths, strict=True):
            index = self._indices.get(sequence)
            if index is None:
                index = self._indices[sequence] = _NGrams(self.longest, self.shortest)
            index.read(sequence)
            drafts.append(index.continuation(length))
        return drafts


class _NGrams:
    """Where each n-gram of a sequence ended last, the newest one left out."""

    def __init__(self, longest: int, shortest: int) -> None:
        self.sizes = range(longest, shortest - 1, -1)
        self.tokens: list[int] = []
        self.ends: dict[tuple[int, ...], int] = {}

    def read(self, sequence: Sequence) -> None:
        """Take in what the sequence has got since the last time."""
        if len(self.tokens) > sequence.num_tokens:      # a stop string cut it: begin anew
            self.tokens, self.ends = [], {}
        for token_id in sequence.data.token_slice(len(self.tokens), sequence.num_tokens):
            end = len(self.tokens)                      # n-grams that end before this token are followed by something
            for n in self.sizes:
                if end >= n:
                    self.ends[tuple(self.tokens[end - n:end])] = end
            self.tokens.append(token_id)

    def continuation(self, length: int) -> list[int]:
        for n in self.sizes:
            if len(self.tokens) >= n and (end := self.ends.get(tuple(self.tokens[-n:]))) is not None:
                return self.tokens[end:end + length]
        return []


class SuffixDrafter(Drafter):
    """The longest end of the text that occurred before, in this text or in an earlier one, however long it is."""

    def __init__(self, shortest: int = 2, max_earlier_tokens: int = 200_000) -> None:
        """`max_earlier_tokens`: of requests that have ended; then the older half is forgotten."""
        self.shortest = shortest
        self._own: WeakKeyDictionary[Sequence, SuffixAutomaton] = WeakKeyDictionary()
        self._earlier = _EarlierTexts(max_earlier_tokens)
        self._walks: WeakKeyDictionary[Sequence, _Walk] = WeakKeyDictionary()

    def propose(self, sequences: list[Sequence], lengths: list[int]) -> Drafts:
        self._earlier.read()
        return [self._propose(sequence, length) for sequence, length in zip(sequences, lengths, strict=True)]

    def _propose(self, sequence: Sequence, length: int) -> list[int]:
        own = self._own.get(sequence)
        if own is None or len(own) > sequence.num_tokens:
            own = self._own[sequence] = SuffixAutomaton()
        for token_id in sequence.data.token_slice(len(own), min(sequence.num_tokens, len(own) + _MOST_READ)):
            own.append(token_id)
        if len(own) < sequence.num_tokens:
            return []
        walk = self._walks.get(sequence)
        if walk is None or walk.num_read > sequence.num_tokens:
            walk = self._walks[sequence] = _Walk()
        matched, draft = own.repeated_suffix(), list[int]()
        if matched.length >= self.shortest:
            draft = own.tokens[matched.end:matched.end + length]
        best = matched.length
        for automaton in self._earlier.automata:
            found = walk.match(automaton, sequence)
            if found.length > best and found.length >= self.shortest:
                following = automaton.tokens[found.end:found.end + length]
                following = following[:next((i for i, t in enumerate(following) if t < 0), len(following))]
                if following:
                    best, draft = found.length, following
        walk.num_read = sequence.num_tokens
        return draft

    def on_request_completion(self, request: Request) -> None:
        """What was said may be said again."""
        self._earlier.add(request.sequences[0].data.token_ids)


class _EarlierTexts:
    """The texts of requests that have ended, read a piece at a time: nobody waits for all of a long one."""

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.automata = [SuffixAutomaton()]                 # the newest last
        self._unread, self._num_unread = deque[list[int]](), 0

    def add(self, token_ids: list[int]) -> None:
        """A text to be read; what came long ago and was not read yet is dropped where it becomes too much."""
        self._unread.append(token_ids)
        self._num_unread += len(token_ids)
        while self._num_unread > self.max_tokens and len(self._unread) > 1:
            self._num_unread -= len(self._unread.popleft())

    def read(self) -> None:
        """Some of what was not read yet. A mark that no text contains ends each text."""
        left = _MOST_READ
        while left and self._unread:
            newest, text = self.automata[-1], self._unread.popleft()
            self._num_unread -= len(text[:left])
            for token_id in text[:left]:
                newest.append(token_id)
            if len(text) > left:
                self._unread.appendleft(text[left:])
                return
            left -= len(text)
            newest.append(-1 - len(newest))
            if len(newest) > self.max_tokens // 2:
                self.automata = [newest, SuffixAutomaton()]


class _Walk:
    """How far a sequence has gone through the automata of earlier texts."""

    def __init__(self) -> None:
        self.num_read = 0
        self._places: dict[int, tuple[int, int]] = {}       # by the automaton's number: state, length of the match

    def match(self, automaton: SuffixAutomaton, sequence: Sequence) -> Match:
        place = self._places.get(automaton.number)
        # A new automaton, or texts that were added since: the newest tokens say enough.
        first = self.num_read if place is not None else max(0, sequence.num_tokens - 32)
        state, length = place or (0, 0)
        for token_id in sequence.data.token_slice(first, sequence.num_tokens):
            state, length = automaton.step(state, length, token_id)
        self._places[automaton.number] = state, length
        return Match(length, automaton.ends[state] if length else 0)
