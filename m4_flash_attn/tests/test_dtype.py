"""What dtype="auto" is: the format that was measured to be the faster one on the kernels' tier, where they run."""
from __future__ import annotations

import platform

import pytest

from m0_basics.tools.testing.command_line import Command
from m0_basics.tools.testing.fixtures import TinyModels
from m4_flash_attn import LLM
from m4_flash_attn.config import EngineConfig
from m4_flash_attn.kernels.cpu import build
from m4_flash_attn.kernels.cpu import dtype as module
from m4_flash_attn.kernels.cpu.build import BuildError
from m4_flash_attn.kernels.cpu.dtype import tier, with_auto_dtype

TIERS = {"avx512_bf16": "bfloat16", "avx512": "auto", "avx2": "bfloat16", "neon_bf16": "auto", "other": "auto"}


@pytest.mark.parametrize("name", TIERS)
def test_by_tier(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "tier", lambda: name)
    config = EngineConfig.from_options(device="cpu")
    assert with_auto_dtype(config).model_config.dtype == TIERS[name]
    for kept in ({"dtype": "float32"}, {"fused_layers": False}, {"attention_backend": "sdpa"},
                 {"kv_cache_dtype": "float32"}):
        asked = EngineConfig.from_options(**{"device": "cpu", **kept})
        assert with_auto_dtype(asked) is asked
    assert with_auto_dtype(config, has_cache_plugins=True) is config


def test_without_kernels_it_is_milestone_0s(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler() -> str:
        raise BuildError("no C++ compiler was found")

    monkeypatch.setattr(module, "tier", no_compiler)
    config = EngineConfig.from_options(device="cpu")
    assert with_auto_dtype(config) is config


def test_the_engine_and_env_agree(tiny_model: TinyModels, command: Command) -> None:
    folder = tiny_model("qwen3")
    llm = LLM(str(folder), device="cpu", max_model_len=64, num_blocks=16)
    chosen = str(llm.engine.runner.model.dtype).removeprefix("torch.")
    result = command("env", "--model", str(folder), "--device", "cpu", package="m4_flash_attn")
    assert result.status == 0
    assert f"dtype auto: {chosen}" in result.out
    if tier() in module.FASTER:
        assert chosen == module.FASTER[tier()]
        assert f"measured to be the faster one with {tier()}" in result.out


@pytest.mark.slow
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="instructions of x86")
@pytest.mark.parametrize("processor", ["x86-64-v4", "cooperlake"])
def test_kernels_of_wider_processors_compile(processor: str) -> None:
    """AVX-512, without and with products of bfloat16 pairs: here they are compiled; they run where tests meet one."""
    assert build.library((f"-march={processor}",)).linear_panel is not None
