"""What the tests of the GPU's kernels share."""
from __future__ import annotations

from m4_flash_attn.metadata import FlashMetadata, num_decodes
from m4_flash_attn.reference import PagedBatch


def metadata_of(batch: PagedBatch) -> FlashMetadata:
    """The batch as a backend's kernel is told of it."""
    return FlashMetadata(batch.query_start_loc.tolist(), batch.seq_lens, batch.block_table, batch.slot_mapping,
                         batch.max_query_len, batch.query_start_loc, batch.block_size, int(batch.seq_lens.max()),
                         num_decodes(batch.query_start_loc.tolist()))
