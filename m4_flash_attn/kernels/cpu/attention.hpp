// Attention over a paged KV cache, prefill and decode in one kernel: the online softmax, tile by tile.
//
//     one item of work = one sequence x one KV head x some query tokens       (prefill)
//                      = one sequence x all KV heads x a range of keys        (decode)
//                      = one sequence x one KV head x some query tokens x a range of keys      (a few behind many)
//
//     keys   [ tile 0 | tile 1 | tile 2 | .. ]        64 keys each, copied together from wherever their blocks lie
//     rows   the item's query tokens x the G query heads that share the KV head: they read each tile together
//
//     for each tile:   S = rows x keys      m' = max(m, S)      P = 2^(S - m')
//                      l = l * 2^(m - m') + sum P               O = O * 2^(m - m') + P x values
//     in the end:      O / l
//
// Every row's keys are cut into parts of 256, always at the same places; each has its O, m and l, and they are merged
// from the first to the last. A prompt's item does so as it goes along; of a sequence that decodes each part is an item,
// and of one that runs a few tokens behind many, for all threads to have work (split-KV). So a row's result is the same
// bits in a prompt, a chunk and a decode, whatever runs beside it. Scores are scaled by log2(e), so that 2^x takes the
// place of e^x.
//
// H_q / H_kv query / key-value heads, G = H_q / H_kv, D head size (a multiple of 16).
#pragma once

#include "plan.hpp"
#include "team.hpp"
#include "tile_copies.hpp"

#include <algorithm>

