// How a step's attention is cut into items of work: see attention.hpp.
#pragma once

#include "batch.hpp"

#include <algorithm>

namespace attention {

constexpr int KEYS = 64;                // per tile
constexpr int PART = 4 * KEYS;          // per part: a row's result is made of these, wherever it is computed
constexpr int ROWS = 48;                // of a prompt's item: enough to pay for copying a tile, few enough for L1

struct Item {
    int sequence;
    int first_head, num_heads;          // KV heads
    int first_token, num_tokens;        // of the sequence's new tokens
    int first_key, end_key;
    int merge;                          // the merge that this item is a part of, -1 for a whole one
    int part;                           // where its part goes
};

// Parts of one sequence's new token, and of some KV heads of it. The item that is done last merges them.
struct Merge {
    int sequence, first_head, num_heads;
    int first_part, num_parts;
};

// How a step is cut. The cuts depend on how much work there is and on the number of threads; no result does.
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
    long num_parts = 0;
    for (int b = 0; b < batch.num_sequences; b++) num_parts += (batch.seq_lens[b] + PART - 1) / PART;
    // The heads of a part lie side by side in memory and are read together, unless that leaves threads without work.
    const int heads_per_item = num_threads > 1 && num_parts < 4 * num_threads ? 1 : shape.num_kv_heads;
    for (int b = 0; b < batch.num_sequences; b++) {
        const int num_new = batch.query_start_loc[b + 1] - batch.query_start_loc[b], length = batch.seq_lens[b];
        if (num_new == 1) {
            const int num_ranges = std::max(1, (length + PART - 1) / PART);
            for (int head = 0; head < shape.num_kv_heads; head += heads_per_item) {
                const int num_heads = std::min(heads_per_item, shape.num_kv_heads - head), merge = plan.num_merges;
                for (int i = 0; i < num_ranges; i++)
                    plan.add(Item{b, head, num_heads, 0, 1, i * PART, std::min(length, (i + 1) * PART),
                                  num_ranges > 1 ? merge : -1, plan.num_parts + i});
                if (num_ranges > 1) plan.add(Merge{b, head, num_heads, plan.num_parts, num_ranges});
            }
            if (num_ranges > 1) plan.num_parts += num_ranges;
            continue;
        }
        for (int head = 0; head < shape.num_kv_heads; head++)
            for (int token = 0; token < num_new; token += tokens_per_item) {
                const int count = std::min(tokens_per_item, num_new - token);
                plan.add(Item{b, head, 1, token, count, 0, length - num_new + token + count, -1, -1});
            }
    }
}

}  // namespace attention
