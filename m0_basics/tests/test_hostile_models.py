"""F0.9: model files that lie, by accident or on purpose: one line, in bounded time and memory."""
from __future__ import annotations

import json
import random
import re
import resource
import shutil
import struct
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from m0_basics import LLM
from m0_basics.config import ConfigError
from m0_basics.loading.loader import resolve_model
from m0_basics.tools.testing.gguf_files import write_gguf

HUGE = 2 ** 63


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLM_LAB_CACHE", str(tmp_path / "cache"))
    resolve_model.cache_clear()
    yield tmp_path / "cache"
    resolve_model.cache_clear()


def refuse(path: Path) -> str:
    """Load the model, which has to fail; the error's text."""
    begin, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError) as caught:
        LLM(str(path), dtype="float32")
    assert time.monotonic() - begin < 60        # stands for: not for ever
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 400_000, "kilobytes"
    text = str(caught.value)
    assert "\n" not in text.strip()
    assert len(text) < 1200
    return text


# ---------------------------------------------------------------- GGUF

def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, size: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, size) + items


def tensor(name: bytes = b"t", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf(keys: list[bytes], tensors: list[bytes], *, data: bytes = bytes(4096), version: int = 3,
         counts: tuple[int, int] | None = None) -> bytes:
    header = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(keys)))) + b"".join(keys + tensors)
    return header + bytes(-len(header) % 32) + data


