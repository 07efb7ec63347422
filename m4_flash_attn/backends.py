"""Which attention backends there are, which of them this machine can run, and which one is chosen.

    on a CPU     cpu, else sdpa
    on a GPU     flash_attn, else triton, else sdpa
    by name      any; one that cannot run says what is missing, and which can

Nothing optional is imported before its backend is asked about.
"""
from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from m0_basics.attention import AttentionBackend
from m0_basics.config import DTYPES, ConfigError
from m0_basics.model import CausalLM
from m0_basics.model_spec import ModelSpec
from m2_continuous_batching.plugins import CachePlugin
from m2_continuous_batching.slot_cache import SlotCache
from m3_paged_kv.attention import PagedAttention
from m3_paged_kv.block_tables import BlockTables

from .attention import AttendOne, ReadableAttention, attend_naive, attend_tiled
from .config import EngineConfig
from .kernels.cpu import bindings as cpu
from .kernels.cpu.attention import CpuAttention
from .kernels.cpu.build import BuildError, library
from .kernels.flash_attn import Attend, LibraryError, load_flash_attn, load_torch_varlen
from .kernels.triton import has_triton

logger = logging.getLogger(__name__)
_LARGEST_TRITON_HEAD = 128          # tiles of larger heads do not fit into every GPU's shared memory
_LARGEST_TRITON_GROUP = 16          # query heads per KV head: one tile of a decode step
_LARGEST_LIBRARY_HEAD = 256
_OLDEST_GPU = (8, 0)                # compute capability
_NO_PLUGINS = "cache plugins change what is stored, and this kernel reads the cache itself"


@dataclass(frozen=True)
class Situation:
    """What decides over a backend."""

    device: torch.device
    dtype: torch.dtype                  # the model's
    cache_dtype: torch.dtype
    spec: ModelSpec
    block_size: int
    has_cache_plugins: bool = False


def situation_of(config: EngineConfig, model: CausalLM, cache_plugins: Sequence[CachePlugin]) -> Situation:
    """What decides over the backend of an engine."""
    cache_dtype = DTYPES.get(config.cache_config.kv_cache_dtype, model.dtype)
    return Situation(model.device, model.dtype, cache_dtype, model.spec, config.cache_config.block_size,
                     bool(cache_plugins))


class Backend(ABC):
    """A way to compute attention: whether it can, and how it is made."""

    name: str
    idea: str                           # one line for `env`
    graphs: bool = False                # whether CUDA graphs can record it

    @abstractmethod
    def why_not(self, situation: Situation) -> str | None:
        """None where it can run; else what is missing and what to do, in one line."""

    @abstractmethod
    def make(self, situation: Situation, cache: SlotCache, tables: BlockTables) -> AttentionBackend:
        """The backend over an engine's cache. `why_not` has said None."""


class CpuBackend(Backend):
    name = "cpu"
    idea = "C++ kernels over the blocks where they lie"

    def why_not(self, situation: Situation) -> str | None:
        if situation.device.type != "cpu":
            return f"the model is on {situation.device.type}"
        if situation.has_cache_plugins:
            return _NO_PLUGINS
        if situation.dtype not in cpu.DTYPES or situation.cache_dtype is not situation.dtype:
            return (f"it computes in float32 and bfloat16, on a cache of the same type; the model is in "
                    f"{situation.dtype}, the cache in {situation.cache_dtype}")
        if situation.spec.head_dim % 16 or situation.spec.head_dim > cpu.MAX_HEAD_DIM:
            return f"head size {situation.spec.head_dim} is not a multiple of 16 up to {cpu.MAX_HEAD_DIM}"
        try:
            library()
        except BuildError as error:
            return str(error)
        return None

    def make(self, situation: Situation, cache: SlotCache, tables: BlockTables) -> AttentionBackend:
        spec = situation.spec
        kernels = cpu.PagedKernels(spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim,
                                   tables.block_size, situation.dtype, spec.head_dim ** -0.5)
        return CpuAttention(cache, tables, kernels)


class TritonBackend(Backend):
    name = "triton"
    idea = "Triton kernels over the blocks where they lie"
    graphs = True

    def why_not(self, situation: Situation) -> str | None:
        if (reason := _not_on_gpu(situation)) is not None:
            return reason
        if not has_triton():
            return "triton is not installed; install it with: pip install triton"
        if (capability := _capability(situation)) < _OLDEST_GPU:
            return "it needs a GPU of compute capability 8.0 or newer, and this is {}.{}".format(*capability)
        size = situation.block_size
        if size < 16 or size & (size - 1):
            return f"block_size={size} is not a power of two of at least 16"
        if situation.spec.head_dim % 16 or situation.spec.head_dim > _LARGEST_TRITON_HEAD:
            return f"head size {situation.spec.head_dim} is not a multiple of 16 up to {_LARGEST_TRITON_HEAD}"
        group = situation.spec.num_attention_heads // situation.spec.num_key_value_heads
        if group > _LARGEST_TRITON_GROUP:
            return f"{group} query heads share a key-value head, and it takes at most {_LARGEST_TRITON_GROUP}"
        return None

    def make(self, situation: Situation, cache: SlotCache, tables: BlockTables) -> AttentionBackend:
        from .kernels.triton.backend import GpuAttention
        return GpuAttention(cache, tables)


