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

constexpr int64_t FEW_LEAD = 16 << 10;      // bytes to fetch ahead of few rows: what is used in a third of a microsecond
constexpr int64_t SLICE_BYTES = 20 << 10;   // of a panel, unpacked: in L1 beside some rows of x

template <class A, int BITS> struct Multiply {
    typedef Packed<A, BITS> Panel;
    static constexpr bool INT8 = std::is_same<A, Int8>::value;
    // Codes of 8 bits lie as integers are multiplied, unless that takes two planes.
    static constexpr bool AS_IT_IS = INT8 && BITS == 8;
    typedef typename std::conditional<AS_IT_IS && A::SMALL_CODES_ONLY, Panel, Unpacked<A>>::type TallPanel;

    const Task& task;
    const Weights& weights;
    const Layout layout;
    const int64_t groups;
    const Rows<A> x;

    explicit Multiply(const Task& task)
        : task(task), weights(task.weights), layout(task.weights), groups(task.weights.num_groups()),
          x(Rows<A>{(const typename A::element*)task.x.x, task.x.stride, task.x.sums, task.x.scales, groups}
                .from(task.row)) {}

    // One tile of all rows for each panel.
    template <int ROWS> void few_rows() const {
        const int64_t grid_bytes = PANEL * (weights.scale_bytes + weights.offsets);
        for (int64_t p = task.first; p < task.last; p++) {
            const char* ahead = weights.packed + p * layout.bytes + FEW_LEAD;
            alignas(64) float sums[ROWS * PANEL] = {};
            Grid grid;
            for (int64_t g = 0; g < groups; g += Grid::GROUPS) {
                const int64_t end = std::min(g + Grid::GROUPS, groups);
                read(grid, p, g, end);
                few_tile<Panel, ROWS>(x, Panel(weights, layout, p), grid, weights.group, g, end, sums,
                                      ahead + g * layout.bytes / groups, grid_bytes);
            }
            task.finish(task.product, p, sums, PANEL, task.row, ROWS);
        }
    }

    // Panels unpacked slice by slice, in tiles of even heights. `fetched`: how far this thread has fetched before, which
    // usually is where it goes on.
    void many_rows() const {
        const int64_t first = task.first, num_rows = task.num_rows, bytes = layout.bytes;
        const int64_t num_tiles = (num_rows + A::TALLEST - 1) / A::TALLEST;
        const char* begin = weights.packed + first * bytes;
        const int64_t lead = num_tiles == 1 ? std::min(linear::LEAD, bytes) : bytes;
        const bool goes_on = task.fetched >= begin && task.fetched <= begin + 2 * lead;
        Fetch fetch{goes_on ? task.fetched : begin, begin + (task.num_panels - first) * bytes};
        alignas(64) float sums[linear::MAX_ROWS * PANEL];
        const int64_t step = groups_of_slice();
        for (int64_t p = first; p < task.last; p++) {
            std::fill_n(sums, num_rows * PANEL, 0.0f);
            for (int64_t g = 0; g < groups; g += step) {
                const int64_t end = std::min(g + step, groups);
                const char* from = weights.packed + p * bytes + lead + bytes * g / groups;
                const int64_t slice_bytes = bytes * (end - g) / groups / num_tiles;
                Grid grid;
                read(grid, p, g, end);
                alignas(64) char slice[AS_IT_IS ? 64 : SLICE_BYTES + MAX_GROUP * PANEL * 4];
                const TallPanel panel = tall_panel(p, g, end, slice);
                for (int64_t t = 0; t < num_tiles; t++) {
                    const int64_t row = num_rows * t / num_tiles, height = num_rows * (t + 1) / num_tiles - row;
                    tall_tile_of<TallPanel>(height)(x.from(row), panel, grid, weights.group, g, end, sums + row * PANEL,
                                                    fetch, from + t * slice_bytes, slice_bytes);
                }
            }
            task.finish(task.product, p, sums, PANEL, task.row, num_rows);
        }
        task.fetched = fetch.next;
    }

    void run() const {
        switch (task.num_rows) {
            case 1: return few_rows<1>();
            case 2: return few_rows<2>();
            case 3: return few_rows<3>();
            case 4: return few_rows<4>();
            case 5: if constexpr (INT8) return few_rows<5>(); else return many_rows();
            case 6: if constexpr (INT8) return few_rows<6>(); else return many_rows();
            default: return many_rows();
        }
    }

  private:
    void read(Grid& grid, int64_t p, int64_t g, int64_t end) const {
        grid.read(weights, layout, weights.packed + p * layout.bytes, g, end);
    }

    // As few slices as fit, of even sizes.
    int64_t groups_of_slice() const {
        const int64_t group_bytes = AS_IT_IS ? 1 : weights.group * Unpacked<A>::BYTES;
        const int64_t fitting = std::clamp<int64_t>(SLICE_BYTES / group_bytes, 1, Grid::GROUPS);
        const int64_t slices = (groups + fitting - 1) / fitting;
        return (groups + slices - 1) / slices;
    }

    TallPanel tall_panel(int64_t p, int64_t g, int64_t end, char* slice) const {
        const Panel panel(weights, layout, p);
        if constexpr (std::is_same<TallPanel, Panel>::value) return panel;
        else if constexpr (AS_IT_IS) return TallPanel(panel.codes, 0);
        else {
            unpack(panel, g * weights.group, end * weights.group, slice);
            return TallPanel(slice, g * weights.group);
        }
    }
};

}  // namespace quantized
