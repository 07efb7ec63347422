"""The contiguous KV cache: one row of slots per sequence, each row as long as the longest sequence may get.

    row 0  [ k k k k k k . . . . . . . . . . ]      6 tokens stored, 10 slots reserved and unused
    row 1  [ k k k k k k k k k . . . . . . . ]
    row 2  [ . . . . . . . . . . . . . . . . ]      free

Token i of a sequence lives in slot `first_slot + i`. Simple, fast to read, and wasteful: a row is reserved
for `max_model_len` tokens whatever the sequence needs.
"""
from __future__ import annotations

import psutil
import torch
from torch import Tensor

from m0_basics.config import CacheConfig, ConfigError
from m0_basics.model_spec import ModelSpec
from m0_basics.request import Sequence


class KVCache:
    """Keys and values of all layers, addressed by slot. `k`, `v`: [layers, num_slots, H_kv, D]."""

    def __init__(self, spec: ModelSpec, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (spec.num_hidden_layers, num_slots, spec.num_key_value_heads, spec.head_dim)
        # Not zeroed: the operating system hands out the pages of a row only when the row is written.
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)

    def store(self, layer_idx: int, k: Tensor, v: Tensor, slot_mapping: Tensor) -> None:
        """Write k, v [T, H_kv, D] of one layer into the slots that `slot_mapping` [T] names."""
        self.k[layer_idx].index_copy_(0, slot_mapping, k.to(self.k.dtype))
        self.v[layer_idx].index_copy_(0, slot_mapping, v.to(self.v.dtype))

    def copy(self, source: int, target: int, num_slots: int) -> None:
        """Copy `num_slots` slots of all layers from slot `source` on to slot `target` on."""
        for tensor in (self.k, self.v):
            tensor[:, target:target + num_slots] = tensor[:, source:source + num_slots]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


class CacheRows:
    """Which row belongs to which sequence."""

    def __init__(self, kv_cache: KVCache, num_rows: int, row_size: int) -> None:
        self.kv_cache = kv_cache
        self.row_size = row_size
        self._free = list(range(num_rows - 1, -1, -1))
        self._row_of: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, sequence: Sequence) -> None:
        """Reserve a row. The caller has made sure that one is free."""
        assert sequence.seq_id not in self._row_of
        self._row_of[sequence.seq_id] = self._free.pop()

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Make room for the next tokens of a sequence: its row has it."""
        assert sequence.num_computed_tokens + num_tokens <= self.row_size

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Give `child` a row of its own with a copy of what `parent` has computed."""
        self.allocate(child)
        self.kv_cache.copy(self.first_slot(parent), self.first_slot(child), parent.num_computed_tokens)

    def free(self, sequence: Sequence) -> None:
        """Take the sequence's row back."""
        self._free.append(self._row_of.pop(sequence.seq_id))

    def first_slot(self, sequence: Sequence) -> int:
        """The slot of the sequence's token 0."""
        return self._row_of[sequence.seq_id] * self.row_size


def kv_cache_bytes(spec: ModelSpec, num_tokens: int, dtype: torch.dtype) -> int:
    """Keys and values, all layers: 2 x layers x tokens x H_kv x D x bytes per element."""
    return 2 * spec.num_hidden_layers * num_tokens * spec.num_key_value_heads * spec.head_dim * dtype.itemsize


def check_memory(needed: int, config: CacheConfig, num_rows: int, row_size: int, device: torch.device) -> None:
    """Refuse a cache larger than `kv_cache_memory_bytes`, or, where that is not set, than the memory there is.

    A CPU's pages are handed out as they are written, so its whole memory counts; a GPU's have to be free at once.
    """
    budget, source = config.kv_cache_memory_bytes, "kv_cache_memory_bytes"
    if budget is None:
        source = "the memory of this GPU" if device.type == "cuda" else "the memory of this machine"
        budget = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().total
    if needed > budget:
        raise ConfigError(f"{source}={budget:,} is too small: {num_rows} rows of {row_size} tokens take "
                          f"{needed:,} bytes; lower max_num_seqs or max_model_len, or raise the budget")
