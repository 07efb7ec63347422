"""Configuration: four small frozen dataclasses and one on top that keeps them consistent.

Each layer checks its own fields in `__post_init__`, so a bad value never gets past its constructor.
`EngineConfig` checks what no layer can see alone, and makes `max_model_len` one value everywhere.
Command-line flags and the keyword arguments of `LLM` are derived from the fields of these classes.
"""
from __future__ import annotations

import dataclasses
import importlib
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self, get_type_hints

import torch

DEFAULT_MODEL = "smollm2-135m-instruct"
CONFIG_VERSION = 2
DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_ALIASES = {"fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16"}


class ConfigError(ValueError):
    """A bad option. The message names the field, the value and what is allowed."""


def option(default: Any, help: str, **extra: Any) -> Any:
    """A dataclass field that also carries the help text of its command-line flag."""
    return field(default=default, metadata={"help": help, **extra})


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 4
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = 12
_SHORT.maxstring = _SHORT.maxother = 200


def short(value: object) -> str:
    """`repr(value)` for a message: a line or two, whatever the size of the value."""
    text = _SHORT.repr(value)
    return text if len(text) <= 300 else f"{text[:250]}...{text[-40:]}"


def reject(name: str, value: object, allowed: str) -> ConfigError:
    """The one form of every complaint about a value: field, value, what is allowed."""
    return ConfigError(f"{name}={short(value)} is not valid; allowed: {allowed}")


def parse_dtype(name: str, value: str | torch.dtype) -> str:
    """Return `value` as one of "auto", "float32", "float16", "bfloat16" (text or `torch.dtype` goes in)."""
    text = str(value).removeprefix("torch.")
    text = _ALIASES.get(text, text)
    if text != "auto" and text not in DTYPES:
        raise reject(name, value, "auto, " + ", ".join(DTYPES) + ", or the torch.dtype of one of them")
    return text


def check_int(name: str, value: object, minimum: int, optional: bool = False) -> None:
    """Raise ConfigError unless `value` is an integer of at least `minimum` (or None, where that is allowed)."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise reject(name, value, f"an integer >= {minimum}" + (" or None" if optional else ""))


def require(module: str, why: str, extra: str = "bench") -> Any:
    """Import an optional library, part of `extra`. Raises ConfigError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f'{why} needs {module.partition(".")[0]} ({error}); '
                          f'install it with: pip install "llm-inference-lab[{extra}]"') from error


@dataclass(frozen=True)
class ModelConfig:
    """Which model, where it runs and in which precision."""

    model: str = option(DEFAULT_MODEL, "Model: the default's name, a Hugging Face folder or id, or a GGUF file.")
    dtype: str | torch.dtype = option("auto", "Precision of weights and activations: auto, float32, bfloat16, float16.")
    device: str = option("auto", "Where it runs: auto, cpu, or cuda.")
    max_model_len: int | None = option(None, "Longest sequence, prompt and output, in tokens (default: the model's).")
    seed: int = option(0, "Seed from which requests without one of their own draw theirs.")
    skip_tokenizer_init: bool = option(False, "Load no tokenizer: prompts and outputs are token ids only.")

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise reject("model", self.model, "the default's name, a Hugging Face folder or id, or a GGUF file")
        object.__setattr__(self, "dtype", parse_dtype("dtype", self.dtype))
        if self.device not in ("auto", "cpu") and self.device.split(":")[0] != "cuda":
            raise reject("device", self.device, "auto, cpu, cuda or cuda:N")
        check_int("max_model_len", self.max_model_len, 1, optional=True)
        check_int("seed", self.seed, 0)


@dataclass(frozen=True)
class CacheConfig:
    """The KV cache: how precise, and how many bytes it may take."""

    kv_cache_dtype: str = option("auto", "Precision of the KV cache: auto (the model's), float32, bfloat16, float16.")
    kv_cache_memory_bytes: int | None = option(None, "Bytes the KV cache may take (default: what the engine needs).")

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_cache_dtype", parse_dtype("kv_cache_dtype", self.kv_cache_dtype))
        check_int("kv_cache_memory_bytes", self.kv_cache_memory_bytes, 1, optional=True)


@dataclass(frozen=True)
class SchedulerConfig:
    """How much runs side by side."""

    max_num_seqs: int = option(1, "Sequences that run side by side.")
    max_model_len: int | None = option(None, "Same value as the model's; set it there.", internal=True)

    @property
    def longest(self) -> int:
        """`max_model_len`, once the model's own limit has settled it."""
        assert self.max_model_len is not None, "with_max_model_len settles it"
        return self.max_model_len

    def __post_init__(self) -> None:
        check_int("max_num_seqs", self.max_num_seqs, 1)
        check_int("max_model_len", self.max_model_len, 1, optional=True)