namespace attention {

constexpr float LOWEST = -1e30f;        // below every score

// What a thread works in: rows are the item's query tokens x query heads, those of one KV head together.
template <class Kind> struct Scratch {
    typedef typename Kind::element element;
    element *q, *k, *v, *p;
    float *s, *alpha;
    float *o, *m, *l;                           // of the part
    float *merged_o, *merged_m, *merged_l;      // of the parts before it

    Scratch(Workspace& workspace, const Shape& shape) {
        constexpr int per = Kind::per_element;
        const long D = shape.head_dim, num_rows = std::max(ROWS, shape.num_heads);
        q = workspace.take<element>(num_rows * D / per);
        k = workspace.take<element>(KEYS * D / per);
        v = workspace.take<element>(KEYS * D / per);
        p = workspace.take<element>(num_rows * KEYS / per);
        s = workspace.take<float>(num_rows * KEYS);
        o = workspace.take<float>(num_rows * D);
        m = workspace.take<float>(num_rows);
        l = workspace.take<float>(num_rows);
        alpha = workspace.take<float>(num_rows);
        merged_o = workspace.take<float>(num_rows * D);
        merged_m = workspace.take<float>(num_rows);
        merged_l = workspace.take<float>(num_rows);
    }
};

// Where the keys [first, first + count) of a sequence lie in the cache, in elements.
static inline void find(const int32_t* table, int first, int count, int block_size, long slot_size, long* slots) {
    const int32_t* block = table + first / block_size;
    int within = first % block_size;
    for (int j = 0; j < count; block++, within = 0)
        for (const long start = (long)*block * block_size; within < block_size && j < count; within++)
            slots[j++] = (start + within) * slot_size;
}

// Read a first tile that nobody has fetched once from end to end, one number per cache line: many lines are on their way
// from memory at a time, which the strided reads of the copies do not achieve.
template <class T> static inline void touch(const T* cache, const long* slots, int num_keys, int width) {
    uint32_t seen = 0;
    for (int j = 0; j < num_keys; j++)
        for (int d = 0; d < width; d += 64 / (int)sizeof(T)) seen += load_as<uint32_t>(cache + slots[j] + d);
    asm volatile("" : : "r"(seen));     // the compiler must not find out that nobody needs it
}

// S * scale -> P, with the rows' m, l and alpha brought up to date. `columns` is a multiple of 16; `position` is the
// first row's: its own key is the last that it sees, and every `rows_per_token` rows later it is one more.
template <class Kind>
static void softmax_rows(const Scratch<Kind>& scratch, const Shape& shape, int first_row, int num_rows,
                         int rows_per_token, int position, int first_key, int columns, bool masked) {
    const float factor = shape.scale * LOG2E;
    for (int r = first_row; r < first_row + num_rows; r++) {
        float* s = scratch.s + r * KEYS;
        if (masked) {
            const int last = position + (r - first_row) / rows_per_token;
            for (int j = 0; j < columns; j++) {
                const int key = first_key + j;
                const bool visible = key <= last
                    && (!shape.window || key > last - shape.window || key < shape.num_sinks);
                s[j] = visible ? s[j] : LOWEST / factor;
            }
        }
        vf highest = splat(scratch.m[r]);
        for (int j = 0; j < columns; j += VL) highest = max(highest, load(s + j) * factor);
        const float m = max(highest);
        vf total{};
        for (int j = 0; j < columns; j += VL) {
            vf x = load(s + j) * factor;
            vf p = exp2(x - m);
            if (masked) p = x < LOWEST / 2 ? vf{} : p;         // NaN stays NaN: a wrong answer must not look right
            store(s + j, p);
            total += p;
        }
        scratch.alpha[r] = exp2(splat(scratch.m[r] - m))[0];
        scratch.l[r] = scratch.l[r] * scratch.alpha[r] + sum(total);
        scratch.m[r] = m;
        copy_probabilities(Kind{}, scratch.p + r * (KEYS / Kind::per_element), s, columns);
    }
}

// A part behind the merged ones: the highest m decides, both are scaled to it. Nothing changes where it has no keys.
static inline void merge_row(float* o, float& m, float& l, const float* part_o, float part_m, float part_l,
                             int head_dim) {
    if (part_l == 0) return;
    const float highest = std::max(m, part_m);
    const vf ours = exp2(splat(m - highest)), theirs = exp2(splat(part_m - highest));
    for (int d = 0; d < head_dim; d += VL) store(o + d, multiply_add(load(o + d) * ours, load(part_o + d), theirs));
    l = l * ours[0] + part_l * theirs[0];
    m = highest;
}

template <class Out> static inline void finish_row(const float* o, float l, Out* to, int head_dim) {
    for (int d = 0; d < head_dim; d += VL) store(to + d, load(o + d) * (1.0f / l));
}

template <class Kind> static void begin_part(const Scratch<Kind>& scratch, int num_rows, int head_dim) {
    std::fill_n(scratch.m, num_rows, LOWEST);
    std::fill_n(scratch.l, num_rows, 0.0f);
    std::fill_n(scratch.o, num_rows * head_dim, 0.0f);
}

template <class Kind> static void merge_part(const Scratch<Kind>& scratch, bool first, int num_rows, int head_dim) {
    if (first) {
        std::memcpy(scratch.merged_o, scratch.o, sizeof(float) * num_rows * head_dim);
        std::memcpy(scratch.merged_m, scratch.m, sizeof(float) * num_rows);
        std::memcpy(scratch.merged_l, scratch.l, sizeof(float) * num_rows);
        return;
    }
    for (int r = 0; r < num_rows; r++)
        merge_row(scratch.merged_o + r * head_dim, scratch.merged_m[r], scratch.merged_l[r], scratch.o + r * head_dim,
                  scratch.m[r], scratch.l[r], head_dim);
}

// Where a tile lies in the cache: its keys, and the heads of them that are used.
struct Place {
    long slots[KEYS];
    int count = 0, first_head = 0, num_heads = 0;
    int first_key = -1;         // -1: of no tile

