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
# Tokens that end an output wherever a file has them, whatever its keys say: llama.cpp's list, without those of models
# that are not supported here and those that fill in the middle of a text.
END_TEXTS = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>",
                       "_<EOT>", "[EOT]", "<|end_of_text|>", "<end_of_utterance>", "<｜end▁of▁sentence｜>"})
_QWEN2_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                  r"|\s*[\r\n]+|\s+(?!\S)|\s+")
_LLAMA3_PATTERN = _QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_SAME_AS = {                                        # other names of the same splitting
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
                    "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez"), "qwen2"),
    **dict.fromkeys(("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum",
                     "modern-bert", "exaone4"), "gpt-2"),
}
_MAX_TOKEN_CHARS = 1024                             # the longest in use are some hundred spaces


def build_tokenizer(metadata: dict[str, Any], path: Path) -> Tokenizer:
    """Return the tokenizer that the header of the file at `path` describes. Raises ConfigError where there is none."""
    from tokenizers import AddedToken
    kind = metadata.get("tokenizer.ggml.model")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ConfigError(f"tokenizer {kind!r} of {path} is not supported; allowed: {', '.join(_KINDS)}")
    _check_lists(metadata, path)
    try:
        tokenizer = _KINDS[kind](metadata, path)
    except KeyError as error:
        raise ConfigError(f"{path} lacks the key {error}") from error
    except ConfigError:
        raise
    except Exception as error:                      # the library's own class, for merges of tokens that do not exist
        raise ConfigError(f"the tokenizer of {path} is damaged: {error}") from error
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True)
                                  if k == _CONTROL or t in END_TEXTS])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types, strict=True)
                          if k == _USER_DEFINED and t not in END_TEXTS])
    # Files older than the key: Llama's tokenizers, both kinds, begin with BOS.
    is_llama = kind == "llama" or _pre_tokenizer(metadata) == "llama-bpe"
    bos = special_ids(metadata).get("bos")
    if metadata.get("tokenizer.ggml.add_bos_token", is_llama) and bos is not None:
        _prepend_bos(tokenizer, tokens, bos)
    return tokenizer


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Role -> id of the special tokens that a header names. An id that no token has is left out, as in llama.cpp."""
    tokens = metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, list) else 0
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if metadata.get("tokenizer.ggml.model") == "llama" else {}
    ids: dict[str, int] = {}
    for role in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        value = metadata.get(f"tokenizer.ggml.{role}_token_id", defaults.get(role))
        if type(value) is int and 0 <= value < size:
            ids[role] = value
    return ids


def _check_lists(metadata: dict[str, Any], path: Path) -> None:
    """The header's lists: their types, their lengths, and that no two tokens are written alike."""
    if (key := "tokenizer.ggml.tokens") not in metadata:
        raise ConfigError(f"{path} lacks the key {key!r}")
    size = None
    for name, kinds, what in (("tokens", str, "texts"), ("merges", str, "texts"), ("scores", (int, float), "numbers"),
                              ("token_type", int, "integers")):
        values = metadata.get(f"tokenizer.ggml.{name}")
        if values is None:
            continue
        if not isinstance(values, list) or not all(isinstance(value, kinds) for value in values):
            raise ConfigError(f"tokenizer.ggml.{name} of {path} is not valid; allowed: a list of {what}")
        size = len(values) if name == "tokens" else size
        if name != "merges" and len(values) != size:
            raise ConfigError(f"{path} has {size} tokens and {len(values)} values in tokenizer.ggml.{name}")
    tokens = metadata["tokenizer.ggml.tokens"]
    if len(set(tokens)) != len(tokens) or "" in tokens or max(map(len, tokens), default=0) > _MAX_TOKEN_CHARS:
        raise ConfigError(f"the tokens of {path} are not valid; allowed: texts of 1 to {_MAX_TOKEN_CHARS} characters, "
                          "each of its own")


def _pre_tokenizer(metadata: dict[str, Any]) -> str:
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    return _SAME_AS.get(pre, pre)


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
    pre = _pre_tokenizer(metadata)
    if pre not in splitters:
        raise ConfigError(f"pre-tokenizer {pre!r} of {path} is not supported; "
                          f"allowed: {', '.join([*splitters, *_SAME_AS])}")
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [(merge[:at], merge[at + 1:]) for merge in metadata["tokenizer.ggml.merges"]
              if (at := merge.find(" ", 1)) > 0]
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = splitters[pre]
    tokenizer.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.pre") == "qwen2":           # the others that split like it do not compose
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
    unknown = tokens[special_ids(metadata)["unknown"]] if "unknown" in special_ids(metadata) else None
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
