"""F0.9: GGUF files of every supported type and family, and what is refused."""
from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import gguf as gguf_library
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from m0_basics import LLM
from m0_basics.config import ConfigError
from m0_basics.loading.gguf import GGUFError, open_gguf
from m0_basics.loading.loader import load_spec, resolve_model
from m0_basics.loading.model_cache import convert_gguf
from m0_basics.loading.weights import SafetensorsFolder
from m0_basics.model import inverse_frequencies
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.gguf_blocks import BLOCKS
from m0_basics.tools.testing.gguf_files import write_gguf
from m0_basics.tools.testing.parity import (
    all_logits,
    assert_same_tokens,
    make_runner,
    mixed_length_prompts,
    reference_greedy,
    reference_logits,
)
from m0_basics.tools.testing.tiny_models import EOS, FAMILIES_UNDER_TEST, VOCAB_SIZE, save_tiny_model

PROMPTS = mixed_length_prompts(VOCAB_SIZE, 3, seed=11)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own. `resolve_model` remembers paths, so it forgets them here."""
    monkeypatch.setenv("LLM_LAB_CACHE", str(tmp_path / "cache"))
    resolve_model.cache_clear()
    yield tmp_path / "cache"
    resolve_model.cache_clear()


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """A model whose matrices have rows of 256 weights: the K types' block."""
    return save_tiny_model(tmp_path_factory.mktemp("wide") / "llama", "llama", hidden_size=256, intermediate_size=256,
                           num_hidden_layers=1, seed=4)


