"""How a folder's layers are packed: `quantize_config.json`, and again `quantization_config` in config.json.

AutoGPTQ wrote the first, transformers the second, GPTQModel both. Where both are there they must agree. What would
change a layer and is not understood (rules for single layers, rotations, adapters) is refused: read past it, and the
model computes something else. What only records how the weights were found is let be.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m0_basics.config import reject
from m0_basics.loading.files import LoadError, read_json

from ..grid import BITS

FORMATS = ("gptq", "gptq_v2")               # zero points less one, and as they are
SETTINGS_FILE = "quantize_config.json"
_TIED = "tied_lm_head"                      # in `meta`: the input embedding is the packed output matrix
# GPTQModel's options that change what a packed layer computes.
_CHANGE_LAYERS = ("rotation", "adapter", "activation")


@dataclass(frozen=True)
class GPTQSettings:
    """What the packed tensors of a folder mean."""

    bits: int = 4
    group_size: int = 64                    # inputs to a scale; -1: all of them
    desc_act: bool = False                  # quantised in the order of activations: g_idx is not trivial
    sym: bool = False                       # every zero point is 2^(bits - 1)
    checkpoint_format: str = "gptq"
    lm_head: bool = False                   # the output matrix is packed too
    true_sequential: bool = True
    static_groups: bool = False
    damp_percent: float | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in BITS:
            raise reject("bits", self.bits, ", ".join(map(str, BITS)))
        size = self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise reject("group_size", size, "an integer >= 1, or -1 for one group of all inputs")
        for name in ("desc_act", "sym", "lm_head", "true_sequential", "static_groups"):
            if not isinstance(getattr(self, name), bool):
                raise reject(name, getattr(self, name), "true, false")
        if self.checkpoint_format not in FORMATS:
            raise reject("checkpoint_format", self.checkpoint_format, ", ".join(FORMATS))
        damp = self.damp_percent
        if damp is not None and (isinstance(damp, bool) or not isinstance(damp, int | float) or not 0 <= damp < 1):
            raise reject("damp_percent", damp, "a number from 0 up to 1")
        if not isinstance(self.meta, Mapping):
            raise reject("meta", self.meta, "a JSON object")

    @property
    def version(self) -> int:
        """1: zero points are stored less one. 2: as they are."""
        return FORMATS.index(self.checkpoint_format) + 1

    @property
    def tied(self) -> bool:
        """Whether the packed output matrix is the input embedding too, as this lab's `quantize` writes it."""
        return self.meta.get(_TIED) is True

    @property
    def middle(self) -> int:
        """The zero point of a symmetric grid."""
        return 1 << (self.bits - 1)

    def groups(self, inputs: int) -> int:
        """How many groups a row of `inputs` weights has. The size divides it, or is -1."""
        return 1 if self.group_size == -1 else inputs // self.group_size

    def to_dict(self) -> dict[str, Any]:
        """For both files: the names of AutoGPTQ, and those that transformers and GPTQModel added."""
        damping = {} if self.damp_percent is None else {"damp_percent": self.damp_percent}
        return {
            "quant_method": "gptq", "bits": self.bits, "group_size": self.group_size, "desc_act": self.desc_act,
            "sym": self.sym, "lm_head": self.lm_head, "checkpoint_format": self.checkpoint_format,
            "format": self.checkpoint_format, "pack_dtype": "int32", "true_sequential": self.true_sequential,
            "static_groups": self.static_groups, **damping, "meta": dict(self.meta),
        }


def tied_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`meta` with the mark of a folder whose packed output matrix is its embedding too."""
    return {**meta, _TIED: True}


def read_settings(folder: Path) -> GPTQSettings:
    """The settings of a packed folder. Raises LoadError where they are missing, not understood, or contradict."""
    found = {}
    config = read_json(folder / "config.json")
    if packing := config.get("quantization_config"):
        if not isinstance(packing, dict):
            raise LoadError(f"quantization_config of {folder / 'config.json'} does not hold a JSON object")
        found["config.json"] = parse_settings(packing, folder / "config.json")
    if (folder / SETTINGS_FILE).is_file():
        found[SETTINGS_FILE] = parse_settings(read_json(folder / SETTINGS_FILE), folder / SETTINGS_FILE)
    if not found:
        raise LoadError(f"{folder} has no settings of packed weights; allowed: {SETTINGS_FILE}, or "
                        "quantization_config in config.json")
    first = next(iter(found.values()))
    for other in found.values():
        for name in ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "tied"):
            if getattr(first, name) != getattr(other, name):
                raise LoadError(f"{name} of {folder} is {getattr(first, name)!r} in config.json and "
                                f"{getattr(other, name)!r} in {SETTINGS_FILE}; allowed: one value in both")
    return first


def parse_settings(data: Mapping[str, Any], file: Path) -> GPTQSettings:
    """One of the two files' settings, with AutoGPTQ's values for what is missing. Raises LoadError."""
    method = data.get("quant_method", "gptq")
    if method != "gptq":
        raise LoadError(f"quant_method={method!r} of {file} is not supported; allowed: gptq")
    for name in _CHANGE_LAYERS:
        if data.get(name):
            raise LoadError(f"{name}={data[name]!r} of {file} changes what a layer computes and is not supported; "
                            f"allowed: no {name}")
    _check_dynamic(data.get("dynamic"), file)
    if str(data.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise LoadError(f"pack_dtype={data['pack_dtype']!r} of {file} is not supported; allowed: int32")
    if data.get("is_marlin_format"):
        raise LoadError(f"is_marlin_format of {file} is not supported; allowed: checkpoint_format "
                        + ", ".join(FORMATS))
    if "bits" not in data:
        raise LoadError(f"{file} does not say bits; allowed: {', '.join(map(str, BITS))}")
    names = {name: data[name] for name in ("bits", "group_size", "desc_act", "sym", "lm_head", "true_sequential",
                                           "static_groups", "damp_percent", "meta") if data.get(name) is not None}
    defaults = {"group_size": 128, "sym": True}
    form = data.get("checkpoint_format") or data.get("format") or "gptq"
    try:
        return GPTQSettings(**{**defaults, **names, "checkpoint_format": form})
    except ValueError as error:
        raise LoadError(f"{file}: {error}") from error


def _check_dynamic(rules: Any, file: Path) -> None:
    """GPTQModel's rules by pattern. "-:PATTERN" leaves layers unpacked, which their tensors show anyhow."""
    if not rules:
        return
    if not isinstance(rules, dict):
        raise LoadError(f"dynamic={rules!r} of {file} is not valid; allowed: a JSON object of rules by pattern")
    for pattern, rule in rules.items():
        if rule and not pattern.startswith("-:"):
            raise LoadError(f"dynamic of {file} packs the layers {pattern!r} in a way of their own ({rule}), which is "
                            "not supported; allowed: rules that leave layers unpacked (-:PATTERN)")
