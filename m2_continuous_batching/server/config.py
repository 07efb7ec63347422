"""The options of the server, beside those of its engine. The limits keep one request from holding up all others."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from m0_basics.config import check_int, option, reject


@dataclass(frozen=True)
class ServerConfig:
    """What the server needs to know beside its engine. A limit is checked before what it limits is worked on."""

    served_model_name: str = option("model", "The name that clients use for the model.")
    api_key: str | None = option(None, "Clients have to send this key.")
    salt_by_api_key: bool = option(False, "Requests with different keys, which something else has checked, share no "
                                          "cache.")
    max_body_bytes: int = option(4 * 2 ** 20, "Largest body of a request.")
    max_messages: int = option(2048, "Most messages of a chat, and most parts of their contents.")       # OpenAI's
    max_list_items: int = option(1024, "Most entries of stop, bad_words, logit_bias and the lists of token ids.")
    max_list_chars: int = option(65_536, "Most characters of stop, or of bad_words; an entry counts as one more.")
    max_grammar_chars: int = option(120_000, "Most characters of a schema, a regex or choices, of which each "
                                    "counts as one more.")                                      # OpenAI's
    max_step_s: float = option(60.0, "A step that takes longer makes /health fail.")                # vLLM's
    max_compile_s: float = option(10.0, "Longest that a request waits for its constraint to be compiled.")
    # vLLM's, which its flags take as JSON; here they become tuples.
    allowed_origins: str | tuple[str, ...] = option('["*"]', "Origins that browsers may send requests from. As JSON.")
    allowed_methods: str | tuple[str, ...] = option('["*"]', "Methods that they may use. As JSON.")
    allowed_headers: str | tuple[str, ...] = option('["*"]', "Headers that they may send. As JSON.")
    allow_credentials: bool = option(False, "Whether they may send cookies and such.")

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_messages", "max_list_items", "max_list_chars", "max_grammar_chars"):
            check_int(name, getattr(self, name), 1)
        for name in ("max_step_s", "max_compile_s"):
            if not getattr(self, name) > 0:
                raise reject(name, getattr(self, name), "seconds above 0")
        for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            object.__setattr__(self, name, _words(name, getattr(self, name)))
        # A header has no space at its ends, and an empty key would let everybody in.
        if self.api_key is not None and (not self.api_key or self.api_key != self.api_key.strip()):
            raise reject("api_key", self.api_key, "None, or text that is not empty and has no space at its ends")
        if self.salt_by_api_key and self.api_key is not None:
            raise reject("salt_by_api_key", True, "without api_key, which all clients share: with it, nobody is kept "
                                                  "apart; let what stands before this server check the keys")


def _words(name: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """A list of texts, or JSON that is one, as a tuple."""
    try:
        words = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        words = None
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise reject(name, value, 'a list of texts, or JSON that is one, such as ["http://localhost:3000"]')
    return tuple(words)