ARCHITECTURE = key(b"general.architecture", 8, text(b"llama"))
HEADERS = {
    "array of 2^63": (gguf([key(b"a", 9, array(0, HUGE))], []), "announces 9,223,372,036,854,775,808 of something"),
    "array of 2^63 texts": (gguf([key(b"a", 9, array(8, HUGE))], [], data=b""), "announces 9,223,372,036,854,775,808"),
    "array of bytes that are not there": (gguf([key(b"a", 9, array(0, 10 ** 6))], [], data=b""), "its header goes on"),
    "array of arrays": (gguf([key(b"a", 9, array(9, 1, array(9, 1)))], []), "an array .* has items of type 9"),
    "array of no type": (gguf([key(b"a", 9, array(77, 1))], []), "an array in its header has items of type 77"),
    "value of no type": (gguf([key(b"a", 13, b"")], []), "a value in its header has the type 13"),
    "text of 2^63": (gguf([key(b"a", 8, struct.pack("<Q", HUGE))], []), "announces 9,223,372,036,854,775,808"),
    "text past the end": (gguf([key(b"a", 8, struct.pack("<Q", 10 ** 6))], [], data=b""), "its header goes on after"),
    "text that is not UTF-8": (gguf([key(b"a", 8, text(b"\xff\xfe"))], []), "is not UTF-8"),
    "2^63 keys": (gguf([], [], counts=(0, HUGE)), "announces 9,223,372,036,854,775,808 of something"),
    "2^63 tensors": (gguf([], [], counts=(HUGE, 0)), "announces 9,223,372,036,854,775,808 of something"),
    "more keys than it holds": (gguf([], [], counts=(0, 1000), data=b""), "its header goes on after byte"),
    "the same key twice": (gguf([ARCHITECTURE, ARCHITECTURE], []), "it holds the key 'general.architecture' twice"),
    "version 1": (gguf([], [], version=1), "version 1; allowed: 2 and 3"),
    "the other byte order": (gguf([], [], version=3 << 24), "version 50331648; allowed: 2 and 3, little-endian"),
    "no tensors": (gguf([ARCHITECTURE], []), "it holds no tensors"),
    "no dimensions": (gguf([], [tensor(dims=())]), "a tensor has 0 dimensions; allowed: 1 to 4"),
    "a thousand dimensions": (gguf([], [tensor(dims=(1,) * 1000)]), "a tensor has 1000 dimensions; allowed: 1 to 4"),
    "a dimension of 0": (gguf([], [tensor(dims=(32, 0))]), r"has the shape \(0, 32\), which F32 does not fill"),
    "a dimension of 2^63": (gguf([], [tensor(dims=(HUGE,))]), "announces 9,223,372,036,854,775,808 of something"),
    "2^160 weights": (gguf([], [tensor(dims=(2 ** 40,) * 4)]), "is cut short: .* bytes, its tensors end at"),
    "half a block": (gguf([], [tensor(dims=(48,), kind=2)]), r"has the shape \(48,\), which Q4_0 does not fill"),
    "an unknown type": (gguf([], [tensor(kind=999)]), "tensor t of .* has type 999, which is not known"),
    "a negative offset": (gguf([], [tensor(offset=2 ** 64 - 32)]), "is cut short: .* bytes, its tensors end at 18,4"),
    "an unaligned offset": (gguf([], [tensor(offset=8)]), "begins at 8, which is not aligned to 32"),
    "an offset past the end": (gguf([], [tensor(offset=1 << 20)]), "is cut short: "),
    "overlapping tensors": (gguf([], [tensor(b"a"), tensor(b"b", offset=64)]), "the tensors a and b of .* overlap"),
    "the same bytes twice": (gguf([], [tensor(b"a"), tensor(b"b")]), "the tensors a and b of .* overlap"),
    "the same tensor twice": (gguf([], [tensor(b"a"), tensor(b"a", offset=128)]), "holds the tensor a 2 times"),
    "alignment 0": (gguf([key(b"general.alignment", 4, bytes(4))], [tensor()]), "general.alignment=0; allowed: a"),
    "alignment 24": (gguf([key(b"general.alignment", 4, struct.pack("<I", 24))], [tensor()]), "general.alignment=24"),
    "alignment as text": (gguf([key(b"general.alignment", 8, text(b"x"))], [tensor()]), "general.alignment='x'"),
    "no architecture": (gguf([], [tensor()]), "architecture None of .* is not supported"),
    "an architecture that is a list": (gguf([key(b"general.architecture", 9, array(0, 1, b"x"))], [tensor()]),
                                       r"architecture \[120\] of .* is not supported"),
    "nothing but an architecture": (gguf([ARCHITECTURE], [tensor()]), "lacks the tensor token_embd.weight"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_gguf_header_that_lies(case, tmp_path, cache):
    content, message = HEADERS[case]
    (tmp_path / "model.gguf").write_bytes(content)
    assert re.search(message, refuse(tmp_path / "model.gguf"))
    assert not cache.exists() or not list(cache.iterdir()), "nothing half done is left"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_gguf_file_with_random_bytes_in_its_header(seed, tiny_model, tmp_path):
    """It loads, or says in one line why not."""
    file, rng = tmp_path / "model.gguf", random.Random(seed)
    write_gguf(file, tiny_model("llama"), "Q8_0")
    good = file.read_bytes()
    end = good.index(b"blk.2.ffn_down") + 100
    for _ in range(25):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(4, end)
            data[at] = rng.choice([0, 1, 0x7F, 0xFF, data[at] ^ (1 << rng.randrange(8))])
        file.write_bytes(data)
        try:
            LLM(str(file), dtype="float32")
        except ConfigError as error:
            assert len(str(error)) < 3000
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        resolve_model.cache_clear()


# ---------------------------------------------------------------- Hugging Face folders

@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


def change(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CONFIGS = [
    *({name: value} for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
                                 "num_key_value_heads", "intermediate_size", "max_position_embeddings")
      for value in (-1, 2 ** 30, 10 ** 9, 10 ** 30, 1.5, "64", [64], {"a": 1}, True)),
    *(changes for value in (-1.0, float("nan"), float("inf"), "x", [1])
      for changes in ({"rms_norm_eps": value}, {"rope_theta": value, "rope_parameters": None})),
    {"rope_theta": 5.0, "rope_parameters": {"rope_theta": float("nan")}}, {"rope_parameters": [1]},
    {"rope_scaling": {"rope_type": ["llama3"]}}, {"rope_scaling": {"rope_type": "gguf_factors", "factors": [1, 2]}},
    {"rope_scaling": {"rope_type": "gguf_factors", "factors": [0.0] * 8}},
    {"architectures": "LlamaForCausalLM?"}, {"architectures": [["x"]]}, {"architectures": {"a": 1}},
    {"hidden_act": ["silu"]}, {"tie_word_embeddings": "no"}, {"attention_bias": "no"}, {"quantization_config": [1]},
    {"use_sliding_window": "no"}, {"num_attention_heads": 2 ** 30, "head_dim": 2 ** 30},
]


@pytest.mark.parametrize("changes", CONFIGS, ids=str)
def test_a_configuration_that_lies(changes, folder):
    change(folder / "config.json", **changes)
    refuse(folder)


def test_files_that_are_no_settings(folder):
    for name in ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"):
        good = (folder / name).read_bytes()
        for content in (b"", b"[]", b"null", b"[" * 100_000, b'{"a": ' * 50_000, b"9" * 10_000, b"\xff\xfe", b'{"a"'):
            (folder / name).write_bytes(content)
            assert name in refuse(folder)
        (folder / name).write_bytes(good)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    refuse(folder)


@pytest.mark.parametrize("changes", [
    {"model": None}, {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}, {"model": {"type": "None"}},
    {"added_tokens": [{"id": 2 ** 63, "content": "x"}]}, {"decoder": {"type": "x"}},
    {"pre_tokenizer": {"type": "Split"}},
    {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}], ids=str)
def test_a_tokenizer_that_lies(changes, folder):
    change(folder / "tokenizer.json", **changes)
    assert "tokenizer.json is not a tokenizer" in refuse(folder)


@pytest.mark.parametrize("header", [
    b"", b"{}", b"[]", b'{"a": 1}', b"[" * 9999, b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 99]}}',
    b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    b'{"a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}}'], ids=list("01234567"))
@pytest.mark.parametrize("size", [None, 0, 2 ** 62, 2 ** 64 - 1])
def test_a_safetensors_header_that_lies(header, size, folder):
    data = struct.pack("<Q", len(header) if size is None else size) + header + bytes(4)
    (folder / "model.safetensors").write_bytes(data)
    refuse(folder)


def test_tensors_without_a_shape_and_of_no_weight(folder):
    good = load_file(folder / "model.safetensors")
    for value in (torch.tensor(1.0), torch.zeros(0, 64), torch.zeros(1, 1, 64), torch.zeros(64, dtype=torch.int64)):
        save_file(good | {"model.norm.weight": value}, folder / "model.safetensors", metadata={"format": "pt"})
        assert "model.norm.weight" in refuse(folder)
