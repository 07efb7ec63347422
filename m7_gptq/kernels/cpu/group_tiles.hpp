// A tile of a product: some rows of x and some panels, group by group.
//
//     for each group:   codes . x of the group in registers     an integer, or one chain of sums along K
//                       y += offset * sum(x) + scale * that      a chain over the groups
//
// So a number of y is the same bits in every tile: the order of its sums is that of K, and integers have none.
#pragma once

#include "operands.hpp"
#include "rows.hpp"

#include <array>

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

// sums [ROWS][PANELS x PANEL] += the groups [g, end) of `group` elements, which are the grids' first. ahead.group() is
// called at each, ahead.step(k) every few elements.
template <class P, int ROWS, int PANELS, class Ahead>
static inline __attribute__((always_inline)) void tile(const Rows<typename P::Arithmetic> x, const P* panels,
                                                       const Grid* grids, int64_t group, int64_t g, int64_t end,
                                                       float* sums, Ahead&& ahead) {
    typedef typename P::Arithmetic A;
    constexpr int COLUMNS = 2 * PANELS, STEP = P::STEP;
    constexpr bool INT8 = sizeof(typename A::element) == 1;
    const typename A::element* rows[(ROWS + 2) / 3];        // every third row's: the two after it are an index away
    for (int r = 0; r < ROWS; r += 3) rows[r / 3] = x.x + r * x.stride;
    auto step = [&](auto index, auto plane, int64_t k, auto& parts) __attribute__((always_inline)) {
        constexpr int I = decltype(index)::value, PLANE = decltype(plane)::value;
        if constexpr (PANELS == 1) {
            const auto left = panels[0].template load<I, PLANE>(k, 0), right = panels[0].template load<I, PLANE>(k, 1);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                const auto a = A::row(rows[r / 3] + r % 3 * x.stride + k + I);
                parts[r][0] = A::dot(parts[r][0], a, left);
                parts[r][1] = A::dot(parts[r][1], a, right);
            }
        } else {
            typename A::operand a[ROWS];
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) a[r] = A::row(rows[r / 3] + r % 3 * x.stride + k + I);
#pragma GCC unroll 8
            for (int c = 0; c < COLUMNS; c++) {
                const auto w = panels[c / 2].template load<I, PLANE>(k, c % 2);
#pragma GCC unroll 12
                for (int r = 0; r < ROWS; r++) parts[r][c] = A::dot(parts[r][c], a[r], w);
            }
        }
    };
    vf y[ROWS][COLUMNS];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) y[r][c] = load(sums + (r * COLUMNS + c) * VL);
    for (int64_t i = 0; g < end; g++, i++) {
        const int64_t first = g * group, behind = first + group;
        ahead.group();
        typename A::sum totals[ROWS][COLUMNS] = {};
        if constexpr (A::BLOCK == 0) {
            // Integers may be added in any order: where chains are few, each code of a byte has its own.
            constexpr bool SPLIT = INT8 && STEP == 2 * A::elements && ROWS * COLUMNS <= 4;
            typename A::sum others[SPLIT ? ROWS : 1][SPLIT ? COLUMNS : 1] = {};
            for (int64_t k = first; k < behind; k += STEP) {
                ahead.step(k);
                linear::steps<STEP, A::elements>([&](auto index) __attribute__((always_inline)) {
                    if constexpr (SPLIT && index > 0) step(index, std::integral_constant<int, 0>{}, k, others);
                    else step(index, std::integral_constant<int, 0>{}, k, totals);
                });
            }
            if constexpr (SPLIT)
                for (int r = 0; r < ROWS; r++)
                    for (int c = 0; c < COLUMNS; c++) totals[r][c] += others[r][c];
        } else {
            for (int64_t block = first; block < behind; block += A::BLOCK) {
                const int64_t block_end = std::min<int64_t>(block + A::BLOCK, behind);
                linear::steps<P::PLANES, 1>([&](auto plane) __attribute__((always_inline)) {
                    typename A::partial parts[ROWS][COLUMNS] = {};
                    for (int64_t k = block; k < block_end; k += STEP) {
                        if (plane == 0) ahead.step(k);
                        linear::steps<STEP, A::elements>([&](auto index) __attribute__((always_inline)) {
                            step(index, plane, k, parts);
                        });
                    }
#pragma GCC unroll 12
                    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
                        for (int c = 0; c < COLUMNS; c++) totals[r][c] = A::add(totals[r][c], parts[r][c], plane ? 16 : 1);
                });
            }
        }
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) {
            const Grid& grid = grids[c / 2];
            const vf scale = load(grid.scales + i * PANEL + c % 2 * VL), offset = load(grid.offsets + i * PANEL + c % 2 * VL);
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; r++) {
                vf value = A::value(totals[r][c]);
                if constexpr (INT8) value *= splat(x.scales[r * x.groups + g]);
                const vf with_offset = multiply_add(y[r][c], offset, splat(x.sums[r * x.groups + g]));
                y[r][c] = multiply_add(with_offset, value, scale);
            }
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; c++) store(sums + (r * COLUMNS + c) * VL, y[r][c]);
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
    inline __attribute__((always_inline)) void step(int64_t) {}
};

// A tile of one panel. Meanwhile the fetch goes on from `from`, `bytes` in all.
template <class P, int ROWS>
static __attribute__((noinline))
void tall_tile(const Rows<typename P::Arithmetic>& x, const P& panel, const Grid& grid, int64_t group, int64_t g,
               int64_t end, float* sums, Fetch& fetch, const char* from, int64_t bytes) {
    tile<P, ROWS, 1>(x, &panel, &grid, group, g, end, sums, FetchByGroup{fetch, from, whole_lines(bytes / (end - g))});
}

template <class P> static Tile<P> tall_tile_of(int64_t rows) {
    static constexpr Tile<P> tiles[] = {
        tall_tile<P, 1>, tall_tile<P, 2>, tall_tile<P, 3>, tall_tile<P, 4>, tall_tile<P, 5>, tall_tile<P, 6>,
        tall_tile<P, P::Arithmetic::TALLEST - 1>, tall_tile<P, P::Arithmetic::TALLEST>,
    };
    return tiles[rows - 1];
}

// Fetches every panel some way ahead of its use, and behind its end the one that comes PANELS later.
template <class P, int PANELS> struct FetchByStep {
    const P* panels;
    int64_t bytes, codes, lead;
    inline __attribute__((always_inline)) void group() {}
    inline __attribute__((always_inline)) void step(int64_t k) {
        constexpr int64_t STEP_BYTES = 2 * 4 * VL;          // of a panel's codes
        const int64_t at = k * PANEL * P::BITS / 8;
        const int64_t skip = codes + at + lead < bytes ? lead : lead + (PANELS - 1) * bytes;
        for (int p = 0; p < PANELS; p++)
            for (int64_t byte = 0; byte < STEP_BYTES; byte += 64)
                __builtin_prefetch(panels[p].codes + at + skip + byte, 0, 2);
    }
};

// ROWS rows x PANELS neighbouring panels, the groups [g, end).
template <class P, int ROWS, int PANELS>
static __attribute__((noinline))
void wide_tile(const Rows<typename P::Arithmetic>& x, const P* panels, const Grid* grids, const Layout& layout,
               int64_t group, int64_t g, int64_t end, float* sums) {
    const int64_t lead = std::min(linear::LEAD, layout.bytes) / 64 * 64;
    tile<P, ROWS, PANELS>(x, panels, grids, group, g, end, sums,
                          FetchByStep<P, PANELS>{panels, layout.bytes, layout.codes, lead});
}

}  // namespace quantized
