"""From tokens to text, one token at a time, without ever taking back a character.

Two things stand in the way. A token may end in the middle of a character, so its last bytes have to wait for
the next token. And a stop string may be spread over tokens, so text that could be the beginning of one has to
wait as well.
"""
from __future__ import annotations

from collections.abc import Sequence

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
    """Finds stop strings in growing text, and says how much of the text is safe to show."""

    def __init__(self, stop: list[str], include_stop_str_in_output: bool) -> None:
        self._stop = stop
        self._include = include_stop_str_in_output
        self._longest = max(map(len, stop), default=0)
        self._searched = 0              # a match has to end after this many characters of the text

    def find(self, text: str) -> tuple[str, int] | None:
        """Return (stop string, length to cut the text to) for the match that ends first, and after what was searched.

        Of several that end at the same place it is the longest: so the result does not depend on the pieces in
        which the text grew.
        """
        matches = []
        for stop in self._stop:
            at = text.find(stop, max(0, self._searched - len(stop) + 1))
            if at >= 0:
                matches.append((at + len(stop), at, stop))
        self._searched = len(text)
        if not matches:
            return None
        end, at, stop = min(matches)
        return stop, end if self._include else at

    def skip(self, text: str) -> None:
        """Take `text` as searched: what is in it must not stop the output."""
        self._searched = len(text)

    def safe_length(self, text: str) -> int:
        """Length of the text without an end that may turn out to be the beginning of a stop string."""
        if self._include:
            return len(text)
        for held in range(min(self._longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-held:]) for s in self._stop):
                return len(text) - held
        return len(text)
