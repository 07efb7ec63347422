"""The tokenizer and the chat template, read from a Hugging Face folder without importing transformers.

Importing transformers takes seconds; `tokenizers` (the Rust library under it) and Jinja take milliseconds.
A test holds both equal.
"""
from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import ConfigError, short
from .files import read_text
from .special_tokens import ROLES, add_tokens, read_settings, token_text

Message = Mapping[str, Any]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "chat_template.jinja")
_LONG = 1000                # tokens
_MOST_BYTES = 4             # of a character in UTF-8
_MARK = "<the last message goes on here>"
_ARGUMENTS = {"messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}


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

    def has_same_vocab(self, other: Tokenizer) -> bool:
        """Whether every token has the same number in both."""
        vocab: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        return vocab == other._backend.get_vocab(with_added_tokens=True)

    def to_json(self) -> str:
        """The tokenizer in the format of `tokenizer.json`."""
        text: str = self._backend.to_str()
        return text

    @cached_property
    def max_chars_per_token(self) -> int:
        """No token stands for more characters of a text than this. (A vocabulary writes a byte as one or more.)"""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text -> token ids, with the tokens that the model wants around a plain text (such as BOS) or without."""
        return self.encode_batch([text], add_special_tokens)[0]

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Several texts -> their token ids. Other threads run meanwhile: the library's `encode` would stop them."""
        return [e.ids for e in self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids -> text. Bytes that form no character become U+FFFD."""
        ids = list(token_ids)
        if len(ids) > _LONG:        # other threads run meanwhile; of a few tokens it would only be slower
            return str(self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

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
        """The tokens of a prompt that decide how its output begins: those of its last characters, and what follows.

        Tokens that are no whole character, not with those before them either, are left out: what completes them belongs
        to the output alone.
        """
        after, end = list[int](), len(prompt_token_ids)     # without a text, such as special tokens
        while end:
            for start in range(end - 1, max(-1, end - 1 - _MOST_BYTES), -1):
                text = self._decode_part(prompt_token_ids[start:end], skip_special_tokens)
                if "\ufffd" not in text:
                    after = [*prompt_token_ids[start:end], *after]
                    if text:
                        return after
                    end = start
                    break
            else:
                end -= 1
        return after

    def _decode_part(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        if len(token_ids) == 1:             # most often
            return self.decode_one(token_ids[0], skip_special_tokens)
        return self.decode(token_ids, skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """What a token, special or not, adds in the middle of a text: with its space, where it begins a word."""
        text = self._inner_texts.get(token_id)
        if text is None:
            if self._a_word is None:
                self._a_word = self._backend.encode("a", add_special_tokens=False).ids
            text = self._inner_texts[token_id] = self.decode_output([token_id], self._a_word, False)
        return text

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True,
                            continue_final_message: bool = False,
                            chat_template_kwargs: Mapping[str, Any] | None = None) -> str:
        """Messages -> the text that the model was trained to see. Encode it without adding special tokens.

        `continue_final_message`: the text ends where the last message does, for the model to go on with it.
        `chat_template_kwargs`: variables of the template, such as Qwen3's `enable_thinking`.
        """
        variables = _template_variables(chat_template_kwargs)
        if continue_final_message:
            if add_generation_prompt:
                raise ConfigError("continue_final_message=True is not valid beside add_generation_prompt=True; "
                                  "allowed: one of them")
            return self._up_to_last_message(messages, variables)
        if not self.chat_template:
            raise ConfigError("this model has no chat template; use generate instead of chat")
        if not isinstance(messages, (list, tuple)):
            raise ConfigError(f"messages={short(messages)} is not valid; "
                              "allowed: a list of dicts with role and content")
        if not messages:
            raise ConfigError("messages is empty; allowed: at least one message")
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or "role" not in message:
                raise ConfigError(f"messages[{i}]={short(message)} is not valid; allowed: a dict with role and content")
        # What an assistant has called without a word has no content, which templates read as empty.
        messages = [m if m.get("content") is not None else {**m, "content": ""} for m in messages]
        specials = {role: text for role in ROLES if (text := token_text(role, self._settings.get(role)))}
        import jinja2

        from .chat_template import compile_template
        try:
            return compile_template(self.chat_template)(
                messages=messages, add_generation_prompt=add_generation_prompt,
                **({"tools": None, "documents": None} | specials | variables))
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError,
                RecursionError, MemoryError) as error:
            # A template joins and indexes what it is given; content of a wrong type fails inside it.
            raise ConfigError(f"the chat template refuses these messages: {error}") from error


    def _up_to_last_message(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The template's text, cut behind the content of the last message: a mark there says where that is."""
        last = messages[-1].get("content") if messages and isinstance(messages[-1], Mapping) else None
        if not isinstance(last, str):
            raise ConfigError("continue_final_message=True needs a last message whose content is text")
        marked = [*messages[:-1], {**messages[-1], "content": f"{last}{_MARK} "}]
        text = self.apply_chat_template(marked, False, chat_template_kwargs=variables)
        at = text.rfind(_MARK)
        if at < 0:
            raise ConfigError("continue_final_message=True is not valid: the chat template leaves out the last message")
        # The space behind the mark is gone where the template trims contents: then it would have trimmed this one.
        return text[:at] if text.startswith(" ", at + len(_MARK)) else text[:at].rstrip()


def _template_variables(given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Raises ConfigError for names that are arguments of their own."""
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"chat_template_kwargs={short(given)} is not valid; allowed: a dict")
    if taken := sorted(_ARGUMENTS & set(given or ())):
        raise ConfigError(f"chat_template_kwargs holds {', '.join(taken)}; allowed: variables of the template that are "
                          "no arguments of their own")
    return dict(given or {})


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
