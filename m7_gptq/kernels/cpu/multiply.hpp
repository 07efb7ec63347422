// Rows of x times some panels: which tiles, and what is unpacked. One file of code for each arithmetic compiles it.
#pragma once

#include "group_tiles.hpp"

namespace quantized {

// What is left to do with a panel's sums: `product` knows where y is.
typedef void (*Finish)(const void* product, int64_t panel, const float* sums, int64_t sums_stride, int64_t row,
                       int64_t num_rows);

// Rows [row, row + num_rows) x panels [first, last).
struct Task {
    const Weights& weights;
    const Prepared& x;
    int64_t row, num_rows, first, last, num_panels;
    const char*& fetched;
    Finish finish;
    const void* product;
};

void multiply_int8(const Task& task);       // multiply_int8.cpp
void multiply_pairs(const Task& task);      // multiply_pairs.cpp, where there are products of bf16
void multiply_singles(const Task& task);    // multiply_singles.cpp

constexpr int64_t SLICE_BYTES = 16 << 10;   // of a panel, unpacked: in L1 beside some rows of x

template <class A, int BITS> struct Multiply {
    typedef Packed<A, BITS> Panel;
    const Task& task;
    const Weights& weights;
    const Layout layout;

    explicit Multiply(const Task& task) : task(task), weights(task.weights), layout(task.weights) {}

    Rows<A> rows() const {
        const int64_t groups = weights.num_groups();
        const Rows<A> all{(const typename A::element*)task.x.x, task.x.stride, task.x.sums, task.x.scales, groups};
        return all.from(task.row);
    }

    template <int ROWS, int PANELS> void few_rows() const {
        const Rows<A> x = rows();
        const int64_t groups = weights.num_groups();
        int64_t p = task.first;
        for (; p + PANELS <= task.last; p += PANELS) {
            alignas(64) float sums[ROWS * PANELS * PANEL] = {};
            const std::array<Panel, PANELS> panels = panels_from<PANELS>(p);
            Grid grids[PANELS];
            for (int64_t g = 0; g < groups; g += Grid::GROUPS) {
                const int64_t end = std::min(g + Grid::GROUPS, groups);
                for (int i = 0; i < PANELS; i++) read(grids[i], p + i, g, end);
                wide_tile<Panel, ROWS, PANELS>(x, panels.data(), grids, layout, weights.group, g, end, sums);
            }
            for (int i = 0; i < PANELS; i++)
                task.finish(task.product, p + i, sums + i * PANEL, PANELS * PANEL, task.row, ROWS);
        }
        if (p < task.last) many_rows(p);
    }

    void read(Grid& grid, int64_t p, int64_t g, int64_t end) const {
        grid.read(weights, layout, weights.packed + p * layout.bytes, g, end);
    }

    template <int PANELS> std::array<Panel, PANELS> panels_from(int64_t p) const {
        if constexpr (PANELS == 2) return {Panel(weights, layout, p), Panel(weights, layout, p + 1)};
        else return {Panel(weights, layout, p), Panel(weights, layout, p + 1), Panel(weights, layout, p + 2),
                     Panel(weights, layout, p + 3)};
    }

    // Panels [first, last), in tiles of even heights. `fetched`: how far this thread has fetched before, which usually
    // is where it goes on.
    void many_rows(int64_t first) const {
        constexpr bool AS_IT_IS = std::is_same<A, Int8>::value && BITS == 8;        // packed as it is multiplied
        const Rows<A> x = rows();
        const int64_t num_rows = task.num_rows, groups = weights.num_groups(), bytes = layout.bytes;
        const int64_t num_tiles = (num_rows + TALLEST - 1) / TALLEST;
        const char* begin = weights.packed + first * bytes;
        const int64_t lead = num_tiles == 1 ? std::min(linear::LEAD, bytes) : bytes;
        const bool goes_on = task.fetched >= begin && task.fetched <= begin + 2 * lead;
        Fetch fetch{goes_on ? task.fetched : begin, begin + (task.num_panels - first) * bytes};
        alignas(64) float sums[linear::MAX_ROWS * PANEL];
        const int64_t fitting = std::max<int64_t>(1, SLICE_BYTES / (weights.group / A::elements * PANEL * 4));
        const int64_t step = std::min<int64_t>(Grid::GROUPS, fitting);
        for (int64_t p = first; p < task.last; p++) {
            const Panel panel(weights, layout, p);
            std::fill_n(sums, num_rows * PANEL, 0.0f);
            for (int64_t g = 0; g < groups; g += step) {
                const int64_t end = std::min(g + step, groups);
                const char* from = weights.packed + p * bytes + lead + bytes * g / groups;
                const int64_t slice_bytes = bytes * (end - g) / groups;
                Grid grid;
                read(grid, p, g, end);
                if constexpr (AS_IT_IS) {
                    tiles(panel, grid, x, num_tiles, g, end, sums, fetch, from, slice_bytes);
                } else {
                    alignas(64) char slice[SLICE_BYTES + MAX_GROUP * PANEL * 4];
                    unpack(panel, g * weights.group, end * weights.group, slice);
                    const Unpacked<A> unpacked{slice, g * weights.group};
                    tiles(unpacked, grid, x, num_tiles, g, end, sums, fetch, from, slice_bytes);
                }
            }
            task.finish(task.product, p, sums, PANEL, task.row, num_rows);
        }
        task.fetched = fetch.next;
    }

    template <class P>
    void tiles(const P& panel, const Grid& grid, const Rows<A>& x, int64_t num_tiles, int64_t g, int64_t end, float* sums,
               Fetch& fetch, const char* from, int64_t bytes) const {
        const int64_t num_rows = task.num_rows;
        for (int64_t t = 0; t < num_tiles; t++) {
            const int64_t start = num_rows * t / num_tiles, height = num_rows * (t + 1) / num_tiles - start;
            tall_tile_of<P>(height)(x.from(start), panel, grid, weights.group, g, end, sums + start * PANEL, fetch,
                                    from + bytes * t / num_tiles, bytes / num_tiles);
        }
    }

    void run() const {
        constexpr bool MANY_REGISTERS = REGISTERS == 32;
        switch (task.num_rows) {
            case 1: return few_rows<1, 4>();
            case 2: return few_rows<2, MANY_REGISTERS ? 4 : 2>();
            case 3: return few_rows<3, 2>();
            case 4: return few_rows<4, 2>();
            default: return many_rows(task.first);
        }
    }
};

}  // namespace quantized
