"""The tokens that a model folder names beside `tokenizer.json`: special ones by their role, added ones by their id.

Four files may hold them, older ones for newer ones: `tokenizer_config.json`, and where that has no
`added_tokens_decoder` also `special_tokens_map.json` and `added_tokens.json`. The order is transformers'.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..config import ConfigError
from .files import read_json

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_MODEL_BYTES = 256 << 20            # the largest tokenizer.model in use is some 5 MB
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def read_settings(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`, completed by the files that older versions of transformers wrote."""
    settings = read_json(folder / "tokenizer_config.json", required=False)
    if settings.get("added_tokens_decoder") is None:
        settings |= read_json(folder / "special_tokens_map.json", required=False)
        special = named_tokens(settings)
        settings["added_tokens_decoder"] = {
            token_id: {"content": text, "special": text in special, "normalized": text not in special}
            for text, token_id in read_json(folder / "added_tokens.json", required=False).items()}
    return settings


def token_text(name: str, token: Any) -> str | None:
    """The text of a special token, which may be an AddedToken written out; None where there is none."""
    text = token.get("content") if isinstance(token, Mapping) else token
    if text is not None and not isinstance(text, str):
        raise ConfigError(f"{name}={token!r} of the tokenizer's settings is not valid; allowed: text")
    return text or None


def named_tokens(settings: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Text -> flags of every token that the settings call special."""
    tokens = [settings.get(role) for role in ROLES]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = settings.get(name) or []
        tokens += more.values() if isinstance(more, Mapping) else more if isinstance(more, list) else [more]
    return {text: token if isinstance(token, Mapping) else {} for token in tokens
            if (text := token_text("special token", token)) is not None}


def added_tokens(settings: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """Id -> content and flags of every token that the settings add."""
    entries = settings.get("added_tokens_decoder") or {}
    try:
        tokens: dict[int, Mapping[str, Any]] = {int(i): dict(token) for i, token in entries.items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"added_tokens_decoder of the tokenizer's settings is not valid: {error}; "
                          "allowed: ids with an added token each") from error
    if bad := [token for token in tokens.values() if not isinstance(token.get("content"), str)]:
        raise ConfigError(f"added token {bad[0]!r} of the tokenizer's settings is not valid; allowed: one with a text")
    return tokens


def add_tokens(backend: Any, settings: Mapping[str, Any]) -> None:
    """Make the settings' tokens known to a `tokenizers.Tokenizer`. What it knows already stays as it is."""
    from tokenizers import AddedToken
    known = {token.content for token in backend.get_added_tokens_decoder().values()}

    def add(text: str, token: Mapping[str, Any], special: bool) -> None:
        flags = {"normalized": not special} | {flag: bool(token[flag]) for flag in _FLAGS if flag in token}
        method = backend.add_special_tokens if special else backend.add_tokens
        method([AddedToken(text, special=special, **flags)])

    for token_id, token in sorted(added_tokens(settings).items()):
        text = token["content"]
        if text and text not in known:
            is_new = backend.token_to_id(text) is None
            add(text, token, bool(token.get("special")))
            if is_new and backend.token_to_id(text) != token_id:
                raise ConfigError(f"the tokenizer's settings give the token {text!r} the id {token_id}, but the next "
                                  f"free one of tokenizer.json is {backend.token_to_id(text)}")
            known.add(text)
    for text, token in named_tokens(settings).items():
        # A token of the vocabulary that is special in the settings alone. One without an id has no row in the model.
        if text not in known and backend.token_to_id(text) is not None:
            add(text, token, True)


def eos_token_id(folder: Path) -> int | None:
    """The id of the settings' end-of-sequence token, without building the tokenizer; None where there is none."""
    settings = read_settings(folder)
    text = token_text("eos_token", settings.get("eos_token"))
    if text is None:
        return None
    for token_id, token in added_tokens(settings).items():
        if token["content"] == text:
            return token_id
    if not (folder / "tokenizer.json").is_file():
        return _sentencepiece_id(folder / "tokenizer.model", text)
    tokenizer = read_json(folder / "tokenizer.json")
    for token in tokenizer.get("added_tokens") or []:
        if isinstance(token, dict) and token.get("content") == text and isinstance(token.get("id"), int):
            return int(token["id"])
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        return vocab[text] if isinstance(vocab.get(text), int) else None
    pieces = [entry[0] for entry in vocab or [] if isinstance(entry, list) and entry]       # Unigram's list of scores
    return pieces.index(text) if text in pieces else None


def _sentencepiece_id(file: Path, text: str) -> int | None:
    """The number of a piece in a SentencePiece model; None where there is none, or no such model.

    The model is a protocol buffer: its fields 1 are the pieces by number, and field 1 of each is the piece's text.
    """
    try:
        if file.stat().st_size > _MAX_MODEL_BYTES:
            return None
        pieces = (content for field, content in _protobuf_fields(file.read_bytes()) if field == 1)
        for token_id, piece in enumerate(pieces):
            if (1, text.encode()) in _protobuf_fields(piece):
                return token_id
    except (OSError, ValueError, IndexError):       # whoever builds the tokenizer says what is wrong with the file
        pass
    return None


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number, content) of the fields that have a length: texts and messages. Raises ValueError or IndexError."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(data, at)
        elif kind == 2:
            size, at = _varint(data, at)
            yield tag >> 3, data[at:at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, seven bits in each, and where it ends."""
    value = 0
    for i in range(10):
        value |= (data[at + i] & 127) << 7 * i
        if data[at + i] < 128:
            return value, at + i + 1
    raise ValueError("a number that does not end")
