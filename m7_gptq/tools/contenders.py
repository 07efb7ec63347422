"""Who takes part in the benchmark: this milestone's ways to hold the weights, the milestones before it, and peers.

Folders that are quantised for it are kept in the cache folder: GPTQ takes minutes, and gives the same every time.
"""
from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import m4_flash_attn as m4
import m6_prefix_cache as m6
from m0_basics.base_llm import BaseLLM
from m0_basics.config import DEFAULT_MODEL, ConfigError
from m0_basics.loading.loader import gguf_file, resolve_model
from m0_basics.loading.model_cache import cache_dir
from m0_basics.tools.bench import Contender, EngineContender, make_peers
from m0_basics.tools.bench.subprocess_peers import engines_of
from m2_continuous_batching.engine import engine_of

from ..llm import LLM
from ..loading.memory import held_bytes
from ..rtn import QuantizeOptions
from .quantize_command import quantize
from .texts import calibration_text

logger = logging.getLogger(__name__)
NEAREST = QuantizeOptions(method="rtn", search=False, desc_act=False, sink=0.0)
# What vLLM's CPU build reads: a symmetric grid, and a plain output matrix.
FOR_VLLM = replace(NEAREST, sym=True, lm_head=False)

# What decides over a folder's codes besides options and text.
_MAKERS = ("grid.py", "rtn.py", "gptq.py", "calibration.py", "quantize.py", "tools/quantize_command.py")


@dataclass(frozen=True)
class Ours:
    """The lab's own engines, by the names that results have."""

    llms: dict[str, BaseLLM]
    notes: dict[str, str]
    folder: Path                        # GPTQ, 4 bits: the default of `quantize`

    def contenders(self, names: Sequence[str] = ()) -> list[EngineContender]:
        """All, or those named. What an earlier round computed is not to be found in a prefix cache."""
        return [EngineContender(name, llm, self.notes[name],
                                before_run=getattr(llm, "reset_prefix_cache", lambda: None))
                for name, llm in self.llms.items() if not names or name in names]

    def weight_bytes(self) -> dict[str, int]:
        """What each engine holds of its weights."""
        return {name: held_bytes(engine_of(llm).runner.model) for name, llm in self.llms.items()}


def make_ours(base: dict[str, Any], quick: bool) -> Ours:
    """The engines over one model. Raises ConfigError for a model that earlier milestones cannot load."""
    model = str(base.get("model", DEFAULT_MODEL))
    best = replace(NEAREST, group_size=32) if quick else QuantizeOptions()
    folder = packed_folder(model, best)
    eight = packed_folder(model, replace(NEAREST, bits=8, group_size=best.group_size))
    llms: dict[str, BaseLLM] = {
        "m4": m4.LLM(**base), "m6": m6.LLM(**base),
        "m7": LLM(**base | {"model": str(folder)}),
        "m7-a16": LLM(**base | {"model": str(folder), "activations": "exact"}),
        "m7-8bit": LLM(**base | {"model": str(eight)})}
    notes = {"m4": "plain weights", "m6": "plain weights, prefixes kept", "m7": f"GPTQ, 4 bits, groups of "
             f"{best.group_size}", "m7-a16": "the same, activations as they are", "m7-8bit": "8 bits, the nearest"}
    if gguf_file(model) is not None:
        llms["m7-gguf"] = LLM(**base)
        notes["m7-gguf"] = "the GGUF file's own blocks"
    return Ours(llms, notes, folder)


def packed_folder(model: str, options: QuantizeOptions) -> Path:
    """The folder of `model` quantised with `options`, from the cache or made now."""
    source = resolve_model(model, torch.float32)
    changed = (source / "config.json").stat().st_mtime_ns
    key = hashlib.sha256(f"{source.resolve()} {changed} {options} {version('llm-inference-lab')}".encode())
    for maker in _MAKERS:
        key.update((Path(__file__).parents[1] / maker).read_bytes())
    key.update(calibration_text().encode())
    folder = cache_dir() / f"quantized-{key.hexdigest()[:24]}"
    if not (folder / "config.json").is_file():
        quantize(model, folder, options)
    return folder


def start_peers(stack: ExitStack, names: Sequence[str], peer_python: Sequence[Path], base: dict[str, Any],
                llm: BaseLLM, quick: bool) -> list[Contender]:
    """Peers on the plain weights, and vLLM on a folder of 4 bits as well, where it is a peer and can run one."""
    length, dtype = int(base["max_model_len"]), str(base.get("dtype", "auto"))
    peers = [stack.enter_context(p) for p in make_peers(names, peer_python, llm, length, dtype)]
    if not any(peer.name == "vllm" for peer in peers):
        return peers
    options = replace(FOR_VLLM, group_size=32 if quick else FOR_VLLM.group_size)
    packed = LLM(**base | {"model": str(packed_folder(str(base.get("model", DEFAULT_MODEL)), options))})
    able = [python for python in peer_python if engines_of(python) == ["vllm"]]      # llama.cpp reads no folder
    try:
        for peer in make_peers([], able, packed, length, dtype):
            peer.name = f"{peer.name}-4bit"
            peers.append(stack.enter_context(peer))
    except ConfigError as error:
        logger.warning("vLLM does not take part with 4 bits: %s", error)
    return peers
