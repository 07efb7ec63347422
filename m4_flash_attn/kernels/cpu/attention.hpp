// Attention over a paged KV cache, prefill and decode in one kernel: the online softmax, tile by tile.
//
//     one item of work = one sequence x one KV head x some query tokens       (prefill)
//                      = one sequence x all KV heads x a range of keys        (decode)
//
//     keys   [ tile 0 | tile 1 | tile 2 | .. ]        64 keys each, copied together from wherever their blocks lie
//     rows   the item's query tokens x the G query heads that share the KV head: they read each tile together
//
//     for each tile:   S = rows x keys      m' = max(m, S)      P = 2^(S - m')
//                      l = l * 2^(m - m') + sum P               O = O * 2^(m - m') + P x values
//     in the end:      O / l
//
// A long sequence that decodes is cut into ranges of keys, for all threads to have work (split-KV); their O, m and l
// are merged exactly. Scores are scaled by log2(e), so that 2^x takes the place of e^x.
//
// H_q / H_kv query / key-value heads, G = H_q / H_kv, D head size (a multiple of 16).
#pragma once

#include "plan.hpp"
#include "threads.hpp"
#include "tiles.hpp"

#include <algorithm>

namespace attention {

constexpr float LOWEST = -1e30f;        // below every score

// What a thread works in: rows are the item's query tokens x query heads, those of one KV head together.
template <class Kind> struct Scratch {
    typedef typename Kind::element element;
    element *q, *k, *v, *p;
    float *s, *o, *m, *l, *alpha;

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
    }
};

// One head's keys, or values, of a tile: where they lie in the cache.
template <class T> struct Rows {
    const T* at[KEYS];
    int count;

    Rows(const T* cache, const long* slots, int num_keys) : count(num_keys) {
        for (int j = 0; j < num_keys; j++) at[j] = cache + slots[j];
    }
};

// ---- copying queries, keys and values into tiles: keys transposed, [D][KEYS]; values as they are, [KEYS][D]
//
// For each row that is copied, one of the next tile is fetched (`ahead`). Evenly spread, fetching costs nothing; all of
// the next tile at once would fill the queue of outstanding cache lines, and the copy would wait behind it.

template <class T> static void copy_query(Singles, float* to, const T* from, int head_dim) {
    for (int d = 0; d < head_dim; d += VL) store(to + d, load(from + d));
}

template <class T> static inline void fetch(const Rows<T>& ahead, int j, int head_dim) {
    if (j >= ahead.count) return;
    for (int d = 0; d < head_dim; d += 64 / (int)sizeof(T)) __builtin_prefetch(ahead.at[j] + d);
}

template <class T>
static void copy_keys(Singles, float* to, const Rows<T>& rows, const Rows<T>& ahead, int head_dim) {
    for (int j = 0; j < rows.count; j++) {
        fetch(ahead, j, head_dim);
        for (int d = 0; d < head_dim; d += VL) {
            vf x = load(rows.at[j] + d);
            for (int i = 0; i < VL; i++) to[(d + i) * KEYS + j] = x[i];
        }
    }
    for (int d = 0; d < head_dim; d++)
        for (int j = rows.count; j < KEYS; j++) to[d * KEYS + j] = 0;
}

template <class T>
static void copy_values(Singles, float* to, const Rows<T>& rows, const Rows<T>& ahead, int head_dim) {
    for (int j = 0; j < rows.count; j++) {
        fetch(ahead, j, head_dim);
        for (int d = 0; d < head_dim; d += VL) store(to + j * head_dim + d, load(rows.at[j] + d));
    }
}

static void copy_probabilities(Singles, float* to, const float* from, int columns) {
    for (int j = 0; j < columns; j += VL) store(to + j, load(from + j));
}

#ifdef HAVE_PAIRS
static void copy_query(Pairs, uint32_t* to, const bf16* from, int head_dim) { std::memcpy(to, from, 2 * head_dim); }

