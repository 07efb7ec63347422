"""F0.1, F0.2, F0.4: every layer checks itself, the top one keeps them consistent, old dicts load."""
from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, dataclass, field, fields

import pytest
import torch

from m0_basics.config import (
    CONFIG_VERSION,
    CacheConfig,
    ConfigError,
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    option,
)

BAD_VALUES = [
    (ModelConfig, "model", "", "a GGUF file"),
    (ModelConfig, "model", None, "a GGUF file"),
    (ModelConfig, "dtype", "int8", "auto, float32, float16, bfloat16"),
    (ModelConfig, "dtype", torch.int32, "auto, float32, float16, bfloat16"),
    (ModelConfig, "device", "tpu", "auto, cpu, cuda or cuda:N"),
    (ModelConfig, "max_model_len", 0, "an integer >= 1 or None"),
    (ModelConfig, "max_model_len", 12.5, "an integer >= 1 or None"),
    (ModelConfig, "max_model_len", True, "an integer >= 1 or None"),
    (ModelConfig, "seed", -1, "an integer >= 0"),
    (ModelConfig, "seed", None, "an integer >= 0"),
    (CacheConfig, "kv_cache_dtype", "fp4", "auto, float32, float16, bfloat16"),
    (CacheConfig, "kv_cache_memory_bytes", 0, "an integer >= 1 or None"),
    (SchedulerConfig, "max_num_seqs", 0, "an integer >= 1"),
    (SchedulerConfig, "max_num_seqs", "8", "an integer >= 1"),
    (SchedulerConfig, "max_model_len", -5, "an integer >= 1 or None"),
    (ParallelConfig, "tensor_parallel_size", 0, "an integer >= 1"),
    (ParallelConfig, "pipeline_parallel_size", 1.0, "an integer >= 1"),
    (ParallelConfig, "data_parallel_size", -1, "an integer >= 1"),
]


@pytest.mark.parametrize(("layer", "name", "value", "allowed"), BAD_VALUES)
def test_a_bad_value_names_field_value_and_what_is_allowed(layer, name, value, allowed):
    """F0.1"""
    with pytest.raises(ConfigError) as error:
        layer(**{name: value})
    assert str(error.value).startswith(f"{name}={value!r} is not valid; allowed: ")
    assert allowed in str(error.value)


@pytest.mark.parametrize("layer", [ModelConfig, CacheConfig, SchedulerConfig, ParallelConfig, EngineConfig])
def test_configuration_is_frozen_and_its_defaults_are_valid(layer):
    config = layer()
    with pytest.raises(FrozenInstanceError):
        setattr(config, fields(config)[0].name, None)


@pytest.mark.parametrize(("given", "name"), [
    ("auto", "auto"), ("float32", "float32"), ("fp32", "float32"), ("float", "float32"), ("half", "float16"),
    ("fp16", "float16"), ("bf16", "bfloat16"), (torch.float32, "float32"), (torch.float16, "float16"),
    (torch.bfloat16, "bfloat16"), ("torch.bfloat16", "bfloat16")])
def test_dtype_as_text_or_torch_dtype(given, name):
    """F0.2"""
    assert ModelConfig(dtype=given).dtype == name
    assert CacheConfig(kv_cache_dtype=given).kv_cache_dtype == name


@pytest.mark.parametrize(("model_len", "scheduler_len", "everywhere"), [
    (100, None, 100), (None, 100, 100), (100, 100, 100), (None, None, None)])
def test_max_model_len_is_one_value_everywhere(model_len, scheduler_len, everywhere):
    """F0.1"""
    config = EngineConfig(ModelConfig(max_model_len=model_len),
                          scheduler_config=SchedulerConfig(max_model_len=scheduler_len))
    assert config.model_config.max_model_len == everywhere
    assert config.scheduler_config.max_model_len == everywhere


def test_two_values_of_max_model_len_are_refused():
    """F0.1"""
    with pytest.raises(ConfigError, match=r"max_model_len=99 .*allowed: the model's max_model_len, 100"):
        EngineConfig(ModelConfig(max_model_len=100), scheduler_config=SchedulerConfig(max_model_len=99))


