"""F4.1: every backend gives the naive one's tokens; the right one is chosen; one that cannot run says why."""
from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import m3_paged_kv
from m0_basics.config import ConfigError
from m0_basics.model_spec import ModelSpec
from m0_basics.tools.testing.command_line import Command, options
from m0_basics.tools.testing.conformance import PROMPTS, greedy, ids_of
from m0_basics.tools.testing.fixtures import TinyModels
from m0_basics.tools.testing.parity import assert_same_tokens, reference_greedy
from m2_continuous_batching.plugins.kv_compression import KVCompressionPlugin
from m4_flash_attn import LLM, backends, config
from m4_flash_attn.backends import BACKENDS, Situation, choose
from m4_flash_attn.kernels.flash_attn import LibraryError

HERE = ("cpu", "sdpa", "tiled", "naive")        # what every CPU with a compiler has
SPEC = ModelSpec("LlamaForCausalLM", 8, 8, 8, 1, 4, 2, 64, 64, rms_norm_eps=1e-5, rope_theta=1e4,
                 tie_word_embeddings=False)


def situation(device: str = "cpu", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Situation:
    return Situation(**{"device": torch.device(device), "dtype": dtype, "cache_dtype": dtype, "spec": SPEC,
                        "block_size": 16, **changes})


def head_size(size: int) -> ModelSpec:
    return replace(SPEC, head_dim=size)


def make(tiny_model: TinyModels, variant: str = "qwen3", **settings: Any) -> LLM:
    return LLM(str(tiny_model(variant)), **{"dtype": "float32", "max_model_len": 96, "num_blocks": 64, **settings})


def tokens(llm: Any, count: int = 16) -> list[list[int]]:
    return ids_of(llm.generate(PROMPTS, greedy(count), use_tqdm=False))


@pytest.mark.parametrize("variant", ["qwen3", "qwen2", "llama"])
@pytest.mark.parametrize("name", ["auto", *HERE])
def test_tokens_equal_transformers(tiny_model: TinyModels, name: str, variant: str) -> None:
    """F4.1: so they are equal to each other."""
    llm = make(tiny_model, variant, attention_backend=name)
    assert llm.attention_backend == ("cpu" if name == "auto" else name)
    assert_same_tokens(tokens(llm), reference_greedy(tiny_model(variant), PROMPTS, 16))


def test_names_are_those_of_the_configuration() -> None:
    assert tuple(BACKENDS) == config.BACKENDS
    assert all(name == backend.name for name, backend in BACKENDS.items())


def test_an_unknown_name(tiny_model: TinyModels) -> None:
    with pytest.raises(ConfigError, match=r"attention_backend='flash'.*auto, cpu, flash_attn, triton"):
        make(tiny_model, attention_backend="flash")


@pytest.mark.parametrize(("name", "reason"), [
    ("triton", "it needs an NVIDIA GPU, and the model is on cpu"),
    ("flash_attn", "it needs an NVIDIA GPU, and the model is on cpu"),
    ("torch_varlen", "it needs an NVIDIA GPU, and the model is on cpu")])
def test_one_that_cannot_run_says_why_and_what_can(tiny_model: TinyModels, name: str, reason: str) -> None:
    message = f"attention_backend={name!r} is not available: {reason}; available here: cpu, sdpa, tiled, naive"
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        make(tiny_model, attention_backend=name)


@pytest.mark.parametrize(("changes", "reason"), [
    ({"device": "cuda"}, "the model is on cuda"),
    ({"has_cache_plugins": True}, "cache plugins change what is stored"),
    ({"dtype": torch.float16}, "the model is in torch.float16"),
    ({"cache_dtype": torch.float32}, "the cache in torch.float32"),
    ({"spec": head_size(24)}, "head size 24 is not a multiple of 16"),
    ({"spec": head_size(1040)}, "head size 1040 is not a multiple of 16 up to 1024")])
def test_when_the_cpu_kernels_cannot_run(changes: dict[str, Any], reason: str,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_capability", lambda _: (9, 0))
    assert BACKENDS["cpu"].why_not(situation()) is None
    assert reason in str(BACKENDS["cpu"].why_not(situation(**changes)))
    with pytest.raises(ConfigError, match=re.escape(reason)):
        choose("cpu", situation(**changes))


@pytest.mark.parametrize(("changes", "reason"), [
    ({"has_cache_plugins": True}, "cache plugins"),
    ({"cache_dtype": torch.float32}, "they have to be the same"),
    ({"block_size": 24}, "block_size=24 is not a power of two of at least 16"),
    ({"block_size": 8}, "block_size=8 is not a power of two of at least 16"),
    ({"spec": head_size(24)}, "head size 24 is not a multiple of 16"),
    ({"spec": head_size(144)}, "head size 144 is not a multiple of 16 up to 128"),
    ({"spec": head_size(256)}, "head size 256 is not a multiple of 16 up to 128"),
    ({"spec": replace(SPEC, num_attention_heads=34)}, "17 query heads share a key-value head")])
def test_when_the_triton_kernels_cannot_run(changes: dict[str, Any], reason: str,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(backends, "_capability", lambda _: (8, 0))
    assert BACKENDS["triton"].why_not(situation("cuda")) is None
    assert reason in str(BACKENDS["triton"].why_not(situation("cuda", **changes)))


@pytest.mark.parametrize("name", ["triton", "flash_attn", "torch_varlen"])
def test_gpus_that_are_too_old(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(backends, "_capability", lambda _: (7, 5))
    reason = "it needs a GPU of compute capability 8.0 or newer, and this is 7.5"
    assert BACKENDS[name].why_not(situation("cuda")) == reason


@pytest.mark.parametrize("size", [20, 264])
def test_heads_that_no_library_takes(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    monkeypatch.setattr(backends, "load_flash_attn", lambda *_: None)
    monkeypatch.setattr(backends, "_capability", lambda _: (9, 0))
    assert BACKENDS["flash_attn"].why_not(situation("cuda", spec=head_size(256))) is None
    assert BACKENDS["flash_attn"].why_not(situation("cuda", spec=head_size(size))) == (
        f"head size {size} is not a multiple of 8 up to 256")


def test_choice_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """flash_attn, else triton, else sdpa with one warning that names what is missing."""
    missing = False

    def load_flash_attn(*_: Any) -> Any:
        if missing:
            raise LibraryError("it is not installed")
        return lambda: None

    monkeypatch.setattr(backends, "load_flash_attn", load_flash_attn)
    monkeypatch.setattr(backends, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    assert choose("auto", situation("cuda")).name == "flash_attn"
    missing = True
    assert choose("auto", situation("cuda")).name == "triton"
    assert not caplog.records
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert choose("auto", situation("cuda")).name == "sdpa"
    assert len(caplog.records) == 1
    assert "pip install triton" in caplog.text
    with pytest.raises(ConfigError, match="pip install triton; available here: sdpa, tiled, naive"):
        choose("triton", situation("cuda"))


def test_a_library_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """F4.1: through the loader itself: what is missing, how to get it, what works now. No library knows float32."""
    monkeypatch.setattr(backends, "_capability", lambda _: (9, 0))
    monkeypatch.setattr(backends, "has_triton", lambda: True)
    with pytest.raises(ConfigError) as error:
        choose("flash_attn", situation("cuda", torch.float32))
    assert str(error.value) == (
        "attention_backend='flash_attn' is not available: it computes in float16 and bfloat16, not in torch.float32; "
        "set dtype='bfloat16'; available here: triton, sdpa, tiled, naive")


@pytest.mark.parametrize("settings", [{"plugins": True}, {"kv_cache_dtype": "bfloat16"}, {"dtype": "float16"}],
                         ids=["cache plugin", "other cache type", "float16"])
def test_what_the_kernels_cannot_do_goes_to_sdpa(tiny_model: TinyModels, settings: dict[str, Any],
                                                 caplog: pytest.LogCaptureFixture) -> None:
    """F4.1: as on m3's engine, with a warning; asked for by name, the kernels are refused."""

    def fresh() -> dict[str, Any]:
        return settings | ({"plugins": [KVCompressionPlugin()]} if "plugins" in settings else {})

    with caplog.at_level(logging.WARNING):
        llm = make(tiny_model, **fresh())
    assert llm.attention_backend == "sdpa"
    assert len(caplog.records) == 1
    assert "attention backend sdpa is used, which is slower; cpu: " in caplog.text
    theirs = m3_paged_kv.LLM(str(tiny_model("qwen3")), **{"dtype": "float32", "max_model_len": 96, "num_blocks": 64,
                                                          **fresh()})
    assert_same_tokens(tokens(llm), tokens(theirs))
    with pytest.raises(ConfigError, match="attention_backend='cpu' is not available"):
        make(tiny_model, attention_backend="cpu", **fresh())


@pytest.mark.parametrize("name", ["tiled", "naive"])
def test_the_readable_ones_read_through_cache_plugins(tiny_model: TinyModels, name: str) -> None:
    """Eight bits for keys and values: the same tokens as through SDPA."""
    llm, sdpa = (make(tiny_model, plugins=[KVCompressionPlugin()], attention_backend=other) for other in (name, "sdpa"))
    assert_same_tokens(tokens(llm), tokens(sdpa))


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_any_block_size_on_a_cpu(tiny_model: TinyModels, block_size: int) -> None:
    llm = make(tiny_model, block_size=block_size, num_blocks=768 // block_size)
    assert_same_tokens(tokens(llm), reference_greedy(tiny_model("qwen3"), PROMPTS, 16))


@pytest.mark.slow
def test_nothing_optional_is_imported_until_chosen(tiny_model: TinyModels) -> None:
    """F4.1: beyond what torch itself brings."""
    script = f"""
import json, sys, torch
before = set(sys.modules)
from m4_flash_attn import LLM, SamplingParams
llm = LLM({str(tiny_model('qwen3'))!r}, dtype="float32", max_model_len=96, num_blocks=8)
llm.generate([[7] * 9], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
print(json.dumps([llm.attention_backend, sorted(name.partition(".")[0] for name in set(sys.modules) - before)]))
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root)
    name, imported = json.loads(done.stdout)
    assert name == "cpu"
    assert not {"triton", "flash_attn", "transformers", "matplotlib"} & set(imported)


def test_env(tiny_model: TinyModels, command: Command) -> None:
    """What is chosen, what else could run, and why the others cannot; for this model and these options."""
    def env(*flags: Any) -> dict[str, str]:
        result = command("env", *options(tiny_model("qwen3")), *flags, package="m4_flash_attn")
        assert result.status == 0, result.err
        assert re.search(r"C\+\+ kernels: .*\.so \(built\b", result.out)
        assert "attention on cpu, float32, torch" in result.out
        rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.out.splitlines() if "│" in line]
        return {name: here for name, _, here in rows if name}

    here = env()
    assert list(here) == list(BACKENDS)
    assert {name for name, text in here.items() if text == "chosen"} == {"cpu"}
    assert {name for name, text in here.items() if text == "available"} == {"sdpa", "tiled", "naive"}
    assert all("NVIDIA GPU" in here[name] for name in ("flash_attn", "triton", "torch_varlen"))
    assert env("--attention-backend", "tiled")["tiled"] == "chosen"
    assert env("--kv-cache-dtype", "bfloat16")["sdpa"] == "chosen"


def test_env_refuses_what_cannot_run(tiny_model: TinyModels, command: Command) -> None:
    result = command("env", *options(tiny_model("qwen3")), "--attention-backend", "triton", package="m4_flash_attn")
    assert result.status != 0
    assert "attention_backend='triton' is not available" in result.out + result.err
