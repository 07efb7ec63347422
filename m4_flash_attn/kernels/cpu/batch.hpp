// What Python hands over: the layout of these structures is written down once more in kernels/cpu/bindings.py.
#pragma once

#include "vec.hpp"

constexpr int MAX_HEAD_DIM = 1024;      // checked in bindings.py

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

// Memory to work in, which the caller has: one who finds none can raise an exception, which a kernel cannot. Take
// everything first, then ask whether it fits; `used` says how much it takes where it does not.
struct Workspace {
    char* memory;
    int64_t size, used = 0;

    template <class T> T* take(int64_t count) {
        T* taken = (T*)((uintptr_t)memory + used);
        used += (count * (int64_t)sizeof(T) + 63) / 64 * 64;        // whole cache lines
        return taken;
    }
    bool fits() const { return used <= size; }
};
