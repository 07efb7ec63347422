// Queries, keys and values on their way into tiles: keys transposed, [D][KEYS]; values as they are, [KEYS][D].
//
// For each row that is copied, one of the next tile is fetched (`ahead`). Evenly spread, fetching costs nothing; all of
// the next tile at once would fill the queue of outstanding cache lines, and the copy would wait behind it.
#pragma once

#include "plan.hpp"
#include "tiles.hpp"

#include <algorithm>

namespace attention {

// One head's keys, or values, of a tile: where they lie in the cache.
template <class T> struct Rows {
    const T* at[KEYS];
    int count;

    Rows(const T* cache, const long* slots, int num_keys) : count(num_keys) {
        for (int j = 0; j < num_keys; j++) at[j] = cache + slots[j];
    }
};

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
        if (j % VL < VL - 1 && j < rows.count - 1) continue;
        const int first = j / VL * VL;
        for (int d = 0; d < head_dim; d += VL) {        // VL x VL numbers: rows become columns
            vf x[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) x[i] = first + i <= j ? load(rows.at[first + i] + d) : vf{};
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) store(to + (d + i) * KEYS + first, x[i]);
        }
    }
    // The product runs over whole registers: what no key fills is 0.
    for (int d = 0; d < head_dim; d++)
        for (int j = (rows.count + VL - 1) / VL * VL; j < KEYS; j += VL) store(to + d * KEYS + j, vf{});
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

// [D / 2][KEYS] pairs of neighbouring dimensions.
static void copy_keys(Pairs, uint32_t* to, const Rows<bf16>& rows, const Rows<bf16>& ahead, int head_dim) {
    const int num_keys = rows.count, num_ahead = ahead.count;
    for (int first = 0; first < num_keys; first += 16)
        for (int d = 0; d < head_dim / 2; d += 16) {
            int width = std::min(16, head_dim / 2 - d);
            __mmask16 mask = (1u << width) - 1;
            vf x[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++)
                x[j] = first + j < num_keys
                    ? (vf)_mm512_maskz_loadu_epi32(mask, (const uint32_t*)rows.at[first + j] + d) : vf{};
            for (int j = first; j < first + 16 && j < num_ahead; j++) __builtin_prefetch(ahead.at[j] + 2 * d);
            transpose(x);
            for (int i = 0; i < width; i++) store((float*)to + (d + i) * KEYS + first, x[i]);
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

}  // namespace attention
