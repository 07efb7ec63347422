"""The tokenizer and the chat template, read from a Hugging Face folder without importing transformers.

Importing transformers takes seconds; `tokenizers` (the Rust library under it) and Jinja take milliseconds.
A test holds both equal.
"""
from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .files import read_text
from .special_tokens import ROLES, add_tokens, read_settings, token_text

Message = Mapping[str, Any]


class Tokenizer:
    """Text to token ids and back. Generation pads on the left, so that every row ends in its newest token."""

    padding_side = "left"

    def __init__(self, backend: Any, settings: Mapping[str, Any]) -> None:
        """`backend` is a `tokenizers.Tokenizer`; `settings` is the content of `tokenizer_config.json`."""
        # A trainer's limits may be saved with it. A prompt is taken as it is: what is too long is refused elsewhere.
        backend.no_truncation()
        backend.no_padding()
        add_tokens(backend, settings)
        self._backend = backend
        self._settings = settings
        self._texts: dict[tuple[int, bool], str] = {}       # of single tokens, alone
        self._inner_texts: dict[int, str] = {}              # and in the middle of a text
        self._a_word: list[int] | None = None               # the tokens of some text
        template = settings.get("chat_template")
        if isinstance(template, list):      # several named templates: chat is the one called "default"
            template = next((t.get("template") for t in template
                             if isinstance(t, Mapping) and t.get("name") == "default"), None)
        if template is not None and not isinstance(template, str):
            raise ConfigError(f"chat_template={template!r} of the tokenizer's settings is not valid; allowed: text")
        self.chat_template: str | None = template
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        # A model without a padding token borrows the end-of-sequence token: padding is masked, so any will do.
        pad = self._special_id("pad_token")
        self.pad_token_id: int | None = self.eos_token_id if pad is None else pad

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`."""
        from tokenizers import Tokenizer as Backend
        settings, template_file = read_settings(folder), folder / "chat_template.jinja"
        if template_file.is_file():
            settings["chat_template"] = read_text(template_file)
        file = folder / "tokenizer.json"
        if not file.is_file():
            return cls(_convert_slow_tokenizer(folder), settings)
        try:
            backend = Backend.from_str(read_text(file))
        except ConfigError:
            raise
        except BaseException as error:      # the library raises bare Exception for a damaged file, or its Rust panics
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ConfigError(f"{file} is not a tokenizer: {error}") from error
        return cls(backend, settings)

    def _special_id(self, name: str) -> int | None:
        token = token_text(name, self._settings.get(name))
        token_id: int | None = self._backend.token_to_id(token) if token else None
        return token_id

    def __len__(self) -> int:
        """Number of tokens, added ones included. The model's matrix may be larger: it is padded."""
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def to_json(self) -> str:
        """The tokenizer in the format of `tokenizer.json`."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text -> token ids, with the tokens that the model wants around a plain text (such as BOS) or without."""
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids -> text. Bytes that form no character become U+FFFD."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_one(self, token_id: int, skip_special_tokens: bool = True) -> str:
        """The text of one token. It is kept: a stream asks for the same tokens again and again."""
        text = self._texts.get((token_id, skip_special_tokens))
        if text is None:
            text = self._texts[token_id, skip_special_tokens] = self.decode([token_id], skip_special_tokens)
        return text

    def decode_output(self, token_ids: Sequence[int], prompt_token_ids: Sequence[int],
                      skip_special_tokens: bool = True) -> str:
        """The text that `token_ids` add to a prompt: what its text grows by.

        Decoded alone the first token would begin a text, and a SentencePiece decoder drops the space before it.
        """
        context = self.context(prompt_token_ids, skip_special_tokens)
        before = self.decode(context, skip_special_tokens)
        whole = self.decode([*context, *token_ids], skip_special_tokens)
        # Byte fallback judges a run of bytes as a whole: broken ones spoil the context as well.
        return whole[len(before):] if whole.startswith(before) else self.decode(token_ids, skip_special_tokens)

    def context(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool = True) -> list[int]:
        """The tokens of a prompt that decide how its output begins: the last one with a text, and those after it.

        Tokens that are no whole character are left out: what completes them belongs to the output alone.
        """
        after: list[int] = []                           # without a text, such as special tokens
        for token_id in reversed(prompt_token_ids):
            text = self.decode_one(token_id, skip_special_tokens)
            if "\ufffd" not in text:
                after.append(token_id)
                if text:
                    break
        return after[::-1]

    def token_text(self, token_id: int) -> str:
        """What a token, special or not, adds in the middle of a text: with its space, where it begins a word."""
        text = self._inner_texts.get(token_id)
        if text is None:
            if self._a_word is None:
                self._a_word = self.encode("a", add_special_tokens=False)
            text = self._inner_texts[token_id] = self.decode_output([token_id], self._a_word, False)
        return text

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Messages -> the text that the model was trained to see. Encode it without adding special tokens."""
        if not self.chat_template:
            raise ConfigError("this model has no chat template; use generate instead of chat")
        if not isinstance(messages, (list, tuple)):
            raise ConfigError(f"messages={messages!r} is not valid; allowed: a list of dicts with role and content")
        if not messages:
            raise ConfigError("messages is empty; allowed: at least one message")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise ConfigError(f"messages[{i}]={message!r} is not valid; allowed: a dict with role and content")
        specials = {role: text for role in ROLES if (text := token_text(role, self._settings.get(role)))}
        import jinja2

        from .chat_template import compile_template
        try:
            return compile_template(self.chat_template)(messages=messages, add_generation_prompt=add_generation_prompt,
                                                        tools=None, documents=None, **specials)
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError,
                RecursionError, MemoryError) as error:
            # A template joins and indexes what it is given; content of a wrong type fails inside it.
            raise ConfigError(f"the chat template refuses these messages: {error}") from error


def _convert_slow_tokenizer(folder: Path) -> Any:
    """A folder with the file of another library only: transformers converts it, with that library's help."""
    # Asked for before transformers is: it makes an empty tokenizer of a folder that has none.
    file = folder / "tokenizer.model"
    if not file.is_file():
        raise ConfigError(f"{folder} has neither tokenizer.json nor tokenizer.model; "
                          "use skip_tokenizer_init=True to work with token ids only")
    with file.open("rb") as content:
        is_tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", content.read(4096)) is not None
    # Without it transformers takes a SentencePiece model for tiktoken's, and asks for the wrong one.
    needed = ("transformers", "tiktoken") if is_tiktoken else ("transformers", "sentencepiece", "protobuf")
    if missing := [name for name in needed if not _is_installed(name)]:
        raise ConfigError(f"{folder} has no tokenizer.json, and its tokenizer.model cannot be converted without "
                          f"{', '.join(missing)}; get it with: pip install {' '.join(missing)}; or use "
                          "skip_tokenizer_init=True to work with token ids only")
    try:
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except Exception as error:
        raise ConfigError(f"{folder} has no tokenizer.json, and transformers could not make one: {error}; "
                          "use skip_tokenizer_init=True to work with token ids only") from error


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
