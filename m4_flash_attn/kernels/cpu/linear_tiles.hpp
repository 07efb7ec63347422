// A tile of a product: some rows of x and some panels of weights, whose sums stay in registers while K runs.
//
//     tall    many rows x one panel       each weight that is read serves all of them
//     wide    few rows x several panels   one panel's sums are too few: each addition would wait for the one before
//
// Either way a number of y is one chain of sums, in the order of K.
#pragma once

#include "formats.hpp"

#include <algorithm>
#include <type_traits>

namespace linear {

constexpr int64_t LEAD = 8 << 10;           // bytes to fetch ahead where one tile is all that uses a panel

// f(index) for index = 0, BY, 2 BY, .. below COUNT, each known while compiling.
template <int COUNT, int BY, int I = 0, class F> static inline __attribute__((always_inline)) void steps(F&& f) {
    if constexpr (I < COUNT) {
        f(std::integral_constant<int, I>{});
        steps<COUNT, BY, I + BY>(f);
    }
}

// Runs through the packed weights ahead of their use, one cache line at a time.
struct Fetch {
    const char* next;
    const char* end;
    inline void until(const char* goal) {
        for (goal = std::min(goal, end); next < goal; next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// sums [ROWS][PANELS x PANEL] += x [ROWS] x the panels' columns, for the elements [k, end) of K; the sums begin at 0
// where these are the `first`. `ahead(k)` is called every few elements.
template <class Panel, int ROWS, int PANELS, class Ahead>
static inline __attribute__((always_inline)) void tile(const typename Panel::Arithmetic::element* x, int64_t x_stride,
                                                       const Panel* panels, int64_t k, int64_t end, float* sums,
                                                       bool first, Ahead&& ahead) {
    typedef typename Panel::Arithmetic A;
    constexpr int STEP = Panel::STEP, COLUMNS = 2 * PANELS, ROUND = 4 * A::elements;
    vf chains[ROWS][COLUMNS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) chains[r][c] = first ? vf{} : load(sums + (r * COLUMNS + c) * VL);
    const typename A::element* rows[(ROWS + 2) / 3];        // every third row's: the two after it are an index away
    for (int r = 0; r < ROWS; r += 3) rows[r / 3] = x + r * x_stride;

    auto step = [&](auto index, int64_t k, auto&& load_row) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value;
        if constexpr (PANELS == 1) {
            const auto left = panels[0].template load<I>(k, 0), right = panels[0].template load<I>(k, 1);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                const auto a = load_row(rows[r / 3] + r % 3 * x_stride + k + I);
                chains[r][0] = A::dot(chains[r][0], a, left);
                chains[r][1] = A::dot(chains[r][1], a, right);
            }
        } else {
            typename A::operand a[ROWS];
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) a[r] = load_row(rows[r / 3] + r % 3 * x_stride + k + I);
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; c++) {
                const auto w = panels[c / 2].template load<I>(k, c % 2);
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) chains[r][c] = A::dot(chains[r][c], a[r], w);
            }
        }
    };
    for (; k + ROUND <= end; k += ROUND) {
        ahead(k);
#pragma GCC unroll 4
        for (int i = 0; i < ROUND; i += STEP) steps<STEP, A::elements>([&](auto index) { step(index, k + i, A::row); });
    }
    for (; k + STEP <= end; k += STEP) steps<STEP, A::elements>([&](auto index) { step(index, k, A::row); });
    if constexpr (STEP > 1) {
        const int64_t left = end - k;       // less than a step: what is packed there is zero, but x ends
        steps<STEP, A::elements>([&](auto index) {
            if (index + A::elements <= left) step(index, k, A::row);
            else if (index < left) step(index, k, A::last);
        });
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) store(sums + (r * COLUMNS + c) * VL, chains[r][c]);
}

template <class Panel>
using Tile = void (*)(const typename Panel::Arithmetic::element*, int64_t, const Panel&, int64_t, int64_t, float*, bool,
                      Fetch&, const char*, int64_t);

// A tile of one panel. Meanwhile the fetch goes on evenly from `from`, by `bytes`.
template <class Panel, int ROWS>
static __attribute__((noinline))        // most of what is compiled: once for all products
void tall_tile(const typename Panel::Arithmetic::element* x, int64_t x_stride, const Panel& panel, int64_t k, int64_t end,
               float* sums, bool first, Fetch& fetch, const char* from, int64_t bytes) {
    const int64_t bytes_per_round = bytes * (4 * Panel::Arithmetic::elements) / (end - k);
    tile<Panel, ROWS, 1>(x, x_stride, &panel, k, end, sums, first, [&](int64_t) { fetch.until(from += bytes_per_round); });
}

constexpr int TALLEST = REGISTERS == 32 ? 12 : 6;

template <class Panel> static Tile<Panel> tall_tile_of(int64_t rows) {
    static constexpr Tile<Panel> tiles[] = {
        tall_tile<Panel, 1>, tall_tile<Panel, 2>, tall_tile<Panel, 3>, tall_tile<Panel, 4>,
        tall_tile<Panel, 5>, tall_tile<Panel, 6>,
#if defined(__AVX512F__) || defined(__aarch64__)
        tall_tile<Panel, 7>, tall_tile<Panel, 8>, tall_tile<Panel, 9>, tall_tile<Panel, 10>, tall_tile<Panel, 11>,
        tall_tile<Panel, 12>,
#endif
    };
    return tiles[rows - 1];
}

// ROWS rows x PANELS neighbouring panels, `bytes` each. Every panel is fetched some way ahead of its use, and behind its
// end the one that comes PANELS later.
template <class Panel, int ROWS, int PANELS>
static __attribute__((noinline))
void wide_tile(const typename Panel::Arithmetic::element* x, int64_t x_stride, const Panel* panels, int64_t depth,
               float* sums, int64_t bytes) {
    const int64_t lead = std::min(LEAD, bytes) / 64 * 64;
    tile<Panel, ROWS, PANELS>(x, x_stride, panels, 0, depth, sums, true, [&](int64_t k) {
        constexpr int64_t ROUND = 4 * Panel::Arithmetic::elements;
        const int64_t at = k * bytes / depth, end = (k + ROUND) * bytes / depth;
        const int64_t skip = at + lead < bytes ? lead : lead + (PANELS - 1) * bytes;
        for (int p = 0; p < PANELS; p++)
            for (int64_t byte = at; byte < end; byte += 64) __builtin_prefetch(panels[p].begin() + byte + skip, 0, 2);
    });
}

}  // namespace linear
