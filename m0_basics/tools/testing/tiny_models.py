"""Tiny random models in Hugging Face folders, made by transformers: the reference defines its own test data.

The weights are drawn so that the layers, not the embedding, decide the logits, and so that the logits are far
apart: greedy decoding is then decided by the mathematics, not by rounding. The tokenizer is byte-level, so
that random output holds every kind of broken and split character.
"""
from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

BOS, EOS = "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
                 "+ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
                 "{% endif %}")
_MERGES = [("t", "h"), ("th", "e"), ("i", "n"), ("a", "n"), ("e", "r"), ("Ġ", "the"), ("o", "n"), ("r", "e"),
           ("ä", "¸"), ("ä¸", "Ń")]        # the last two: two of the three bytes of 中, then all three
VOCAB_SIZE = 288                           # the tokenizer has 268: the matrix is padded, as Qwen's is
_SMALL = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
_LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@dataclass(frozen=True)
class TinyModel:
    """One variant under test: a family, whether input and output matrix are one, and settings of its own."""

    family: str
    tie: bool = False
    overrides: Mapping[str, Any] = field(default_factory=dict)


FAMILIES_UNDER_TEST: dict[str, TinyModel] = {
    "qwen3": TinyModel("qwen3", overrides={"head_dim": 32}),        # 4 x 32 differs from hidden_size
    "qwen3_tied": TinyModel("qwen3", tie=True, overrides={"head_dim": 16}),
    "qwen3_bias": TinyModel("qwen3", overrides={"head_dim": 16, "attention_bias": True}),
    "qwen2": TinyModel("qwen2"),
    "qwen2_tied": TinyModel("qwen2", tie=True),
    "llama": TinyModel("llama"),
    "llama_tied": TinyModel("llama", tie=True, overrides={"num_key_value_heads": 4}),
    "llama_bias": TinyModel("llama", overrides={"attention_bias": True}),
    "llama3_rope": TinyModel("llama", overrides={"rope_parameters": _LLAMA3_ROPE}),
}


def save_tiny_model(folder: Path, family: str, *, seed: int = 0, tie: bool = False,
                    max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """Write a random model of `family` ("qwen3", "qwen2", "llama") to `folder` with its tokenizer; return `folder`.

    `overrides` are fields of the family's transformers configuration. Weights are float32.
    """
    model = build_tiny_model(family, seed=seed, tie=tie, **overrides)
    return save_model(folder, model, max_shard_size)


def build_tiny_model(family: str, *, seed: int = 0, tie: bool = False, **overrides: Any) -> Any:
    """The same as a transformers model in memory."""
    import transformers
    name = {"qwen3": "Qwen3", "qwen2": "Qwen2", "llama": "Llama"}[family]
    eos = byte_level_tokenizer().token_to_id(EOS)
    config = getattr(transformers, f"{name}Config")(**{
        **_SMALL, "tie_word_embeddings": tie, "eos_token_id": eos, "bos_token_id": None, "pad_token_id": None,
        **overrides})
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    _draw_weights(model, seed)
    return model


def save_parrot_model(folder: Path, text: str, *, then_eos: bool = False) -> Path:
    """Write a model that recites `text` after the prompt `<|im_start|>`, byte by byte; then again, or ends.

    The layers add nothing, so the next token depends on the last one alone: output row next(t) is the embedding
    of t. That is a function only if the bytes of `text` are all different, which is asserted.
    """
    tokenizer = byte_level_tokenizer()
    cycle = [tokenizer.token_to_id(c) for c in _byte_characters(text)]
    assert len(set(cycle)) == len(cycle), "the bytes of the text must differ from each other"
    start, end = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
    # The end of the cycle and <|im_start|> both lead to its beginning: the sum answers to either.
    steps = [(start, cycle[0]), *pairwise(cycle), (cycle[-1], end if then_eos else cycle[0])]
    return save_model(folder, build_reciting_model(steps))


def save_sentencepiece_model(folder: Path) -> Path:
    """Write a model over a SentencePiece tokenizer that goes on " in. 中 the in. ..." after the prompt "the"."""
    tokenizer = sentencepiece_tokenizer("always")
    cycle = [tokenizer.token_to_id(token) for token in ("▁the", "▁in", ".", "▁", "中")]
    model = build_reciting_model([*pairwise(cycle), (cycle[-1], cycle[0])])
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.token_to_id("<s>")
    return save_model(folder, model, tokenizer=tokenizer)


def build_reciting_model(steps: Sequence[tuple[int, int]]) -> Any:
    """A model in which the token on the left of each step is followed by the one on its right, whatever was before."""
    model = build_tiny_model("llama")
    state = model.state_dict()
    for name, weight in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            weight.zero_()
        elif name.endswith("norm.weight"):
            weight.fill_(1.0)
    embedding, output = state["model.embed_tokens.weight"], state["lm_head.weight"]
    output.zero_()
    for token, following in steps:
        output[following] += embedding[token] / embedding[token].norm()
    model.load_state_dict(state)
    return model


def save_model(folder: Path, model: Any, max_shard_size: str = "5GB", tokenizer: Any = None) -> Path:
    """Write a transformers model and its tokenizer (default: the byte-level one) to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(str(folder), max_shard_size=max_shard_size)
    (tokenizer or byte_level_tokenizer()).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def byte_level_tokenizer() -> Any:
    """A `tokenizers.Tokenizer`: 256 bytes, ten merges, two special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in _MERGES)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, _MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BOS, normalized=False), AddedToken(EOS, normalized=False)])
    return tokenizer


def sentencepiece_tokenizer(prepend: str) -> Any:
    """A `tokenizers.Tokenizer` that writes a space as U+2581: eleven words over byte fallback, and `<s>`.

    `prepend`: "always" decodes as Llama 2's does, "first" and "never" as T5's and Mistral's later ones do.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import Unigram
    words = ["▁", "▁the", "▁in", "the", "in", "a", "n", "中", "，", "é", "."]
    vocab = [("<unk>", 0.0), *((f"<0x{i:02X}>", -20.0) for i in range(256)), *((word, -2.0) for word in words)]
    tokenizer = Tokenizer(Unigram(vocab, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    if prepend == "always":
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=prepend)])
    tokenizer.add_special_tokens([AddedToken("<s>", normalized=False)])
    return tokenizer


def _byte_characters(text: str) -> list[str]:
    """The characters by which a byte-level vocabulary writes the bytes of `text`."""
    from tokenizers import pre_tokenizers
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [character for piece, _ in pieces for character in piece]


def _draw_weights(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = model.config.hidden_size
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            value = 1.0 + 0.2 * noise
        elif name.endswith("bias"):
            value = 0.5 * noise
        elif "embed_tokens" in name or "lm_head" in name:
            value = 4.0 / math.sqrt(hidden) * noise             # logits of standard deviation 4
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            value = 3.0 / math.sqrt(parameter.shape[1]) * noise  # what a layer adds outweighs the embedding
        else:
            value = 1.5 / math.sqrt(parameter.shape[1]) * noise
        parameter.data.copy_(value)