    void clear() { count = 0, first_key = -1; }
    // The tile of an item that begins with the key `first`.
    void find(const Item& item, int first, const Shape& shape, const Batch& batch) {
        if (first == first_key) return;
        first_key = first, first_head = item.first_head, num_heads = item.num_heads;
        count = std::max(0, std::min(KEYS, item.end_key - first));
        attention::find(batch.block_table + item.sequence * batch.max_blocks, first, count, shape.block_size,
                        (long)shape.num_kv_heads * shape.head_dim, slots);
    }
    template <class T> Rows<T> rows(const T* cache, int head, int head_dim) const {
        return {cache + (first_head + head) * head_dim, slots, count};
    }
    // What is fetched of it in one of so many turns.
    template <class T> Ahead<T> turn(int i, int num_turns, const T* k_cache, const T* v_cache, int head_dim) const {
        const int offset = first_head * head_dim;
        return {k_cache + offset, v_cache + offset, slots, count * i / num_turns, count * (i + 1) / num_turns,
                num_heads * head_dim};
    }
};

// parts: [number][H_q][2 + D], m and l before O. With its last tile, the first one of the `next` item is fetched (null: of
// none), as this one's was if `is_fetched`.
template <class T, class Out, class Kind>
static void run_item(const Item& item, const Item* next, bool is_fetched, const Shape& shape, const Batch& batch,
                     const T* q, long q_stride, const T* k_cache, const T* v_cache, Out* out, float* parts,
                     const Scratch<Kind>& scratch) {
    constexpr int per = Kind::per_element;
    const int D = shape.head_dim, G = shape.num_heads / shape.num_kv_heads;
    const int rows_per_head = item.num_tokens * G, num_rows = item.num_heads * rows_per_head;
    const int first_token = batch.query_start_loc[item.sequence] + item.first_token;
    const int num_new = batch.query_start_loc[item.sequence + 1] - batch.query_start_loc[item.sequence];
    const int position = batch.seq_lens[item.sequence] - num_new + item.first_token;
    Place places[2], *here = &places[0], *ahead = &places[1];
    // Row r is query head `head_of(r)` of the step's token `token_of(r)`.
    auto token_of = [&](int r) { return first_token + r % rows_per_head / G; };
    auto head_of = [&](int r) { return (item.first_head + r / rows_per_head) * G + r % G; };

    for (int r = 0; r < num_rows; r++)
        copy_query(Kind{}, scratch.q + r * (D / per), q + token_of(r) * q_stride + head_of(r) * D, D);
    begin_part(scratch, num_rows, D);

    for (int first = item.first_key; first < item.end_key; first += KEYS) {
        if (first > item.first_key && first % PART == 0) {
            merge_part(scratch, first == PART, num_rows, D);
            begin_part(scratch, num_rows, D);
        }
        const int num_keys = std::min(KEYS, item.end_key - first), columns = (num_keys + 15) / 16 * 16;
        const bool behind_window = shape.window && first + num_keys <= position - shape.window + 1;
        if (behind_window && first >= shape.num_sinks) continue;
        // Every row sees the whole tile where it ends at or before the first row's position, and no window cuts it.
        const bool masked = columns > num_keys || first + num_keys - 1 > position || shape.window;
        here->find(item, first, shape, batch);
        const bool is_last = first + KEYS >= item.end_key;
        ahead->clear();
        if (!is_last) ahead->find(item, first + KEYS, shape, batch);
        else if (next) ahead->find(*next, next->first_key, shape, batch);
        // All heads of a tile, then the next tile: the cache is read in the order in which it lies in memory.
        if (first == item.first_key && !is_fetched) {
            touch(k_cache + item.first_head * D, here->slots, num_keys, item.num_heads * D);
            touch(v_cache + item.first_head * D, here->slots, num_keys, item.num_heads * D);
        }
        for (int h = 0; h < item.num_heads; h++) {
            const int row = h * rows_per_head;
            const Rows<T> k_rows = here->rows(k_cache, h, D), v_rows = here->rows(v_cache, h, D);
            auto fetching = ahead->turn(h, item.num_heads, k_cache, v_cache, D);
            copy_keys(Kind{}, scratch.k, k_rows, fetching, D);
            fetching.fetch_between(D);
            multiply<Kind>(rows_per_head, columns, D / per, scratch.q + row * (D / per), D / per,
                           scratch.k, KEYS, scratch.s + row * KEYS, KEYS, nullptr);
            fetching.fetch_between(D);
            softmax_rows<Kind>(scratch, shape, row, rows_per_head, G, position, first, columns, masked);
            copy_values(Kind{}, scratch.v, v_rows, fetching, D);
            fetching.fetch_rest();
            multiply<Kind>(rows_per_head, D, (num_keys + per - 1) / per, scratch.p + row * (KEYS / per),
                           KEYS / per, scratch.v, D, scratch.o + row * D, D, scratch.alpha + row);
        }
        std::swap(here, ahead);
    }
    const bool merged = item.merge < 0 && item.end_key > PART;
    if (merged) merge_part(scratch, false, num_rows, D);
    for (int r = 0; r < num_rows; r++) {
        if (item.merge >= 0) {
            const long number = item.part + token_of(r) - first_token;
            float* part = parts + (number * shape.num_heads + head_of(r)) * (2 + D);
            part[0] = scratch.m[r];
            part[1] = scratch.l[r];
            std::memcpy(part + 2, scratch.o + r * D, sizeof(float) * D);
        } else {
            finish_row((merged ? scratch.merged_o : scratch.o) + r * D, (merged ? scratch.merged_l : scratch.l)[r],
                       out + ((long)token_of(r) * shape.num_heads + head_of(r)) * D, D);
        }
    }
}

template <class Out>
static void run_merge(const Merge& merge, const Shape& shape, const Batch& batch, const float* parts, Out* out) {
    const int D = shape.head_dim, G = shape.num_heads / shape.num_kv_heads;
    const long size = (long)shape.num_heads * (2 + D);              // of a part
    const int first_token = batch.query_start_loc[merge.sequence] + merge.first_token;
    for (int t = 0; t < merge.num_tokens; t++)
        for (int head = merge.first_head * G; head < (merge.first_head + merge.num_heads) * G; head++) {
            const float* part = parts + (merge.first_part + t) * size + head * (2 + D);
            float m = part[0], l = part[1], o[MAX_HEAD_DIM];
            std::memcpy(o, part + 2, sizeof(float) * D);
            for (int i = 1; i < merge.num_parts; i++) {
                const float* next = part + i * merge.num_tokens * size;
                merge_row(o, m, l, next + 2, next[0], next[1], D);
            }
            finish_row(o, l, out + ((long)(first_token + t) * shape.num_heads + head) * D, D);
        }
}

// The kind of arithmetic for a type.
template <class T> struct KindOf { typedef Singles type; };
#ifdef HAVE_PAIRS
template <> struct KindOf<bf16> { typedef Pairs type; };
#endif

// A step's plan, and the memory for its threads. Good for nothing where the workspace does not fit.
template <class T> struct Work {
    typedef typename KindOf<T>::type Kind;
    Plan plan;
    std::atomic<int>* done;             // parts of each merge, counted on from layer to layer
    float* parts;
    char* scratch;
    int64_t scratch_size;               // of one thread

    Work(Workspace& workspace, const Shape& shape, const Batch& batch, int num_threads) {
        Plan counted;
        cut(counted, shape, batch, num_threads);
        plan.items = workspace.take<Item>(counted.num_items);
        plan.merges = workspace.take<Merge>(counted.num_merges);
        done = workspace.take<std::atomic<int>>(counted.num_merges);
        parts = workspace.take<float>((int64_t)counted.num_parts * shape.num_heads * (2 + shape.head_dim));
        Workspace one{};
        Scratch<Kind>(one, shape);
        scratch_size = one.used;
        scratch = workspace.take<char>(scratch_size * num_threads);
        if (!workspace.fits()) return;
        cut(plan, shape, batch, num_threads);
        for (int i = 0; i < plan.num_merges; i++) new (done + i) std::atomic<int>(0);
    }

    Scratch<Kind> scratch_of(int thread, const Shape& shape) const {
        Workspace own{scratch + scratch_size * thread, scratch_size};
        return Scratch<Kind>(own, shape);
    }
};

// All members of a team call this, no more of them than `work` is for.
template <class T, class Out>
static void share(Member& member, const Work<T>& work, const Shape& shape, const Batch& batch, const T* q,
                  long q_stride, const T* k_cache, const T* v_cache, Out* out) {
    typedef typename KindOf<T>::type Kind;
    const Plan& plan = work.plan;
    const Scratch<Kind> scratch = work.scratch_of(member.thread, shape);
    // The last items of a prompt are the longest: they go first, so that nobody waits for one at the end. Where they take
    // turns, a thread can tell which one it will have next.
    auto item_of = [&](int i) { return i < plan.num_items ? &plan.items[plan.num_items - 1 - i] : nullptr; };
    const Item* fetched = nullptr;
    member.share_in_order(plan.num_items, [&](int first, int last) {
        for (int i = first; i < last; i++) {
            const Item &item = *item_of(i), *next = item_of(i + 1 < last ? i + 1 : i + member.team.num_threads);
            run_item<T, Out, Kind>(item, next, fetched == &item, shape, batch, q, q_stride, k_cache, v_cache, out,
                                   work.parts, scratch);
            fetched = next;
            if (item.merge < 0) continue;
            const Merge& merge = plan.merges[item.merge];
            if ((work.done[item.merge].fetch_add(1, std::memory_order_acq_rel) + 1) % merge.num_parts == 0)
                run_merge(merge, shape, batch, work.parts, out);
        }
    });
}

}  // namespace attention