@dataclass(frozen=True)
class ParallelConfig:
    """Over how many devices the work is split: each tensor, the layers, or whole requests."""

    tensor_parallel_size: int = option(1, "Devices that share each layer's matrices.")
    pipeline_parallel_size: int = option(1, "Devices that share the stack of layers.")
    data_parallel_size: int = option(1, "Copies of the whole engine.")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            check_int(f.name, getattr(self, f.name), 1)

    @property
    def world_size(self) -> int:
        """Number of processes: the product of the three."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.data_parallel_size


@dataclass(frozen=True)
class EngineConfig:
    """All layers together. A milestone extends a layer by naming its own class here."""

    model_config: ModelConfig = field(default_factory=ModelConfig)
    cache_config: CacheConfig = field(default_factory=CacheConfig)
    scheduler_config: SchedulerConfig = field(default_factory=SchedulerConfig)
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)
    config_version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        if self.config_version != CONFIG_VERSION:
            raise reject("config_version", self.config_version,
                         f"{CONFIG_VERSION} (older ones load through EngineConfig.from_dict)")
        lengths = {self.model_config.max_model_len, self.scheduler_config.max_model_len} - {None}
        if len(lengths) > 1:
            raise reject("scheduler_config.max_model_len", self.scheduler_config.max_model_len,
                         f"the model's max_model_len, {self.model_config.max_model_len}")
        for name in ("model_config", "scheduler_config"):
            layer = replace(getattr(self, name), max_model_len=next(iter(lengths), None))
            object.__setattr__(self, name, layer)
        if self.parallel_config.world_size != 1:
            raise reject("parallel_config.world_size", self.parallel_config.world_size,
                         "1 (this engine runs in one process)")

    def with_max_model_len(self, model_limit: int) -> Self:
        """This configuration with `max_model_len` settled, once the model's own limit is known."""
        wanted = self.model_config.max_model_len
        if wanted is not None and wanted > model_limit:
            raise reject("max_model_len", wanted, f"at most {model_limit}, the model's own limit")
        length = wanted or model_limit
        return replace(self, model_config=replace(self.model_config, max_model_len=length),
                       scheduler_config=replace(self.scheduler_config, max_model_len=length))

    @classmethod
    def layers(cls) -> dict[str, type]:
        """Name -> dataclass of each configuration layer."""
        hints = get_type_hints(cls)
        return {f.name: hints[f.name] for f in dataclasses.fields(cls) if dataclasses.is_dataclass(hints[f.name])}

    @classmethod
    def options(cls) -> dict[str, tuple[str, dataclasses.Field[Any]]]:
        """Every option a user may set -> (its layer, its field). The command line is made from this."""
        return {f.name: (layer, f) for layer, klass in cls.layers().items() for f in dataclasses.fields(klass)
                if not f.metadata.get("internal")}

    @classmethod
    def from_options(cls, **options: Any) -> Self:
        """Build from flat keyword arguments. An unknown one is an error that lists those that exist."""
        known = cls.options()
        if unknown := sorted(set(options) - set(known)):
            raise ConfigError(f"unknown option {', '.join(unknown)}; this engine knows: {', '.join(sorted(known))}")
        values: dict[str, dict[str, Any]] = {layer: {} for layer in cls.layers()}
        for name, value in options.items():
            values[known[name][0]][name] = value
        return cls(**{layer: klass(**values[layer]) for layer, klass in cls.layers().items()})

    def to_dict(self) -> dict[str, Any]:
        """A plain dict that `from_dict` reads back (JSON can hold it)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Read a dict of this or an older `config_version`.

        Version 1 was flat and called the precision `torch_dtype`; version 2 is nested by layer.
        """
        data = dict(data)
        version = int(float(data.pop("config_version", 1)))
        if version == 1:
            if "torch_dtype" in data:
                data["dtype"] = data.pop("torch_dtype")
            return cls.from_options(**data)
        if version != CONFIG_VERSION:
            raise reject("config_version", version, f"1 to {CONFIG_VERSION}")
        layers = cls.layers()
        if unknown := sorted(set(data) - set(layers)):
            raise ConfigError(f"unknown section {', '.join(unknown)}; allowed: {', '.join(layers)}")
        for name, section in data.items():
            fields = [f.name for f in dataclasses.fields(layers[name])]
            if unknown := sorted(set(section) - set(fields)):
                raise ConfigError(f"unknown option {', '.join(unknown)} in {name}; allowed: {', '.join(fields)}")
        return cls(**{name: layers[name](**section) for name, section in data.items()})
