// What Python hands over: the layout of these structures is written down once more in kernels/cpu/ops.py.
#pragma once

#include "vec.hpp"

// The same for the whole life of an engine.
struct Shape {
    int32_t num_heads, num_kv_heads, head_dim, block_size;
    int32_t window, num_sinks;          // window 0: every earlier key is visible
    int32_t is_bf16;                    // else float32
    float scale;
};

// The same for all layers of a step: the paged metadata. T tokens, B sequences.
struct Batch {
    int64_t num_tokens, num_sequences, max_blocks;
    const int32_t* query_start_loc;     // B + 1
    const int32_t* seq_lens;            // B
    const int32_t* block_table;         // [B, max_blocks]
    const int32_t* slot_mapping;        // T
};
