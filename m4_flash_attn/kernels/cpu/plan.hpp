// How a step's attention is cut into items of work: see attention.hpp.
#pragma once

#include "batch.hpp"

#include <algorithm>

namespace attention {

constexpr int KEYS = 64;                // per tile
constexpr int PART = 4 * KEYS;          // per part: a row's result is made of these, wherever it is computed
constexpr int ROWS = 48;                // of a prompt's item: enough to pay for copying a tile, few enough for L1
constexpr long MOST_PARTS = 1 << 14;    // of several tokens of a sequence: more would take too much memory

struct Item {
    int sequence;
    int first_head, num_heads;          // KV heads
    int first_token, num_tokens;        // of the sequence's new tokens
    int first_key, end_key;
    int merge;                          // the merge that this item is a part of, -1 for a whole one
    int part;                           // where its part goes: each of its tokens has one
};

// Parts of some new tokens of a sequence, and of some KV heads. The item that is done last merges them.
struct Merge {
    int sequence, first_head, num_heads;
    int first_token, num_tokens;
    int first_part, num_parts;          // part i of token t: first_part + i * num_tokens + t
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

static inline int parts_of(int num_keys) { return (num_keys + PART - 1) / PART; }

// What an item takes, in multiplications of a row and a key: copying the keys and values is worth some rows.
static inline long work_of(int num_tokens, int rows_per_token, int num_keys) {
    return (long)num_keys * (num_tokens * rows_per_token + ROWS / 4);
}

// Called twice: to count, and to write down.
static void cut(Plan& plan, const Shape& shape, const Batch& batch, int num_threads) {
    const int group = shape.num_heads / shape.num_kv_heads, tokens_per_item = std::max(1, ROWS / group);
    long num_parts = 0, work = 0;
    for (int b = 0; b < batch.num_sequences; b++) {
        const int num_new = batch.query_start_loc[b + 1] - batch.query_start_loc[b], length = batch.seq_lens[b];
        num_parts += parts_of(length);
        for (int token = 0; token < num_new; token += tokens_per_item) {
            const int tokens = std::min(tokens_per_item, num_new - token), end = length - num_new + token + tokens;
            work += shape.num_kv_heads * work_of(tokens, group, end);
        }
    }
    // The heads of a part lie side by side in memory and are read together, unless that leaves threads without work.
    const int heads_per_item = num_threads > 1 && num_parts < 4 * num_threads ? 1 : shape.num_kv_heads;
    for (int b = 0; b < batch.num_sequences; b++) {
        const int num_new = batch.query_start_loc[b + 1] - batch.query_start_loc[b], length = batch.seq_lens[b];
        // Several new tokens are cut only where their longest item would keep a thread while the others wait.
        const bool in_parts = num_new == 1
            || (num_threads > 1 && (long)num_new * parts_of(length) <= MOST_PARTS
                && 4 * num_threads * work_of(std::min(num_new, tokens_per_item), group, length) > work);
        const int num_heads = num_new == 1 ? heads_per_item : 1;
        for (int token = 0; token < num_new; token += tokens_per_item) {
            const int tokens = std::min(tokens_per_item, num_new - token), end = length - num_new + token + tokens;
            const int num_ranges = in_parts ? std::max(1, parts_of(end)) : 1;
            for (int head = 0; head < shape.num_kv_heads; head += num_heads) {
                const int heads = std::min(num_heads, shape.num_kv_heads - head);
                const int merge = num_ranges > 1 ? plan.num_merges : -1;
                for (int i = 0; i < num_ranges; i++)
                    plan.add(Item{b, head, heads, token, tokens, i * PART, i + 1 < num_ranges ? (i + 1) * PART : end,
                                  merge, plan.num_parts + i * tokens});
                if (num_ranges > 1) plan.add(Merge{b, head, heads, token, tokens, plan.num_parts, num_ranges});
            }
            if (num_ranges > 1) plan.num_parts += num_ranges * tokens;
        }
    }
}

}  // namespace attention
