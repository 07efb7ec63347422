"""The tokenizer that a GGUF header describes, rebuilt with the `tokenizers` library.

Two kinds exist: byte-level BPE ("gpt2": Qwen, Llama 3, SmolLM), whose text is first split by a pattern that
the key `tokenizer.ggml.pre` names, and SentencePiece BPE ("llama": Llama 2, TinyLlama), whose merges have to
be found again from the tokens' scores.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_CONTROL, _USER_DEFINED = 3, 4                      # GGUF token types
_QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_LLAMA3_PATTERN = _QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def build_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """Return the tokenizer that the header of the file at `path` describes."""
    from tokenizers import AddedToken
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _KINDS:
        raise ConfigError(f"tokenizer {kind!r} of {path} is not supported; allowed: {', '.join(_KINDS)}")
    try:
        tokenizer = _KINDS[kind](metadata, path)
    except KeyError as error:
        raise ConfigError(f"{path} lacks the key {error}") from error
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or []
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=False)
                                  if k == _CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=False)
                          if k == _USER_DEFINED])
    # Files older than the key: Llama's tokenizers, both kinds, begin with BOS.
    is_llama = kind == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    if metadata.get("tokenizer.ggml.add_bos_token", is_llama) and "tokenizer.ggml.bos_token_id" in metadata:
        _prepend_bos(tokenizer, tokens, metadata["tokenizer.ggml.bos_token_id"])
    return tokenizer


def _byte_level(metadata: dict[str, Any], path: Path) -> Tokenizer:
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    def split(pattern: str) -> Any:
        return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    splitters = {
        "default": byte_level, "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
        "qwen2": split(_QWEN2_PATTERN), "llama-bpe": split(_LLAMA3_PATTERN),
    }
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in splitters:
        raise ConfigError(f"pre-tokenizer {pre!r} of {path} is not supported; allowed: {', '.join(splitters)}")
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = splitters[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(metadata: dict[str, Any], path: Path) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    vocab = {token: i for i, token in enumerate(tokens)}
    # SentencePiece joins the pair whose result scores highest: every split of a token into two tokens is a
    # merge, and the order of the merges is the order of the scores.
    merges = [(token[:i], token[i:]) for token in sorted(tokens, key=lambda t: -scores[vocab[t]])
              for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Replace(" ", "▁")]
    strip: list[Any] = []
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        strip = [decoders.Strip(" ", 1, 0)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *strip])
    return tokenizer


_KINDS = {"gpt2": _byte_level, "llama": _sentencepiece}


def _prepend_bos(tokenizer: Tokenizer, tokens: list[str], bos: int) -> None:
    from tokenizers.processors import TemplateProcessing
    tokenizer.post_processor = TemplateProcessing(
        single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A $B", special_tokens=[(tokens[bos], bos)])