def check(file: Path, folder: Path, kind: str, tmp_path: Path) -> None:
    """The file gives the tensors it was written with, and the logits that transformers computes from those."""
    expected = write_gguf(file, folder, kind)
    source = SafetensorsFolder(convert_gguf(file, torch.float32))
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name
    dequantised = shutil.copytree(folder, tmp_path / "dequantised")
    save_file(expected, dequantised / "model.safetensors", metadata={"format": "pt"})
    for prompt, logits in zip(PROMPTS, all_logits(make_runner(file), PROMPTS), strict=True):
        torch.testing.assert_close(logits, reference_logits(dequantised, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_type(kind, tiny_model, tmp_path):
    check(tmp_path / "model.gguf", tiny_model("qwen3"), kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_every_k_type(kind, wide, tmp_path):
    check(tmp_path / "model.gguf", wide, kind, tmp_path)


@pytest.mark.parametrize("variant", [v for v in FAMILIES_UNDER_TEST if v != "llama3_rope"])
def test_every_family(variant, tiny_model, tmp_path):
    """Biases, norms of queries and keys, tied matrices, and the row order of Llama's queries and keys."""
    check(tmp_path / "model.gguf", tiny_model(variant), "Q8_0", tmp_path)


@pytest.mark.parametrize("kind", BLOCKS)
def test_block_decoders_agree_with_the_gguf_package(kind):
    """On random bits, two readings of each format: weight by weight, and the package that the loader uses."""
    size, weights, decoder = BLOCKS[kind]
    raw = np.random.default_rng(1).integers(0, 256, (64, size), dtype=np.uint8)
    raw[:, 1] &= 0x3B                   # no infinite and no NaN scale in the first half-precision number,
    raw[:, 3] &= 0x3B                   # nor in the second,
    raw[:, -1] &= 0x3B                  # nor in Q6_K's, which comes last
    theirs = gguf_library.quants.dequantize(raw, gguf_library.GGMLQuantizationType[kind])
    ours = np.array([decoder(block.tobytes()) for block in raw])
    assert theirs.shape == ours.shape == (64, weights)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_header_agrees_with_the_gguf_package(tiny_model, tmp_path):
    """Every key, and every byte of every tensor."""
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model("qwen3"), "Q5_1", metadata={
        "a.u8": np.uint8(3), "a.bool": True, "a.list": [1, 2, 3], "a.floats": [0.5, -1.5], "a.texts": ["é", ""]})
    ours, theirs = open_gguf(file), gguf_library.GGUFReader(str(file))
    fields = {key: field.contents() for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert ours.metadata == fields
    assert [t.name for t in ours.tensors] == [t.name for t in theirs.tensors]
    for a, b in zip(ours.tensors, theirs.tensors, strict=True):
        assert (a.tensor_type, a.shape, a.n_bytes) == (b.tensor_type, tuple(map(int, b.shape[::-1])), b.n_bytes)
        assert a.data.tobytes() == b.data.tobytes()


def test_rotary_factors(tiny_model, tmp_path):
    """Llama 3's scaling comes as a tensor of divisors, one for each frequency; it takes the formula's place."""
    folder = tiny_model("llama3_rope")
    scaling = json.loads((folder / "config.json").read_text())["rope_parameters"]
    inverse = 500.0 ** -(torch.arange(0, 16, 2) / 16)
    factors = []
    for wavelength in (2 * torch.pi / inverse).tolist():
        turns = scaling["original_max_position_embeddings"] / wavelength
        smooth = (turns - scaling["low_freq_factor"]) / (scaling["high_freq_factor"] - scaling["low_freq_factor"])
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    file = tmp_path / "model.gguf"
    write_gguf(file, folder, edit=lambda tensors: tensors.update({"rope_freqs.weight": torch.tensor(factors)}))
    prompts = mixed_length_prompts(VOCAB_SIZE, 2, seed=1, longest=150)
    for prompt, logits in zip(prompts, all_logits(make_runner(file), prompts), strict=True):
        torch.testing.assert_close(logits, reference_logits(folder, prompt), rtol=1e-4, atol=1e-4)


def test_an_engine_over_a_gguf_file(tiny_model, tmp_path):
    """Text in, text out: tokenizer, chat template and end-of-sequence token come from the file."""
    folder, file = tiny_model("llama"), tmp_path / "model.gguf"
    write_gguf(file, folder)
    ours, other = LLM(str(file), dtype="float32"), LLM(str(folder), dtype="float32")
    text = "the 中 cat, in 2024"
    for a, b in zip(ours.generate(text, greedy(), use_tqdm=False), other.generate(text, greedy(), use_tqdm=False),
                    strict=True):
        assert a.prompt_token_ids == b.prompt_token_ids
        assert_same_tokens([a.outputs[0].token_ids], reference_greedy(folder, [b.prompt_token_ids], 16))
    chat = [{"role": "user", "content": "hi"}]
    assert ours.chat(chat, use_tqdm=False)[0].prompt == other.chat(chat, use_tqdm=False)[0].prompt
    assert ours.spec.eos_token_ids == other.spec.eos_token_ids == (other.get_tokenizer().encode(EOS)[0],)
    assert ours.get_tokenizer().padding_side == "left"


@pytest.mark.parametrize(("ids", "expected"), [
    ({"eos": 5, "eot": 9}, (5, 9)), ({"eos": 5, "eot": 5}, (5,)), ({"eos": None, "eot": None}, ()),
    ({"eos": 5, "eom": 9, "eot": 2}, (5, 2, 9)), ({"eos": 2 ** 31, "eot": VOCAB_SIZE}, ())])
def test_end_of_sequence_tokens(ids, expected, tiny_model, tmp_path):
    """Those of the keys, and <|im_end|>, which ends an output by its text."""
    write_gguf(tmp_path / "model.gguf", tiny_model("qwen2"),
               metadata={f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()})
    assert load_spec(convert_gguf(tmp_path / "model.gguf", torch.float32)).eos_token_ids == (*expected, 267)


@pytest.mark.parametrize("text", ["<|eot_id|>", "<|endoftext|>", "<end_of_turn>", "<|end_of_text|>", "<|eom_id|>"])
def test_tokens_that_end_an_output_by_their_text(text, tiny_model, tmp_path):
    """As in llama.cpp: early Llama 3 files name another end, and some give the token a wrong type."""
    tokens = [f"[PAD{i}]" for i in range(VOCAB_SIZE)]
    folder = tiny_model("llama")
    known = json.loads((folder / "tokenizer.json").read_text())
    for token, i in known["model"]["vocab"].items():
        tokens[i] = token
    tokens[266:269] = ["<|im_start|>", "<none>", text]
    write_gguf(tmp_path / "model.gguf", folder, metadata={
        "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1] * VOCAB_SIZE,
        "tokenizer.ggml.eos_token_id": 267})
    llm = LLM(str(tmp_path / "model.gguf"), dtype="float32")
    assert llm.spec.eos_token_ids == (267, 268)
    assert llm.get_tokenizer().encode(f"a{text}") == [*llm.get_tokenizer().encode("a"), 268]
    assert llm.get_tokenizer().decode([268]) == "", "it is special"


def test_biases_of_which_a_file_holds_some(tiny_model, tmp_path):
    """llama.cpp adds each that is there; Hugging Face's switch asks for all four. What is missing is zero."""
    folder = shutil.copytree(tiny_model("llama_bias"), tmp_path / "folder")

    def edit(tensors):
        for name in [name for name in tensors if name.endswith("o_proj.bias")]:
            del tensors[name]

    write_gguf(tmp_path / "model.gguf", folder, edit=edit)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(t) if name.endswith("o_proj.bias") else t for name, t in tensors.items()},
              folder / "model.safetensors", metadata={"format": "pt"})
    for prompt, logits in zip(PROMPTS, all_logits(make_runner(tmp_path / "model.gguf"), PROMPTS), strict=True):
        torch.testing.assert_close(logits, reference_logits(folder, prompt), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variant", "name"), [
    ("llama", "mlp.up_proj.bias"), ("qwen2", "self_attn.o_proj.bias"), ("llama", "self_attn.q_norm.weight")])
