"""From tokens to text, one token at a time, without ever taking back a character.

Two things stand in the way. A token may end in the middle of a character, so its last bytes have to wait for
the next token. And a stop string may be spread over tokens, so text that could be the beginning of one has to
wait as well.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from m0_basics.loading.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"         # what a decoder writes for bytes that form no character


class IncrementalDetokenizer:
    """Text of a growing list of tokens, in pieces: what it adds to the prompt's text.

        token_ids  [ ...done... | context | window .......... ]
                                ^start    ^read

    Only `token_ids[start:]` is decoded at each step. The context (the tokens of the last finished piece, at first the
    end of the prompt) is there for decoders that treat the first token of a text differently: SentencePiece's drop its
    leading space.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True,
                 prompt_token_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._token_ids = tokenizer.context(prompt_token_ids, skip_special_tokens)
        self._start, self._read = 0, len(self._token_ids)
        self._context = self._decode(0, self._read)         # text of token_ids[start:read]
        self._emitted = 0               # characters of the window that were returned already

    def push(self, token_id: int) -> str:
        """Add a token; return the characters that are now certain."""
        self._token_ids.append(token_id)
        text = self._window()
        # A byte-level decoder writes one replacement for a character that is not complete, byte fallback one for
        # each of its bytes: whichever it is, what stands before them cannot change any more.
        certain = text.rstrip(_REPLACEMENT)
        new = self._emit(certain)
        if text and text == certain:            # a token without text, such as a special one, is no context
            self._start, self._read, self._emitted = self._read, len(self._token_ids), 0
            self._context = self._decode(self._start, self._read)
        return new

    def flush(self) -> str:
        """The characters still held back; no token follows."""
        return self._emit(self._window())

    def _window(self) -> str:
        text = self._decode(self._start, len(self._token_ids))
        if text.startswith(self._context):
            return text[len(self._context):]
        # Byte fallback judges a run of bytes as a whole: broken ones spoil the context, which was shown already.
        return self._decode(self._read, len(self._token_ids))

    def _emit(self, text: str) -> str:
        new = text[self._emitted:]
        self._emitted = max(self._emitted, len(text))
        return new

    def _decode(self, start: int, stop: int) -> str:
        if stop - start == 1:               # most contexts
            return self._tokenizer.decode_one(self._token_ids[start], self._skip)
        return self._tokenizer.decode(self._token_ids[start:stop], self._skip)


class StopChecker:
    """Finds stop strings in growing text, and says how much of the text is safe to show.

    It reads each character once, whatever the number of strings: they are one automaton.
    """

    def __init__(self, stop: StopAutomaton, include_stop_str_in_output: bool) -> None:
        self._automaton = stop
        self._include = include_stop_str_in_output
        self._state = self._automaton[0]
        self._searched = 0              # characters that were read; a match has to end after them

    def find(self, text: str) -> tuple[str, int] | None:
        """Return (stop string, length to cut the text to) for the match that ends first, and after what was searched.

        Of several that end at the same place it is the longest: so the result does not depend on the pieces in
        which the text grew.
        """
        for end, character in enumerate(text[self._searched:], start=self._searched + 1):
            self._state = self._automaton.step(self._state, character)
            if (stop := self._state.stop) is not None:
                self._searched = end
                return stop, end if self._include else end - len(stop)
        self._searched = len(text)
        return None

    def skip(self, text: str) -> None:
        """Take `text` as searched: what is in it must not stop the output."""
        for character in text[self._searched:]:
            self._state = self._automaton.step(self._state, character)
        self._searched = len(text)

    def safe_length(self, text: str) -> int:
        """Length of the text, all of it searched, without an end that may become the beginning of a stop string."""
        if self._include:
            return len(text)
        state = self._state
        while state.shorter is not None and not state.next:         # nothing goes on from here
            state = state.shorter
        return len(text) - state.depth


@dataclass(eq=False)
class StopState:
    """The longest end of what was read that is the beginning of a stop string: `depth` characters of it."""

    depth: int
    next: dict[str, StopState] = field(default_factory=dict)        # by the character that goes on
    shorter: StopState | None = None            # the next shorter end that is a beginning; None at depth 0
    stop: str | None = None                     # the longest stop string that ends here


class StopAutomaton(list[StopState]):
    """Aho and Corasick's automaton (1975); the first state is where a text begins."""

    def __init__(self, stop: Iterable[str]) -> None:
        super().__init__([StopState(0)])
        for text in stop:
            state = self[0]
            for depth, character in enumerate(text, start=1):
                if (following := state.next.get(character)) is None:
                    following = state.next[character] = StopState(depth)
                    self.append(following)
                state = following
            state.stop = text
        queue = deque([self[0]])
        while queue:                            # shorter ends first: theirs are known when the longer ones ask
            state = queue.popleft()
            for character, following in state.next.items():
                following.shorter = self[0] if state.shorter is None else self.step(state.shorter, character)
                following.stop = following.stop or following.shorter.stop
                queue.append(following)

    def step(self, state: StopState, character: str) -> StopState:
        """The state after one more character."""
        while (following := state.next.get(character)) is None:
            if state.shorter is None:
                return state
            state = state.shorter
        return following
