"""The tokenizer and the chat template, read from a Hugging Face folder without importing transformers.

Importing transformers takes seconds; `tokenizers` (the Rust library under it) and Jinja take milliseconds.
A test holds both equal.
"""
from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import ConfigError, short

Message = Mapping[str, Any]
_LONG = 1000                # tokens
_MARK = "<the last message goes on here>"
_ARGUMENTS = {"messages", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize"}


class Tokenizer:
    """Text to token ids and back. Generation pads on the left, so that every row ends in its newest token."""

    padding_side = "left"

    def __init__(self, backend: Any, settings: Mapping[str, Any]) -> None:
        """`backend` is a `tokenizers.Tokenizer`; `settings` is the content of `tokenizer_config.json`."""
        self._backend = backend
        self._settings = settings
        self._texts: dict[tuple[int, bool], str] = {}       # of single tokens
        template = settings.get("chat_template")
        if isinstance(template, list):      # several named templates: chat is the one called "default"
            template = {t["name"]: t["template"] for t in template}.get("default")
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
        settings_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        try:
            settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
        except ValueError as error:
            raise ConfigError(f"{settings_file} cannot be read: {error}") from error
        if template_file.is_file():
            settings["chat_template"] = template_file.read_text(encoding="utf-8")
        file = folder / "tokenizer.json"
        if not file.is_file():
            return cls(_convert_slow_tokenizer(folder), settings)
        try:
            return cls(Backend.from_file(str(file)), settings)
        except Exception as error:          # the library raises bare Exception for a damaged file
            raise ConfigError(f"{file} is not a tokenizer: {error}") from error

    def _special_id(self, name: str) -> int | None:
        token = self._settings.get(name)
        if isinstance(token, Mapping):      # an AddedToken written out
            token = token.get("content")
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
        import jinja2
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
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        specials = {n: t["content"] if isinstance(t := self._settings[n], Mapping) else t
                    for n in names if self._settings.get(n)}
        try:
            return str(_template(self.chat_template).render(
                messages=messages, add_generation_prompt=add_generation_prompt, **(specials | variables)))
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
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


def _template(source: str) -> Any:
    """The Jinja dialect of Hugging Face chat templates: sandboxed, block lines trimmed, three extra names."""
    import jinja2.ext
    import jinja2.sandbox

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)


def _convert_slow_tokenizer(folder: Path) -> Any:
    """A folder with a SentencePiece model only: transformers converts it."""
    # Asked for before transformers is: it makes an empty tokenizer of a folder that has none.
    if not (folder / "tokenizer.model").is_file():
        raise ConfigError(f"{folder} has neither tokenizer.json nor tokenizer.model; "
                          "use skip_tokenizer_init=True to work with token ids only")
    try:
        from transformers import AutoTokenizer
        return AutoTokenizer.from_pretrained(str(folder)).backend_tokenizer
    except Exception as error:
        raise ConfigError(f"{folder} has no tokenizer.json, and transformers could not make one: {error}; "
                          "use skip_tokenizer_init=True to work with token ids only") from error