def test_with_max_model_len_settles_it():
    """F0.1"""
    for wanted, settled in ((None, 512), (100, 100), (512, 512)):
        config = EngineConfig(ModelConfig(max_model_len=wanted)).with_max_model_len(512)
        assert (config.model_config.max_model_len, config.scheduler_config.max_model_len) == (settled, settled)
    with pytest.raises(ConfigError, match=r"max_model_len=513 .*allowed: at most 512, the model's own limit"):
        EngineConfig(ModelConfig(max_model_len=513)).with_max_model_len(512)


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(1, 1, 1), (2, 1, 1), (2, 3, 1), (4, 2, 3)])
def test_world_size_is_the_product(tensor, pipeline, data):
    """F0.4"""
    parallel = ParallelConfig(tensor, pipeline, data)
    assert parallel.world_size == tensor * pipeline * data
    if parallel.world_size == 1:
        assert EngineConfig(parallel_config=parallel).parallel_config.world_size == 1
    else:
        with pytest.raises(ConfigError, match=f"world_size={tensor * pipeline * data} is not valid; allowed: 1 "):
            EngineConfig(parallel_config=parallel)


def test_flat_options_reach_their_layers():
    config = EngineConfig.from_options(model="x", dtype="bf16", max_model_len=64, max_num_seqs=3, kv_cache_dtype="half")
    assert config == EngineConfig(ModelConfig("x", "bfloat16", max_model_len=64), CacheConfig("float16"),
                                  SchedulerConfig(3, 64))


def test_an_unknown_option_lists_those_that_exist():
    """F0.1"""
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_options(dtype="auto", max_modellen=3, block_size=16)
    assert str(error.value).startswith("unknown option block_size, max_modellen; this engine knows: ")
    listed = str(error.value).split(": ")[1].split(", ")
    assert listed == sorted(EngineConfig.options())
    assert {"model", "dtype", "device", "max_model_len", "seed", "kv_cache_dtype", "max_num_seqs",
            "tensor_parallel_size"} <= set(listed)


def test_every_option_has_a_help_text_and_one_home():
    options = EngineConfig.options()
    homes = [(layer, f.name) for layer, klass in EngineConfig.layers().items() for f in fields(klass)
             if not f.metadata.get("internal")]
    assert len(homes) == len({name for _, name in homes}) == len(options)
    assert all(f.metadata["help"].endswith(".") for _, f in options.values())


def test_a_dict_comes_back_as_it_went():
    """F0.2"""
    config = EngineConfig.from_options(model="m", dtype=torch.float16, max_model_len=77, seed=5, max_num_seqs=4)
    data = config.to_dict()
    assert data["config_version"] == CONFIG_VERSION
    assert EngineConfig.from_dict(json.loads(json.dumps(data))) == config


@pytest.mark.parametrize("version", [{}, {"config_version": 1}, {"config_version": "1"}, {"config_version": 1.0}])
def test_a_version_1_dict_loads_as_todays(version):
    """F0.2: version 1 was flat, had no version number at first, and called the precision `torch_dtype`."""
    old = {"model": "m", "torch_dtype": "float16", "max_model_len": 128, "max_num_seqs": 2, **version}
    today = EngineConfig(ModelConfig("m", "float16", max_model_len=128), scheduler_config=SchedulerConfig(2))
    assert EngineConfig.from_dict(old) == today
    assert EngineConfig.from_dict(today.to_dict()) == today
    assert old["torch_dtype"] == "float16", "the caller's dict is left alone"


@pytest.mark.parametrize(("data", "message"), [
    ({"config_version": 3}, "config_version=3 is not valid; allowed: 1 to 2"),
    ({"config_version": 2, "modell_config": {}}, "unknown section modell_config; allowed: model_config, cache_config"),
    ({"config_version": 2, "model_config": {"modell": 1}}, "unknown option modell in model_config; allowed: model, "),
    ({"config_version": 1, "modell": 1}, "unknown option modell; this engine knows"),
    ({"config_version": 2, "model_config": {"seed": -2}}, "seed=-2 is not valid")])
def test_a_dict_that_does_not_fit(data, message):
    """F0.2"""
    with pytest.raises(ConfigError, match=message):
        EngineConfig.from_dict(data)


def test_another_version_is_not_built_by_hand():
    with pytest.raises(ConfigError, match="config_version=1 is not valid; allowed: 2"):
        EngineConfig(config_version=1)


@dataclass(frozen=True)
class LargerCacheConfig(CacheConfig):
    block_size: int = option(16, "Tokens per block.")


@dataclass(frozen=True)
class LargerEngineConfig(EngineConfig):
    cache_config: LargerCacheConfig = field(default_factory=LargerCacheConfig)


def test_a_layer_can_grow():
    """F0.2: a milestone adds optional fields by naming its own class; older dicts go on loading."""
    assert LargerEngineConfig.from_options(block_size=8, kv_cache_dtype="fp16").cache_config == LargerCacheConfig(
        "float16", None, 8)
    assert LargerEngineConfig.from_dict(EngineConfig().to_dict()).cache_config.block_size == 16
    assert "block_size" in LargerEngineConfig.options()
    assert "block_size" not in EngineConfig.options()
