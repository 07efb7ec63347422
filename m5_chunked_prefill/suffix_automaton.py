"""A suffix automaton: every substring of a text as a path from its root, built token by token in linear time.

(Blumer et al., 1985.) Each state stands for substrings that end at the same places; `links` lead to the longest end of
them that occurs at other places too. So the link of the newest state is the longest end of the text that occurred
before: what a drafter looks for.
"""
from __future__ import annotations

import itertools
from typing import NamedTuple

_numbers = itertools.count()


class Match(NamedTuple):
    """An end of some text, found earlier."""

    length: int                 # tokens
    end: int                    # what followed begins here


class SuffixAutomaton:
    """The substrings of `tokens`."""

    def __init__(self) -> None:
        self.number = next(_numbers)                # no other automaton has it
        self.tokens: list[int] = []
        self.ends: list[int] = [0]                  # by state: where its substrings were last seen to end
        self._lengths: list[int] = [0]              # the longest of them
        self._links: list[int] = [-1]
        self._next: list[dict[int, int]] = [{}]
        self._newest = 0
        self._repeated = Match(0, 0)

    def __len__(self) -> int:
        return len(self.tokens)

    def append(self, token_id: int) -> None:
        """The text goes on. Amortised constant time."""
        self.tokens.append(token_id)
        state = self._add(self._lengths[self._newest] + 1, {}, len(self.tokens))
        p = self._newest
        while p >= 0 and token_id not in self._next[p]:
            self._next[p][token_id] = state
            p = self._links[p]
        if p < 0:
            self._links[state] = 0
        else:
            q = self._next[p][token_id]
            self._links[state] = q if self._lengths[p] + 1 == self._lengths[q] else self._split(p, q, token_id)
        self._newest = state
        link = self._links[state]
        self._repeated = Match(self._lengths[link], self.ends[link])
        self.ends[link] = len(self.tokens)          # next time, the newest place is what is found

    def repeated_suffix(self) -> Match:
        """The longest end of the text that occurred before, and where it was last seen."""
        return self._repeated

    def step(self, state: int, length: int, token_id: int) -> tuple[int, int]:
        """Another text goes on: from a state, and how many of its tokens match there, to those after one more token."""
        state = self._of_length(state, length)
        while state and token_id not in self._next[state]:
            state = self._links[state]
            length = self._lengths[state]
        if token_id not in self._next[state]:
            return 0, 0
        return self._of_length(self._next[state][token_id], length + 1), length + 1

    def _of_length(self, state: int, length: int) -> int:
        """The state of a match of that length. States are split later on: the shorter part is reached by the link."""
        while state and self._lengths[self._links[state]] >= length:
            state = self._links[state]
        return state

    def _add(self, length: int, following: dict[int, int], end: int) -> int:
        self._lengths.append(length)
        self._links.append(-1)
        self._next.append(following)
        self.ends.append(end)
        return len(self.ends) - 1

    def _split(self, p: int, q: int, token_id: int) -> int:
        """Of q's substrings, those that the text has just ended with become a state of their own."""
        clone = self._add(self._lengths[p] + 1, self._next[q].copy(), self.ends[q])
        self._links[clone], self._links[q] = self._links[q], clone
        while p >= 0 and self._next[p].get(token_id) == q:
            self._next[p][token_id] = clone
            p = self._links[p]
        return clone