def test_a_tensor_that_this_family_does_not_use(variant, name, tiny_model, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model(variant),
               edit=lambda tensors: tensors.update({f"model.layers.1.{name}": torch.ones(64)}))
    with pytest.raises(ConfigError, match=rf"tensor model\.layers\.1\.{name} of .* has no place in"):
        LLM(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(("metadata", "divisor"), [
    ({"scaling.factor": 4.0}, 4), ({"scale_linear": 2.0}, 2), ({"scaling.type": "linear", "scaling.factor": 8.0}, 8),
    ({"scaling.factor": 4.0, "scale_linear": 2.0}, 4), ({"scaling.type": "none", "scaling.factor": 4.0}, 1),
    ({"scaling.factor": 0.0}, 1), ({"scaling.type": "linear"}, 1), ({"dimension_count": 16}, 1)])
def test_linear_rope_scaling(metadata, divisor, tiny_model, tmp_path):
    """llama.cpp's rules; the frequencies are transformers' for the same factor."""
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"),
               metadata={f"llama.rope.{key}": value for key, value in metadata.items()})
    spec = load_spec(convert_gguf(tmp_path / "model.gguf", torch.float32))
    torch.testing.assert_close(inverse_frequencies(spec), 10000.0 ** -(torch.arange(0, 16, 2) / 16) / divisor)
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "folder")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= {"rope_type": "linear", "factor": float(divisor)}
    (folder / "config.json").write_text(json.dumps(config))
    [logits] = all_logits(make_runner(tmp_path / "model.gguf"), PROMPTS[:1])
    torch.testing.assert_close(logits, reference_logits(folder, PROMPTS[0]), rtol=1e-4, atol=1e-4)