class LibraryBackend(Backend):
    """Attention by a library, stores by Triton."""

    graphs = True

    @abstractmethod
    def load(self, situation: Situation) -> Attend:
        """The library's attention. Raises LibraryError."""

    def why_not(self, situation: Situation) -> str | None:
        if (reason := _not_on_gpu(situation)) is not None:
            return reason
        if not has_triton():
            return "it stores keys and values by triton, which is not installed; install it with: pip install triton"
        if situation.spec.head_dim % 8 or situation.spec.head_dim > _LARGEST_LIBRARY_HEAD:
            return f"head size {situation.spec.head_dim} is not a multiple of 8 up to {_LARGEST_LIBRARY_HEAD}"
        try:
            self.load(situation)
        except LibraryError as error:
            return str(error)
        return None

    def make(self, situation: Situation, cache: SlotCache, tables: BlockTables) -> AttentionBackend:
        from .kernels.triton.backend import GpuAttention
        return GpuAttention(cache, tables, self.load(situation))


class FlashAttnBackend(LibraryBackend):
    name = "flash_attn"
    idea = "the flash-attn library, version 2 or 4"

    def load(self, situation: Situation) -> Attend:
        return load_flash_attn(situation.dtype, situation.block_size, _capability(situation))


class TorchVarlenBackend(LibraryBackend):
    name = "torch_varlen"
    idea = "torch's own variable-length attention"

    def load(self, situation: Situation) -> Attend:
        return load_torch_varlen(situation.dtype, situation.block_size, _capability(situation))


class SdpaBackend(Backend):
    name = "sdpa"
    idea = "m3's: gather, pad, scaled_dot_product_attention"

    def why_not(self, situation: Situation) -> str | None:
        return None

    def make(self, situation: Situation, cache: SlotCache, tables: BlockTables) -> AttentionBackend:
        return PagedAttention(cache, tables, situation.dtype)


class ReadableBackend(Backend):
    """Slow, and never chosen by itself."""

    def __init__(self, name: str, idea: str, attend: AttendOne) -> None:
        self.name, self.idea, self.attend = name, idea, attend

    def why_not(self, situation: Situation) -> str | None:
        return None

    def make(self, situation: Situation, cache: SlotCache, tables: BlockTables) -> AttentionBackend:
        return ReadableAttention(cache, tables, self.attend)


BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (
    CpuBackend(), FlashAttnBackend(), TritonBackend(), TorchVarlenBackend(), SdpaBackend(),
    ReadableBackend("tiled", "the online softmax in plain PyTorch, to read", attend_tiled),
    ReadableBackend("naive", "all scores, a mask, a softmax, to read", attend_naive))}


def choose(name: str, situation: Situation) -> Backend:
    """The backend of that name, or, for "auto", the first of this device's that can run.

    Raises ConfigError for one that cannot, with the reason and the names of those that can.
    """
    if name == "auto":
        return _choose_by_device(situation)
    if (reason := BACKENDS[name].why_not(situation)) is not None:
        able = ", ".join(other for other, backend in BACKENDS.items() if backend.why_not(situation) is None)
        raise ConfigError(f"attention_backend={name!r} is not available: {reason}; available here: {able}")
    return BACKENDS[name]


def _choose_by_device(situation: Situation) -> Backend:
    names = ("flash_attn", "triton") if situation.device.type == "cuda" else ("cpu",)
    reasons = {name: BACKENDS[name].why_not(situation) for name in names}
    for name, reason in reasons.items():
        if reason is None:
            return BACKENDS[name]
    if situation.device.type in ("cpu", "cuda"):
        logger.warning("attention backend sdpa is used, which is slower; %s",
                       "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return BACKENDS["sdpa"]


def _not_on_gpu(situation: Situation) -> str | None:
    """What all kernels for GPUs need."""
    if situation.device.type != "cuda":
        return f"it needs an NVIDIA GPU, and the model is on {situation.device.type}"
    if situation.device.index not in (None, 0):
        return f"it runs on the first GPU, and the model is on {situation.device}; set CUDA_VISIBLE_DEVICES instead"
    if situation.has_cache_plugins:
        return _NO_PLUGINS
    if situation.cache_dtype is not situation.dtype:
        return f"the model is in {situation.dtype}, the cache in {situation.cache_dtype}; they have to be the same"
    return None


def _capability(situation: Situation) -> tuple[int, int]:
    return torch.cuda.get_device_capability(situation.device)
