// How a step's attention is cut into items of work: see attention.hpp.
#pragma once

#include "batch.hpp"

#include <algorithm>

namespace attention {

constexpr int KEYS = 64;                // per tile
constexpr int ROWS = 48;                // of a prompt's item: enough to pay for copying a tile, few enough for L1

struct Item {
    int sequence;
    int first_head, num_heads;          // KV heads
    int first_token, num_tokens;        // of the sequence's new tokens
    int first_key, end_key;
    int part;                           // where a partial result goes, -1 for a whole one
};

struct Merge {
    int sequence, first_part, num_parts;
};

// How a step is cut.
struct Plan {
    Item* items = nullptr;              // null while they are counted
    Merge* merges = nullptr;
    int num_items = 0, num_merges = 0, num_parts = 0;

    void add(const Item& item) {
        if (items) items[num_items] = item;
        num_items++;
    }
    void add(const Merge& merge) {
        if (merges) merges[num_merges] = merge;
        num_merges++;
    }
};

// Called twice: to count, and to write down.
static void cut(Plan& plan, const Shape& shape, const Batch& batch, int num_threads) {
    const int tokens_per_item = std::max(1, ROWS * shape.num_kv_heads / shape.num_heads);
    long num_keys = 0;
    for (int b = 0; b < batch.num_sequences; b++) num_keys += batch.seq_lens[b];
    // Ranges of keys such that each thread gets a few; whole tiles.
    const int range = (int)((num_keys / (4 * num_threads) + KEYS - 1) / KEYS + 1) * KEYS;
    for (int b = 0; b < batch.num_sequences; b++) {
        const int num_new = batch.query_start_loc[b + 1] - batch.query_start_loc[b], length = batch.seq_lens[b];
        if (num_new == 1) {
            const int num_ranges = num_threads > 1 ? (length + range - 1) / range : 1;
            if (num_ranges > 1) plan.add(Merge{b, plan.num_parts, num_ranges});
            for (int i = 0; i < num_ranges; i++)
                plan.add(Item{b, 0, shape.num_kv_heads, 0, 1, i * range,
                              num_ranges > 1 ? std::min(length, (i + 1) * range) : length,
                              num_ranges > 1 ? plan.num_parts++ : -1});
            continue;
        }
        for (int head = 0; head < shape.num_kv_heads; head++)
            for (int token = 0; token < num_new; token += tokens_per_item) {
                const int count = std::min(tokens_per_item, num_new - token);
                plan.add(Item{b, head, 1, token, count, 0, length - num_new + token + count, -1});
            }
    }
}

}  // namespace attention
