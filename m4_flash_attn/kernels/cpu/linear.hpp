// y = x W^T + b, summed in fp32: every weight comes from memory once, while the sums are computed.
//
//     packed  [panels of 2 VL columns][K][2 VL]         fp32
//             [panels of 2 VL columns][K / 2][2 VL][2]  bf16: pairs of neighbours, as vdpbf16ps multiplies them
//
// A tile of x's rows and one panel's columns keeps its sums in registers while K runs. The tiles of a panel find it in
// the L2 cache, and fetch the next panel meanwhile: computing and fetching overlap.
//
// Each number of y is one chain of sums along K, from the first product to the last, whatever the tile: so a row's
// result is the same bits, however many rows run beside it. Where a tile has few rows, and few chains would wait for
// each other, it takes more panels.
//
// How weights are stored is a policy, a Format (formats.hpp). Where rows are many, a panel may be unpacked once, in
// slices of K, for all of them.
#pragma once

#include "linear_tiles.hpp"
#include "team.hpp"

#include <algorithm>
#include <array>

namespace linear {

constexpr int64_t X_BYTES = 384 << 10;      // rows of x that are worked on together: most of a small L2 cache
constexpr int MAX_ROWS = 192;               // of them
constexpr int64_t SLICE = 256;              // elements of K that are unpacked together: a tile in L1
constexpr int64_t PIECE_NS = 10'000;        // how long a piece of work should take, by the estimates in `grain`

// What is left to do with a panel's sums. GATED: its left columns are a gate, the right ones what it lets through: VL
// columns of silu(left) * right.
template <class Out, bool GATED>
static void finish(const float* sums, int64_t sums_stride, const float* bias, Out* y, int64_t y_stride, int64_t num_rows,
                   int64_t columns) {
    constexpr int WIDTH = GATED ? VL : PANEL;
    Out whole[WIDTH];       // where y ends within the panel
    for (int64_t r = 0; r < num_rows; r++) {
        Out* to = columns == WIDTH ? y + r * y_stride : whole;
        vf left = load(sums + r * sums_stride), right = load(sums + r * sums_stride + VL);
        if (bias) left += load(bias), right += load(bias + VL);
        if (GATED) {
            store(to, silu(left) * right);
        } else {
            store(to, left);
            store(to + VL, right);
        }
        if (to == whole) std::copy(whole, whole + columns, y + r * y_stride);
    }
}

// ---- a product, and its pieces

template <class Format, class Out, bool GATED> struct Job {
    typedef typename Format::Arithmetic::element element;
    static constexpr int WIDTH = GATED ? VL : PANEL;
    const typename Format::Weights& weights;
    const element* x;
    int64_t x_stride;
    Out* y;
    int64_t y_stride;

    void finish_panel(int64_t p, const float* sums, int64_t sums_stride, int64_t row, int64_t num_rows) const {
        const float* bias = weights.bias ? weights.bias + p * PANEL : nullptr;
        finish<Out, GATED>(sums, sums_stride, bias, y + row * y_stride + p * WIDTH, y_stride, num_rows,
                           std::min<int64_t>(WIDTH, weights.columns - p * WIDTH));
    }

    // Few rows x panels [first, last), the last ones by themselves.
    template <int ROWS, int PANELS>
    void few_rows(int64_t row, int64_t first, int64_t last, int64_t num_panels, const char*& fetched) const {
        const int64_t bytes = Format::bytes(weights);
        alignas(64) float sums[ROWS * PANELS * PANEL];
        int64_t p = first;
        for (; p + PANELS <= last; p += PANELS) {
            const std::array<Format, PANELS> panels = panels_from<PANELS>(p);
            wide_tile<Format, ROWS, PANELS>(x + row * x_stride, x_stride, panels.data(), weights.depth, sums, bytes);
            for (int i = 0; i < PANELS; i++) finish_panel(p + i, sums + i * PANEL, PANELS * PANEL, row, ROWS);
        }
        if (p < last) many_rows(row, ROWS, p, last, num_panels, fetched);
    }

    template <int PANELS> std::array<Format, PANELS> panels_from(int64_t p) const {
        if constexpr (PANELS == 2) return {Format(weights, p), Format(weights, p + 1)};
        else return {Format(weights, p), Format(weights, p + 1), Format(weights, p + 2), Format(weights, p + 3)};
    }

    // Rows [row, row + num_rows) x panels [first, last), in tiles of even heights. `fetched`: how far this thread has
    // fetched before, which usually is where it goes on.
    void many_rows(int64_t row, int64_t num_rows, int64_t first, int64_t last, int64_t num_panels,
                   const char*& fetched) const {
        const int64_t num_tiles = (num_rows + TALLEST - 1) / TALLEST, bytes = Format::bytes(weights);
        const char* begin = Format(weights, first).begin();
        const int64_t lead = num_tiles == 1 ? std::min(LEAD, bytes) : bytes;
        const bool goes_on = fetched >= begin && fetched <= begin + 2 * lead;
        Fetch fetch{goes_on ? fetched : begin, begin + (num_panels - first) * bytes};
        alignas(64) float sums[MAX_ROWS * PANEL];
        const bool unpacks = num_rows >= Format::UNPACK_ROWS;
        const int64_t slice = unpacks ? SLICE : weights.depth;
        for (int64_t p = first; p < last; p++) {
            const Format panel(weights, p);
            for (int64_t k = 0; k < weights.depth; k += slice) {
                const int64_t end = std::min(k + slice, int64_t(weights.depth));
                const char* from = panel.begin() + lead + bytes * k / weights.depth;
                const int64_t slice_bytes = bytes * (end - k) / weights.depth;
                const element* at = x + row * x_stride;
                if constexpr (Format::UNPACK_ROWS != NEVER) {
                    if (unpacks) {
                        alignas(64) float unpacked[SLICE * PANEL];
                        unpack(panel, k, end, unpacked);
                        tiles(Float32(unpacked), at + k, num_rows, num_tiles, 0, end - k, sums, k == 0, fetch, from,
                              slice_bytes);
                        continue;
                    }
                }
                tiles(panel, at, num_rows, num_tiles, k, end, sums, k == 0, fetch, from, slice_bytes);
            }
            finish_panel(p, sums, PANEL, row, num_rows);
        }
        fetched = fetch.next;
    }

    static void unpack(const Format& panel, int64_t first, int64_t end, float* to) {
        for (int64_t k = first; k < end; k += Format::STEP)
            steps<Format::STEP, 1>([&](auto index) {
                constexpr int I = decltype(index)::value;
                if (k + I >= end) return;
                store(to + (k + I - first) * PANEL, panel.template load<I>(k, 0));
                store(to + (k + I - first) * PANEL + VL, panel.template load<I>(k, 1));
            });
    }

    template <class Panel>
    void tiles(const Panel& panel, const element* at, int64_t num_rows, int64_t num_tiles, int64_t k, int64_t end,
               float* sums, bool first, Fetch& fetch, const char* from, int64_t bytes) const {
        for (int64_t t = 0; t < num_tiles; t++) {
            const int64_t start = num_rows * t / num_tiles, height = num_rows * (t + 1) / num_tiles - start;
            const char* to = from + bytes * t / num_tiles;
            fetch.until(to);
            tall_tile_of<Panel>(height)(at + start * x_stride, x_stride, panel, k, end, sums + start * PANEL, first, fetch,
                                        to, bytes / num_tiles);
        }
    }

    void run(int64_t row, int64_t num_rows, int64_t first, int64_t last, int64_t num_panels,
             const char*& fetched) const {
        switch (num_rows) {
            case 1: return few_rows<1, 4>(row, first, last, num_panels, fetched);
            case 2: return few_rows<2, REGISTERS == 32 ? 4 : 2>(row, first, last, num_panels, fetched);
            case 3: return few_rows<3, 2>(row, first, last, num_panels, fetched);
            default: return many_rows(row, num_rows, first, last, num_panels, fetched);
        }
    }
};

// Panels to be taken together, that a piece is worth an atomic operation and not so long that others wait for it.
static inline int grain(int64_t num_rows, int64_t depth, int64_t panel_bytes) {
    const int64_t ns = panel_bytes / 8 + num_rows * depth * PANEL / 24;         // 8 GB/s or 48 GFLOP/s
    const int64_t panels = PIECE_NS / std::max<int64_t>(ns, 1);
    return panels >= 4 ? (int)std::min<int64_t>(16, panels / 4 * 4) : (int)std::max<int64_t>(1, panels);
}

// How a product is cut: `panels` of `panel_bytes` each, rows of x of `row_bytes` and `depth` elements each. Calls
// run(row, num_rows, first, last, fetched) for rows x panels [first, last), where `fetched` is for the thread to keep.
// All threads of a team call this.
template <class Run>
static void share_panels(Member& member, int64_t panels, int64_t panel_bytes, int64_t depth, int64_t row_bytes,
                         int64_t num_rows, Run&& run) {
    // Rows are cut where x does not fit the cache, and where there are too few panels for the threads.
    auto divided = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t fitting = std::clamp<int64_t>(X_BYTES / row_bytes, 12, MAX_ROWS);
    const int64_t wanted = std::max(divided(num_rows, fitting), divided(4 * int64_t(member.team.num_threads), panels));
    const int64_t blocks = std::max({int64_t(1), divided(num_rows, MAX_ROWS), std::min(wanted, num_rows / 12)});
    const char* fetched = nullptr;
    if (num_rows == 0) return;
    member.share((int)(blocks * panels), grain((num_rows + blocks - 1) / blocks, depth, panel_bytes),
                 [&](int64_t item, int64_t end) {
        while (item < end) {
            const int64_t b = item / panels, first = item % panels, last = std::min(panels, first + end - item);
            const int64_t row = num_rows * b / blocks, row_end = num_rows * (b + 1) / blocks;
            run(row, row_end - row, first, last, fetched);
            item += last - first;
        }
    });
}

constexpr int64_t SOON = 128 << 10;         // bytes that may be fetched while a thread waits: a part of a small L2 cache

// Have the first of a member's own panels fetched while it waits.
static inline void expect_panels(Member& member, const char* packed, int64_t panels, int64_t panel_bytes) {
    const int64_t threads = member.team.num_threads, first = panels * member.thread / threads;
    const int64_t own = panels * (member.thread + 1) / threads - first;
    member.expect(packed + first * panel_bytes, std::min(SOON, own * panel_bytes));
}

// x [num_rows, K] -> y [num_rows, N]; strides in elements. All threads of a team call this.
template <class Format, class Out, bool GATED>
static void share(Member& member, const typename Format::Weights& weights,
                  const typename Format::Arithmetic::element* x, int64_t x_stride, Out* y, int64_t y_stride,
                  int64_t num_rows) {
    const Job<Format, Out, GATED> job{weights, x, x_stride, y, y_stride};
    const int64_t panels = (weights.columns + job.WIDTH - 1) / job.WIDTH;
    share_panels(member, panels, Format::bytes(weights), weights.depth, int64_t(sizeof(*x)) * weights.depth, num_rows,
                 [&](int64_t row, int64_t rows, int64_t first, int64_t last, const char*& fetched) {
        job.run(row, rows, first, last, panels, fetched);
    });
}

// The products of a model of type T with weights in a Format: what decoder.hpp multiplies with.
template <class T, class Format> struct Product {
    typedef typename Format::Weights Weights;
    typedef typename InputOf<T, typename Format::Arithmetic>::type Input;      // what rows of x are kept as

    // What a member will read first in a product that comes soon.
    static void expect(Member& member, const Weights& weights, bool gated) {
        const int64_t width = gated ? VL : PANEL;
        expect_panels(member, Format(weights, 0).begin(), (weights.columns + width - 1) / width, Format::bytes(weights));
    }

    static constexpr int PHASES = 1;                                            // of Member::share, in a product
    static int64_t scratch_bytes(const Weights&, int64_t, int) { return 0; }    // for a number of rows, and of threads

    template <class Out, bool GATED>
    static void share(Member& member, const Weights& weights, const Input* x, int64_t x_stride, Out* y, int64_t y_stride,
                      int64_t num_rows, char* = nullptr) {
        linear::share<Format, Out, GATED>(member, weights, (const typename Format::Arithmetic::element*)x, x_stride, y,
                                          y_stride, num_rows);
    }
};

template <class T> struct FormatOf;
template <> struct FormatOf<float> { typedef Float32 type; };
template <> struct FormatOf<bf16> { typedef Bfloat16 type; };

}  // namespace linear
