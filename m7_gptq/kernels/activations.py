"""What `activations` means for a model here: rounded to 8 bits, or as they are.

Rounding pays where integer products are the faster ones, and it is kept out of float32, which is asked for where every
digit counts. What it costs in quality: `python -m m7_gptq quality`.
"""
from __future__ import annotations

import torch

from m0_basics.config import ConfigError
from m0_basics.model import CausalLM

from ..config import EngineConfig
from ..loading.fingerprint import matrices_of
from .cpu.linear import DTYPES, Activations
from .fuse_packed import has_packed_layers


def activations_for(config: EngineConfig, model: CausalLM) -> Activations:
    """How the layers of `model`, not fused yet, take their inputs. Raises ConfigError for what has no kernel."""
    asked = config.model_config.activations
    reason = _why_not_int8(config, model) if asked != "exact" else None
    if asked == "int8" and reason is not None:
        raise ConfigError(f"activations=int8 does nothing here: {reason}; allowed: activations=auto or exact")
    if asked == "auto":
        return "int8" if reason is None and model.dtype is torch.bfloat16 else "exact"
    return "int8" if asked == "int8" else "exact"


def _why_not_int8(config: EngineConfig, model: CausalLM) -> str | None:
    if not any(True for _ in matrices_of(model)):
        return ("the model's weights are plain (a GGUF file, a folder of method gptq or quantization=rtn has packed "
                "ones)")
    if not config.attention_config.fused_layers:
        return "fused_layers is off, and the kernel is theirs"
    if model.device.type != "cpu":
        return f"the model is on {model.device}, and the kernel is the CPU's"
    if model.dtype not in DTYPES:
        return f"the model is in {str(model.dtype).removeprefix('torch.')}, and the kernel takes float32 and bfloat16"
    return None if has_packed_layers(model.device, model.dtype) else "the CPU's kernels cannot be built on this machine"
