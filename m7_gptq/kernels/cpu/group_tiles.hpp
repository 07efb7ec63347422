// A tile of a product: some rows of x and a panel, group by group.
//
//     for each group:   codes . x of the group in registers     an integer, or one chain of sums along K
//                       y += offset * sum(x) + scale * that      a chain over the groups
//
// So a number of y is the same bits in every tile: the order of its sums is that of K, and integers have none.
#pragma once

#include "operands.hpp"
#include "rows.hpp"

namespace quantized {

using linear::Fetch;

// Rows of x, from some row on, as a tile reads them.
template <class A> struct Rows {
    const typename A::element* x;
    int64_t stride;
    const float *sums, *scales;     // [rows][G]
    int64_t groups;

    Rows from(int64_t row) const {
        return {x + row * stride, stride, sums + row * groups, scales ? scales + row * groups : nullptr, groups};
    }
};

// sums [ROWS][PANEL] += the groups [g, end) of `group` elements, the first ones of the grid. ahead.group() is called at
// each, ahead.step() at every step of codes.
template <class P, int ROWS, class Ahead>
static inline __attribute__((always_inline)) void tile(const Rows<typename P::Arithmetic> x, const P panel,
                                                       const Grid& grid, int64_t group, int64_t g, int64_t end,
                                                       float* sums, Ahead ahead) {
    typedef typename P::Arithmetic A;
    constexpr int STEP = P::STEP;
    constexpr bool INT8 = sizeof(typename A::element) == 1;
    const typename A::element* rows[(ROWS + 2) / 3];        // every third row's: the two after it are an index away
    for (int r = 0; r < ROWS; r += 3) rows[r / 3] = x.x + r * x.stride;
    auto step = [&](auto index, auto plane, int64_t k, auto& parts) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value, PLANE = decltype(plane)::value;
        const auto left = panel.template load<I, PLANE>(k, 0), right = panel.template load<I, PLANE>(k, 1);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const auto a = A::row(rows[r / 3] + r % 3 * x.stride + k + I);
            parts[r][0] = A::dot(parts[r][0], a, left);
            parts[r][1] = A::dot(parts[r][1], a, right);
        }
    };
    vf y[ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) y[r][c] = load(sums + r * PANEL + c * VL);
    for (int64_t i = 0; g < end; g++, i++) {
        const int64_t first = g * group, behind = first + group;
        ahead.group();
        typename A::sum totals[ROWS][2] = {};
        if constexpr (A::BLOCK == 0) {
            for (int64_t k = first; k < behind; k += STEP) {
                ahead.step();
                linear::steps<STEP, A::elements>([&](auto index) __attribute__((always_inline)) {
                    step(index, std::integral_constant<int, 0>{}, k, totals);
                });
            }
        } else {
            for (int64_t block = first; block < behind; block += A::BLOCK) {
                const int64_t block_end = std::min<int64_t>(block + A::BLOCK, behind);
                linear::steps<P::PLANES, 1>([&](auto plane) __attribute__((always_inline)) {
                    typename A::partial parts[ROWS][2] = {};
                    for (int64_t k = block; k < block_end; k += STEP) {
                        if (plane == 0) ahead.step();
                        linear::steps<STEP, A::elements>([&](auto index) __attribute__((always_inline)) {
                            step(index, plane, k, parts);
                        });
                    }
#pragma GCC unroll 12
                    for (int r = 0; r < ROWS; r++)
                        for (int c = 0; c < 2; c++)
                            totals[r][c] = A::add(totals[r][c], parts[r][c], plane ? 16 : 1);
                });
            }
        }
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            const int64_t at = i * PANEL + c * VL;
            const vf scale = load(grid.scales + at), offset = load(grid.offsets + at);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                vf value = A::value(totals[r][c]);
                if constexpr (INT8) value *= splat(x.scales[r * x.groups + g]);
                y[r][c] = multiply_add(multiply_add(y[r][c], offset, splat(x.sums[r * x.groups + g])), value, scale);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < 2; c++) store(sums + r * PANEL + c * VL, y[r][c]);
}

template <class P>
using Tile = void (*)(const Rows<typename P::Arithmetic>&, const P&, const Grid&, int64_t, int64_t, int64_t, float*,
                      Fetch&, const char*, int64_t);

// Fetches some lines at every group: as many at each, so that the processor can foresee the loop.
struct FetchByGroup {
    Fetch& fetch;
    const char* goal;
    int64_t bytes;
    inline __attribute__((always_inline)) void group() { fetch.until(goal += bytes); }
    inline __attribute__((always_inline)) void step() {}
};

// A tile of one panel. Meanwhile the fetch goes on from `from`, `bytes` in all.
template <class P, int ROWS>
static __attribute__((noinline))
void tall_tile(const Rows<typename P::Arithmetic>& x, const P& panel, const Grid& grid, int64_t group, int64_t g,
               int64_t end, float* sums, Fetch& fetch, const char* from, int64_t bytes) {
    tile<P, ROWS>(x, panel, grid, group, g, end, sums, FetchByGroup{fetch, from, whole_lines(bytes / (end - g))});
}

template <class P> static Tile<P> tall_tile_of(int64_t rows) {
    static constexpr Tile<P> tiles[] = {
        tall_tile<P, 1>, tall_tile<P, 2>, tall_tile<P, 3>, tall_tile<P, 4>, tall_tile<P, 5>, tall_tile<P, 6>,
        tall_tile<P, P::Arithmetic::TALLEST - 1>, tall_tile<P, P::Arithmetic::TALLEST>,
    };
    return tiles[rows - 1];
}

// Fetches panels some way ahead, from the first byte to the last: at each step as many as it uses of the codes, at each
// group those that its scales and offsets take.
struct FetchByStep {
    const char* next;
    int64_t grid_bytes;
    inline __attribute__((always_inline)) void take(int64_t bytes) {
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(next + byte, 0, 3);
        next += bytes;
    }
    inline __attribute__((always_inline)) void group() { take(grid_bytes); }
    inline __attribute__((always_inline)) void step() { take(2 * 4 * VL); }
};

// All rows that there are, in one tile: it takes the packed codes apart in registers, and fetches what comes behind them.
template <class P, int ROWS>
static __attribute__((noinline))
void few_tile(const Rows<typename P::Arithmetic>& x, const P& panel, const Grid& grid, int64_t group, int64_t g,
              int64_t end, float* sums, const char* fetched, int64_t grid_bytes) {
    tile<P, ROWS>(x, panel, grid, group, g, end, sums, FetchByStep{fetched, grid_bytes});
}

}  // namespace quantized