def test_linear_scaling_on_top_of_rotary_factors(tiny_model, tmp_path):
    factors = torch.arange(1.0, 9.0)
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), metadata={"llama.rope.scaling.factor": 2.0},
               edit=lambda tensors: tensors.update({"rope_freqs.weight": factors}))
    spec = load_spec(convert_gguf(tmp_path / "model.gguf", torch.float32))
    expected = 10000.0 ** -(torch.arange(0, 16, 2) / 16) / factors / 2
    torch.testing.assert_close(inverse_frequencies(spec), expected)


def test_a_number_for_each_layer(tiny_model, tmp_path):
    """Lists, as some converters write them: one value for all layers is one value."""
    metadata = {"llama.attention.head_count_kv": [2, 2, 2], "llama.feed_forward_length": [96] * 3}
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), metadata=metadata)
    spec = load_spec(convert_gguf(tmp_path / "model.gguf", torch.float32))
    assert (spec.num_key_value_heads, spec.intermediate_size) == (2, 96)


def test_sizes_that_a_file_may_leave_out(tiny_model, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), metadata={
        "llama.attention.key_length": None, "llama.rope.freq_base": None, "llama.context_length": None})
    spec = load_spec(convert_gguf(tmp_path / "model.gguf", torch.float32))
    assert (spec.head_dim, spec.rope_theta, spec.max_position_embeddings) == (16, 10000.0, 2048)