// 16 x 16 numbers of 32 bits: rows become columns.
static inline void transpose(__m512i (&x)[16]) {
    __m512i y[16];
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    for (int i = 0; i < 4; i++)
        for (int h = 0; h < 2; h++) {
            x[4 * i + 2 * h] = _mm512_unpacklo_epi64(y[4 * i + h], y[4 * i + 2 + h]);
            x[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(y[4 * i + h], y[4 * i + 2 + h]);
        }
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(x[i], x[4 + i], 0xdd);
        y[8 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(x[8 + i], x[12 + i], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        x[i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
        x[4 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
        x[8 + i] = _mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
        x[12 + i] = _mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
    }
}

// [D / 2][KEYS] pairs of neighbouring dimensions.
static void copy_keys(Pairs, uint32_t* to, const Rows<bf16>& rows, const Rows<bf16>& ahead, int head_dim) {
    const int num_keys = rows.count, num_ahead = ahead.count;
    for (int first = 0; first < num_keys; first += 16)
        for (int d = 0; d < head_dim / 2; d += 16) {
            int width = std::min(16, head_dim / 2 - d);
            __mmask16 mask = (1u << width) - 1;
            __m512i x[16];
            for (int j = 0; j < 16; j++)
                x[j] = first + j < num_keys
                    ? _mm512_maskz_loadu_epi32(mask, (const uint32_t*)rows.at[first + j] + d) : _mm512_setzero_si512();
            for (int j = first; j < first + 16 && j < num_ahead; j++) __builtin_prefetch(ahead.at[j] + 2 * d);
            transpose(x);
            for (int i = 0; i < width; i++) _mm512_storeu_si512(to + (d + i) * KEYS + first, x[i]);
        }
}

// [KEYS / 2][D] pairs of neighbouring keys.
static void copy_values(Pairs, uint32_t* to, const Rows<bf16>& rows, const Rows<bf16>& ahead, int head_dim) {
    const int num_keys = rows.count, num_ahead = ahead.count;      // the stores might change them, for all g++ knows
    for (int j = 0; j < num_keys; j += 2)
        for (int d = 0; d < head_dim; d += 16) {
            if (d % 32 == 0 && j < num_ahead) {
                __builtin_prefetch(ahead.at[j] + d);
                __builtin_prefetch(ahead.at[std::min(j + 1, num_ahead - 1)] + d);
            }
            vu low = __builtin_convertvector(load_as<vh>(rows.at[j] + d), vu);
            vu high = j + 1 < num_keys ? __builtin_convertvector(load_as<vh>(rows.at[j + 1] + d), vu) : vu{};
            vu both = low | high << 16;
            std::memcpy(to + j / 2 * head_dim + d, &both, sizeof(both));
        }
}

static void copy_probabilities(Pairs, uint32_t* to, const float* from, int columns) {
    for (int j = 0; j < columns; j += 16) store((bf16*)to + j, load(from + j));
}
#endif

// ---- one item

static inline long slot_of(const int32_t* table, int key, int block_size) {
    return (long)table[key / block_size] * block_size + key % block_size;
}

// Read an item's first tile once from end to end, one number per cache line: many lines are on their way from memory at
// a time, which the strided reads of the copies do not achieve. The tiles after it are fetched by the copies.
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

template <class T, class Kind>
static void run_item(const Item& item, const Shape& shape, const Batch& batch, const T* q, long q_stride,
                     const T* k_cache, const T* v_cache, T* out, float* parts, const Scratch<Kind>& scratch) {
    constexpr int per = Kind::per_element;
    const int D = shape.head_dim, G = shape.num_heads / shape.num_kv_heads;
    const int rows_per_head = item.num_tokens * G, num_rows = item.num_heads * rows_per_head;
    const long slot_size = (long)shape.num_kv_heads * D;
    const int first_token = batch.query_start_loc[item.sequence] + item.first_token;
    const int num_new = batch.query_start_loc[item.sequence + 1] - batch.query_start_loc[item.sequence];
    const int position = batch.seq_lens[item.sequence] - num_new + item.first_token;
    const int32_t* table = batch.block_table + item.sequence * batch.max_blocks;
    // Row r is query head `head_of(r)` of the step's token `token_of(r)`.
    auto token_of = [&](int r) { return first_token + r % rows_per_head / G; };
    auto head_of = [&](int r) { return (item.first_head + r / rows_per_head) * G + r % G; };

    for (int r = 0; r < num_rows; r++)
        copy_query(Kind{}, scratch.q + r * (D / per), q + token_of(r) * q_stride + head_of(r) * D, D);
    std::fill_n(scratch.m, num_rows, LOWEST);
    std::fill_n(scratch.l, num_rows, 0.0f);
    std::fill_n(scratch.o, num_rows * D, 0.0f);

    for (int first = item.first_key; first < item.end_key; first += KEYS) {
        const int num_keys = std::min(KEYS, item.end_key - first), columns = (num_keys + 15) / 16 * 16;
        const bool behind_window = shape.window && first + num_keys <= position - shape.window + 1;
        if (behind_window && first >= shape.num_sinks) continue;
        // Every row sees the whole tile where it ends at or before the first row's position, and no window cuts it.
        const bool masked = columns > num_keys || first + num_keys - 1 > position || shape.window;
        const int num_ahead = std::max(0, std::min(KEYS, item.end_key - first - KEYS));
        long slots[2 * KEYS];
        for (int j = 0; j < num_keys + num_ahead; j++)
            slots[j] = slot_of(table, first + j, shape.block_size) * slot_size;
        // All heads of a tile, then the next tile: the cache is read in the order in which it lies in memory.
        if (first == item.first_key) {
            touch(k_cache + item.first_head * D, slots, num_keys, item.num_heads * D);
            touch(v_cache + item.first_head * D, slots, num_keys, item.num_heads * D);
        }
        for (int h = 0; h < item.num_heads; h++) {
            const int row = h * rows_per_head;
            const T *k_head = k_cache + (item.first_head + h) * D, *v_head = v_cache + (item.first_head + h) * D;
            const Rows<T> k_rows(k_head, slots, num_keys), k_ahead(k_head, slots + KEYS, num_ahead);
            const Rows<T> v_rows(v_head, slots, num_keys), v_ahead(v_head, slots + KEYS, num_ahead);
            copy_keys(Kind{}, scratch.k, k_rows, k_ahead, D);
            multiply<Kind>(rows_per_head, columns, D / per, scratch.q + row * (D / per), D / per,
                           scratch.k, KEYS, scratch.s + row * KEYS, KEYS, nullptr);
            softmax_rows<Kind>(scratch, shape, row, rows_per_head, G, position, first, columns, masked);
            copy_values(Kind{}, scratch.v, v_rows, v_ahead, D);
            multiply<Kind>(rows_per_head, D, (num_keys + per - 1) / per, scratch.p + row * (KEYS / per),
                           KEYS / per, scratch.v, D, scratch.o + row * D, D, scratch.alpha + row);
        }
    }
    for (int r = 0; r < num_rows; r++) {
        if (item.part >= 0) {
            float* part = parts + ((long)item.part * num_rows + r) * (D + 2);
            part[0] = scratch.m[r];
            part[1] = scratch.l[r];
            std::memcpy(part + 2, scratch.o + r * D, 4 * D);
        } else {
            T* to = out + ((long)token_of(r) * shape.num_heads + head_of(r)) * D;
            for (int d = 0; d < D; d += VL) store(to + d, load(scratch.o + r * D + d) * (1.0f / scratch.l[r]));
        }
    }
}

// The parts of one sequence's new token: the highest m decides, everybody is scaled to it.
template <class T>
static void run_merge(const Merge& merge, const Shape& shape, const Batch& batch, const float* parts, T* out) {
    const int D = shape.head_dim;
    const long stride = (long)shape.num_heads * (D + 2);
    for (int head = 0; head < shape.num_heads; head++) {
        const float* first = parts + merge.first_part * stride + head * (D + 2);
        float m = LOWEST, l = 0, o[MAX_HEAD_DIM] = {};
        for (int i = 0; i < merge.num_parts; i++) m = std::max(m, first[i * stride]);
        for (int i = 0; i < merge.num_parts; i++) {
            const float* part = first + i * stride;
            const float factor = exp2(splat(part[0] - m))[0];
            l += part[1] * factor;
            for (int d = 0; d < D; d++) o[d] += part[2 + d] * factor;
        }
        T* to = out + ((long)batch.query_start_loc[merge.sequence] * shape.num_heads + head) * D;
        for (int d = 0; d < D; d += VL) store(to + d, load(o + d) * (1.0f / l));
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
    float* parts;
    char* scratch;
    int64_t scratch_size;               // of one thread

    Work(Workspace& workspace, const Shape& shape, const Batch& batch, int num_threads) {
        Plan counted;
        cut(counted, shape, batch, num_threads);
        plan.items = workspace.take<Item>(counted.num_items);
        plan.merges = workspace.take<Merge>(counted.num_merges);
        parts = workspace.take<float>((int64_t)counted.num_parts * shape.num_heads * (shape.head_dim + 2));
        Workspace one{};
        Scratch<Kind>(one, shape);
        scratch_size = one.used;
        scratch = workspace.take<char>(scratch_size * num_threads);
        if (workspace.fits()) cut(plan, shape, batch, num_threads);
    }

    // Of the thread that asks.
    Scratch<Kind> own_scratch(const Shape& shape) const {
        Workspace own{scratch + scratch_size * omp_get_thread_num(), scratch_size};
        return Scratch<Kind>(own, shape);
    }
};

// All threads of a parallel region call this, no more of them than `work` is for. A barrier ends it.
template <class T>
static void share(const Work<T>& work, const Shape& shape, const Batch& batch, const T* q, long q_stride,
                  const T* k_cache, const T* v_cache, T* out) {
    typedef typename KindOf<T>::type Kind;
    const Plan& plan = work.plan;
    const Scratch<Kind> scratch = work.own_scratch(shape);
    // The last items of a prompt are the longest: they go first, so that nobody waits for one at the end.
#pragma omp for schedule(dynamic)
    for (int i = plan.num_items - 1; i >= 0; i--)
        run_item<T, Kind>(plan.items[i], shape, batch, q, q_stride, k_cache, v_cache, out, work.parts, scratch);
    if (plan.num_merges > 0) {
#pragma omp for schedule(static)
        for (int i = 0; i < plan.num_merges; i++) run_merge<T>(plan.merges[i], shape, batch, work.parts, out);
    }
}

}  // namespace attention
