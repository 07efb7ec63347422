"""F7.1, F7.3: options of packed weights: what each means, and one clear error for what cannot be."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from m0_basics.config import ConfigError
from m0_basics.tools.testing.fixtures import TinyModels
from m2_continuous_batching.engine import engine_of
from m4_flash_attn.kernels.cpu.build import BuildError
from m7_gptq import LLM, EngineConfig
from m7_gptq.kernels import fuse_packed
from m7_gptq.kernels.activations import activations_for
from m7_gptq.kernels.cpu.linear import CpuQuantizedLinear
from m7_gptq.loading.fill import load_model

from .packed_models import pack_gptq

BASE: dict[str, Any] = {"max_model_len": 64, "num_blocks": 16}


def activations_of(llm: LLM) -> set[str]:
    """What the packed layers of an engine take."""
    return {m.activations for m in engine_of(llm).runner.model.modules() if isinstance(m, CpuQuantizedLinear)}


@pytest.fixture(scope="module")
def packed(tiny_model: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(pack_gptq(tmp_path_factory.mktemp("packed") / "m", tiny_model("qwen3")).packed)


@pytest.mark.parametrize(("dtype", "asked", "found"), [
    ("float32", "auto", "exact"), ("bfloat16", "auto", "int8"), ("float32", "int8", "int8"),
    ("bfloat16", "exact", "exact")])
def test_activations(packed: str, dtype: str, asked: str, found: str) -> None:
    """By itself, int8 where the model is in bfloat16; float32 is asked for where every digit counts."""
    assert activations_of(LLM(packed, dtype=dtype, activations=asked, **BASE)) == {found}


@pytest.mark.parametrize(("options", "reason"), [
    ({"model": "plain"}, "the model's weights are plain"),
    ({"quantization": "none"}, "the model's weights are plain"),
    ({"fused_layers": False}, "fused_layers is off"),
    ({"dtype": "float16"}, "the model is in float16")])
def test_int8_where_it_does_nothing(tiny_model: TinyModels, packed: str, options: dict[str, Any], reason: str) -> None:
    """An option that is silently without effect would be measured, and believed."""
    options = {"model": packed, "dtype": "float32", "activations": "int8", **BASE, **options}
    if options["model"] == "plain":
        options["model"] = str(tiny_model("qwen3"))
    with pytest.raises(ConfigError, match=f"activations=int8 does nothing here: {reason}.*; allowed: activations=auto"):
        LLM(**options)
    LLM(**options | {"activations": "auto"})


def test_a_machine_without_a_compiler(packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The readable layers run, in any type, and int8 is refused."""
    def fail() -> None:
        raise BuildError("no compiler")

    monkeypatch.setattr(fuse_packed, "library", fail)
    llm = LLM(packed, dtype="bfloat16", **BASE)
    assert not activations_of(llm)
    prompt = {"prompt_token_ids": [5, 6, 7]}
    assert len(llm.generate(prompt, use_tqdm=False)[0].outputs[0].token_ids) > 0
    with pytest.raises(ConfigError, match="kernels cannot be built"):
        LLM(packed, dtype="bfloat16", activations="int8", **BASE)


def test_activations_on_a_gpu(packed: str) -> None:
    config = EngineConfig.from_options(model=packed, dtype="bfloat16", activations="int8")
    model = load_model(config.model_config)
    model.device = torch.device("cuda")
    with pytest.raises(ConfigError, match="the model is on cuda, and the kernel is the CPU's"):
        activations_for(config, model)
    assert activations_for(EngineConfig.from_options(model=packed), model) == "exact"


@pytest.mark.parametrize(("options", "message"), [
    ({"quantization": "awq"}, "quantization='awq' is not valid; allowed: auto, none, gptq, gguf, rtn"),
    ({"activations": "int4"}, "activations='int4' is not valid; allowed: auto, int8, exact"),
    ({"quantization_bits": 5}, "quantization_bits=5 is not valid; allowed: 2, 3, 4, 8"),
    ({"quantization_bits": True}, "quantization_bits"),
    ({"quantization_group_size": 4}, "quantization_group_size=4 is not valid; allowed: an integer >= 8"),
    ({"speculative_method": "myself"}, "speculative_method='myself' .*draft_model, self"),
    ({"quantization_bits": 3}, "quantization_bits=3 is about rounding while loading, and nothing is rounded here"),
    ({"quantization_group_size": 32, "quantization": "gptq"}, "allowed: quantization=rtn, or no quantization_group_"),
    ({"bits": 4}, "unknown option bits; this engine knows: .*quantization_bits")])
def test_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_options(**options)


def test_folders_of_other_methods(tiny_model: TinyModels, tmp_path: Path) -> None:
    folder = pack_gptq(tmp_path / "m", tiny_model("qwen3")).packed
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"quant_method": "gptq"', '"quant_method": "awq"'))
    with pytest.raises(ConfigError, match="method 'awq' is not supported; allowed: gptq, a GGUF file"):
        LLM(str(folder), **BASE)


def test_a_round_trip() -> None:
    config = EngineConfig.from_options(quantization="rtn", activations="exact", quantization_bits=3)
    assert EngineConfig.from_dict(config.to_dict()) == config