def test_epsilon_is_the_number_that_was_meant(tiny_model, tmp_path):
    """A file holds a float32: 9.99999997e-07 for what was 1e-6."""
    write_gguf(tmp_path / "model.gguf", tiny_model("qwen3"))
    assert load_spec(convert_gguf(tmp_path / "model.gguf", torch.float32)).rms_norm_eps == 1e-6


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("keep", [0, 1, 4, 23, 24, 200, 3000, 0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_cut_file(keep, tiny_model, tmp_path, cache):
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model("llama"), "Q8_0")
    data = file.read_bytes()
    file.write_bytes(data[:keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(GGUFError, match=r"model\.gguf (is not a complete GGUF file|is cut short)"):
        LLM(str(file))
    assert not cache.exists() or not list(cache.iterdir()), "nothing half done is left"


def test_a_file_without_its_last_byte(tiny_model, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model("llama"), "F32")
    reader = gguf_library.GGUFReader(str(file))
    end = max(int(t.data_offset) + int(t.n_bytes) for t in reader.tensors)
    file.write_bytes(file.read_bytes()[:end - 1])
    with pytest.raises(GGUFError, match=r"(not a complete GGUF file|is cut short)"):
        convert_gguf(file, torch.float32)


@pytest.mark.parametrize("content", [b"not a GGUF file at all, but long enough to be one" * 10, b"PK\x03\x04" * 100,
                                     b"GGUF" + b"\xff" * 400, b"GGUF" + b"\0" * 400])
def test_a_file_of_another_kind(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(GGUFError, match=r"model\.gguf is not a complete GGUF file|model\.gguf is cut short"):
        LLM(str(tmp_path / "model.gguf"))


REFUSED = [
    ({"general.architecture": "mamba"}, "architecture 'mamba' of .* is not supported; allowed: qwen3, qwen2, llama"),
    ({"tokenizer.ggml.model": "bert"}, "tokenizer 'bert' of .* is not supported; allowed: gpt2, llama"),
    ({"tokenizer.ggml.model": None}, "tokenizer None of .* is not supported"),
    ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' of .* is not supported; allowed: default, gpt-2"),
    ({"qwen2.rope.scaling.type": "yarn"}, "rope scaling 'yarn' of .* is not supported; allowed: none, linear, rope_f"),
    ({"qwen2.rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor=1.5 of .* is not supported; allowed: 1"),
    ({"qwen2.rope.dimension_count": 8}, "rope.dimension_count=8 of .* is not supported; allowed: 16, the size"),
    ({"qwen2.attention.value_length": 32}, "attention.value_length=32 of .* is not supported; allowed: 16"),
    ({"qwen2.attention.scale": 0.5}, "attention.scale=0.5 of .* is not supported; allowed: none"),
    ({"qwen2.block_count": 2}, r"announces 2 layers \(block_count\) and holds tensors of 3"),
    ({"qwen2.block_count": 10 ** 9}, r"announces 1,000,000,000 layers \(block_count\) and holds tensors of 3"),
    ({"qwen2.attention.head_count_kv": [2, 1, 2]}, r"head_count_kv of .* differs between layers: \[2, 1, 2\]; allowed"),
    ({"qwen2.attention.head_count": "four"}, "attention.head_count='four' of .* is not valid; allowed: a number"),
    ({"qwen2.attention.head_count": 0}, "attention.head_count=0 of .* is not valid; allowed: an integer above 0"),
    ({"split.count": 3}, "is one of 3 parts of a split file; allowed: a whole one"),
    ({"tokenizer.ggml.tokens": ["a", "a"]}, "has 2 tokens and 288 values in tokenizer.ggml.token_type"),
    ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens of .* is not valid; allowed: a list of texts"),
    ({"tokenizer.ggml.tokens": ["a"] * 288}, "the tokens of .* are not valid; allowed: texts of 1 to"),
    ({"tokenizer.ggml.tokens": [*map(str, range(287)), "x" * 9999]}, "the tokens of .* are not valid; allowed: texts"),
    ({"tokenizer.ggml.merges": ["no such"]}, "the tokenizer of .* is damaged: .*no"),
    ({"qwen2.embedding_length": None}, r"lacks the key 'qwen2\.embedding_length'"),
    ({"qwen2.attention.layer_norm_rms_epsilon": None}, r"lacks the key 'qwen2\.attention\.layer_norm_rms_epsilon'"),
    ({"tokenizer.ggml.tokens": None}, r"lacks the key 'tokenizer\.ggml\.tokens'"),
    ({"tokenizer.ggml.merges": None}, r"lacks the key 'tokenizer\.ggml\.merges'"),
]


@pytest.mark.parametrize(("metadata", "message"), REFUSED)
def test_a_header_that_is_not_supported(metadata, message, tiny_model, tmp_path, cache):
    metadata = dict(metadata)
    architecture = metadata.pop("general.architecture", None)
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model("qwen2"), metadata=metadata)
    if architecture:
        # The writer sets this key itself; a name of the same length can take its place in the bytes.
        file.write_bytes(file.read_bytes().replace(b"qwen2", architecture.encode(), 1))
    with pytest.raises(ConfigError, match=message):
        LLM(str(file))
    assert not list(cache.glob("*")), "nothing half done is left"


def test_a_tensor_that_no_family_has(tiny_model, tmp_path):
    file = tmp_path / "model.gguf"
    for name in ("blk.0.ssm_in.weight", "mystery.weight"):
        def add(tensors, name=name):
            tensors[name] = torch.zeros(4, 4)
        write_gguf(file, tiny_model("qwen2"), edit=add)
        with pytest.raises(GGUFError, match=f"tensor {re.escape(name)} of .* has no place in Qwen2ForCausalLM"):
            LLM(str(file))


@pytest.mark.parametrize(("name", "message"), [
    ("model.embed_tokens.weight", r"lacks the tensor token_embd\.weight"),
    ("model.layers.1.mlp.down_proj.weight", r"lacks the tensor model\.layers\.1\.mlp\.down_proj\.weight")])
def test_a_missing_tensor(name, message, tiny_model, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model("qwen2"), edit=lambda tensors: tensors.pop(name))
    with pytest.raises(ConfigError, match=message):
        LLM(str(tmp_path / "model.gguf"))


def test_a_type_that_is_not_supported(tiny_model, tmp_path):
    file = tmp_path / "model.gguf"
    write_gguf(file, tiny_model("qwen2"),
               edit=lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)}))
    with pytest.raises(GGUFError, match=r"output_norm\.weight of .* has type I32, which is not supported; allowed"):
        LLM(str(file))
