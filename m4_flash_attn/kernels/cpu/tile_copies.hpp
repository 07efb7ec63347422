// Queries, keys and values on their way into tiles: keys transposed, [D][KEYS]; values as they are, [KEYS][D].
//
// Meanwhile the next tile is fetched (`ahead`), some lines at a time from the first copy to the last product: a processor
// has room for some twenty that are on their way, and one more would hold up what it computes. They are fetched in the
// order in which they lie in memory, whichever heads they belong to, so that its own prefetching joins in.
#pragma once

#include "plan.hpp"
#include "tiles.hpp"

#include <algorithm>

namespace attention {

// One head's keys, or values, of a tile: where they lie in the cache.
template <class T> struct Rows {
    const T* cache;
    const long* slots;
    int count;

    inline const T* at(int j) const { return cache + slots[j]; }
};

// What is fetched of the next tile while a head is computed: some keys, then their values, all heads side by side.
template <class T> struct Ahead {
    static constexpr int LINE = 64 / (int)sizeof(T);
    const T *cache, *then;
    const long* slots;
    int first, end, width;      // `width` elements of each of the keys [first, end)
    int key = first, lines = 0; // the next one; lines that may be fetched

    inline void fetch(int num_lines) {
        lines += num_lines;
        while (lines > 0) {
            if (key == end) {
                if (!then || first == end) return;
                cache = then, then = nullptr, key = first;
            }
            const T* from = cache + slots[key++];
            for (int d = 0; d < width; d += LINE, lines--) __builtin_prefetch(from + d);
        }
    }
    // Between the copies, more than half of a whole tile's lines.
    inline void fetch_between(int head_dim) { fetch(KEYS * head_dim / LINE * 9 / 32); }
    inline void fetch_rest() { fetch(1 << 20); }
};

template <class T> static void copy_query(Singles, float* to, const T* from, int head_dim) {
    for (int d = 0; d < head_dim; d += VL) store(to + d, load(from + d));
}

template <class T>
static void copy_keys(Singles, float* to, const Rows<T>& rows, Ahead<T>& ahead, int head_dim) {
    for (int j = 0; j < rows.count; j++) {
        ahead.fetch(head_dim / ahead.LINE / 2);
        if (j % VL < VL - 1 && j < rows.count - 1) continue;
        const int first = j / VL * VL;
        for (int d = 0; d < head_dim; d += VL) {        // VL x VL numbers: rows become columns
            vf x[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) x[i] = first + i <= j ? load(rows.at(first + i) + d) : vf{};
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
static void copy_values(Singles, float* to, const Rows<T>& rows, Ahead<T>& ahead, int head_dim) {
    for (int j = 0; j < rows.count; j++) {
        ahead.fetch(head_dim / ahead.LINE / 2);
        for (int d = 0; d < head_dim; d += VL) store(to + j * head_dim + d, load(rows.at(j) + d));
    }
}

static void copy_probabilities(Singles, float* to, const float* from, int columns) {
    for (int j = 0; j < columns; j += VL) store(to + j, load(from + j));
}

#ifdef HAVE_PAIRS
static void copy_query(Pairs, uint32_t* to, const bf16* from, int head_dim) { std::memcpy(to, from, 2 * head_dim); }

// [D / 2][KEYS] pairs of neighbouring dimensions.
static void copy_keys(Pairs, uint32_t* to, const Rows<bf16>& rows, Ahead<bf16>& ahead, int head_dim) {
    const int num_keys = rows.count;
    for (int first = 0; first < num_keys; first += 16)
        for (int d = 0; d < head_dim / 2; d += 16) {
            const int width = std::min(16, head_dim / 2 - d);
            ahead.fetch(10);            // of the 16 that are copied; the others between the copies
            const __mmask16 mask = (1u << width) - 1;
            vf x[16];
#pragma GCC unroll 16
            for (int j = 0; j < 16; j++)
                x[j] = first + j < num_keys
                    ? (vf)_mm512_maskz_loadu_epi32(mask, (const uint32_t*)rows.at(first + j) + d) : vf{};
            transpose(x);
            for (int i = 0; i < width; i++) store((float*)to + (d + i) * KEYS + first, x[i]);
        }
}

// [KEYS / 2][D] pairs of neighbouring keys.
static void copy_values(Pairs, uint32_t* to, const Rows<bf16>& rows, Ahead<bf16>& ahead, int head_dim) {
    alignas(64) static constexpr uint16_t LOW[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                     8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i low = _mm512_load_si512(LOW), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const int num_keys = rows.count;            // the stores might change it, for all g++ knows
    for (int j = 0; j < num_keys; j += 2) {
        const bf16 *even = rows.at(j), *odd = j + 1 < num_keys ? rows.at(j + 1) : nullptr;
        uint32_t* place = to + j / 2 * head_dim;
        for (int d = 0; d < head_dim; d += 32) {
            ahead.fetch(1);
            const bool whole = d + 32 <= head_dim;
            const __mmask32 mask = whole ? 0xffffffffu : 0xffffu;
            const __m512i a = _mm512_maskz_loadu_epi16(mask, even + d);
            const __m512i b = odd ? _mm512_maskz_loadu_epi16(mask, odd + d) : _mm512_setzero_si512();
            _mm512_storeu_si512(place + d, _mm512_permutex2var_epi16(a, low, b));
            if (whole) _mm512_storeu_si512(place + d + 16, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

static void copy_probabilities(Pairs, uint32_t* to, const float* from, int columns) {
    for (int j = 0; j < columns; j += 16) store((bf16*)to + j, load(from + j));
}
#endif

}  // namespace attention
