// y = x W^T + b, summed in fp32, for few rows: every weight comes from memory once, while the sums are computed.
//
//     packed  [panels of 2 VL columns][K][2 VL]         fp32
//             [panels of 2 VL columns][K / 2][2 VL][2]  bf16: pairs of neighbours, as vdpbf16ps multiplies them
//
// A tile of x's rows and one panel's columns keeps its sums in registers while K runs. The tiles of a panel find it in
// the L2 cache, and fetch the next panel meanwhile: computing and fetching overlap. x and y may be views of other rows.
#pragma once

#include "vec.hpp"

#include <algorithm>

#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

// A layer as Python hands it over; kernels/cpu/linear.py writes the same layout.
struct Weights {
    const void* packed;     // padded with zeros to whole panels and pairs, aligned to 64 bytes
    const float* bias;      // for all columns of all panels, or null
    int32_t columns, depth; // N, K; of a gated layer N is the number of its outputs, half of the weights' columns
};

namespace linear {

constexpr int PANEL = 2 * VL;
constexpr int64_t X_BYTES = 512 << 10;  // rows of x that are worked on together: half of a usual L2 cache
constexpr int64_t LEAD = 8 << 10;       // bytes to fetch ahead where one tile is all that uses a panel
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

// One instruction by name: written as `sum + a * b`, -fassociative-math would make trees of the products along K.
static inline vf multiply_add(vf sum, vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#elif defined(__aarch64__)
    return (vf)vfmaq_f32((float32x4_t)sum, (float32x4_t)a, (float32x4_t)b);
#else
    return sum + a * b;
#endif
}

// What one step along K multiplies: STEP elements of a row of x with STEP elements of every column.
template <class T> struct Step;

template <> struct Step<float> {
    static constexpr int STEP = 1, SUMS = REGISTERS == 32 ? 24 : 12;
    typedef vf operand;
    static inline operand row(const float* x) { return splat(*x); }
    static inline operand last(const float* x) { return row(x); }
    static inline operand columns(const float* w) { return load(w); }
    static inline vf dot(vf sum, operand a, operand b) { return multiply_add(sum, a, b); }
};

template <> struct Step<bf16> {
    static constexpr int STEP = 2;
    static inline uint32_t pair(const bf16* x) { return load_as<uint32_t>(x); }
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    static constexpr int SUMS = 24;
    typedef __m512bh operand;
    static inline operand row(const bf16* x) { return (__m512bh)_mm512_set1_epi32((int)pair(x)); }
    static inline operand last(const bf16* x) { return (__m512bh)_mm512_set1_epi32(x->bits); }
    static inline operand columns(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
    static inline vf dot(vf sum, operand a, operand b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    static constexpr int SUMS = 24;
    typedef bfloat16x8_t operand;
    static inline operand row(const bf16* x) { return vreinterpretq_bf16_u32(vdupq_n_u32(pair(x))); }
    static inline operand last(const bf16* x) { return vreinterpretq_bf16_u32(vdupq_n_u32(x->bits)); }
    static inline operand columns(const bf16* w) { return vreinterpretq_bf16_u32((uint32x4_t)load_as<vu>(w)); }
    static inline vf dot(vf sum, operand a, operand b) { return (vf)vbfdotq_f32((float32x4_t)sum, a, b); }
#else
    static constexpr int SUMS = REGISTERS == 32 ? 24 : 8;
    struct operand {
        vf even, odd;
    };
    static inline operand split(vu pairs) { return {(vf)(pairs << 16), (vf)(pairs & 0xffff0000u)}; }
    static inline operand row(const bf16* x) { return split(pair(x) - vu{}); }
    static inline operand last(const bf16* x) { return split(uint32_t(x->bits) - vu{}); }
    static inline operand columns(const bf16* w) { return split(load_as<vu>(w)); }
    static inline vf dot(vf sum, operand a, operand b) {
        return multiply_add(multiply_add(sum, a.even, b.even), a.odd, b.odd);
    }
#endif
};

// Runs through the packed weights ahead of their use, one cache line at a time.
struct Fetch {
    const char* next;
    const char* end;
    inline void until(const char* goal) {
        for (goal = std::min(goal, end); next < goal; next += 64) __builtin_prefetch(next, 0, 2);
    }
};

// ROWS rows x one panel. Meanwhile the fetch goes on evenly from `from`, by `bytes`.
// GATED: the panel's left columns are a gate, the right ones what it lets through: VL columns of silu(left) * right.
template <class T, class Out, bool GATED, int ROWS>
static void tile(const T* x, int64_t x_stride, const T* w, const float* bias, Out* y, int64_t y_stride, int depth,
                 Fetch& fetch, const char* from, int64_t bytes) {
    typedef Step<T> S;
    constexpr int UNROLL = 4;
    // Few rows: several sums for each element of y, or each step would wait for the one before.
    constexpr int SETS = 8 * ROWS <= S::SUMS ? 4 : 4 * ROWS <= S::SUMS ? 2 : 1;
    vf sums[SETS][ROWS][2];
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int s = 0; s < SETS; s++) sums[s][r][0] = sums[s][r][1] = vf{};
    const T* rows[(ROWS + 2) / 3];      // every third row's address: the two after it are an index away
    for (int r = 0; r < ROWS; r += 3) rows[r / 3] = x + r * x_stride;

    auto step = [&](vf (&into)[ROWS][2], int k, auto&& load_row) __attribute__((always_inline)) {
        const auto left = S::columns(w + int64_t(k) * PANEL), right = S::columns(w + int64_t(k) * PANEL + S::STEP * VL);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
            const auto a = load_row(rows[r / 3] + r % 3 * x_stride + k);
            into[r][0] = S::dot(into[r][0], a, left);
            into[r][1] = S::dot(into[r][1], a, right);
        }
    };
    constexpr int ROUND = UNROLL * S::STEP;
    const int64_t bytes_per_round = bytes * ROUND / depth;
    int k = 0;
    for (; k + ROUND <= depth; k += ROUND) {
        fetch.until(from += bytes_per_round);
#pragma GCC unroll 4
        for (int u = 0; u < UNROLL; u++) step(sums[u % SETS], k + u * S::STEP, S::row);
    }
    for (; k + S::STEP <= depth; k += S::STEP) step(sums[0], k, S::row);
    if (k < depth) step(sums[0], k, S::last);

#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++) {
        vf total[2];
#pragma GCC unroll 2
        for (int c = 0; c < 2; c++) {
            total[c] = bias ? load(bias + c * VL) : vf{};
#pragma GCC unroll 4
            for (int s = 0; s < SETS; s++) total[c] += sums[s][r][c];
        }
        if (GATED) {
            store(y + r * y_stride, silu(total[0]) * total[1]);
        } else {
            store(y + r * y_stride, total[0]);
            store(y + r * y_stride + VL, total[1]);
        }
    }
}

template <class T, class Out>
using Tile = void (*)(const T*, int64_t, const T*, const float*, Out*, int64_t, int, Fetch&, const char*, int64_t);

template <class T, class Out, bool GATED> static Tile<T, Out> tile_of(int rows) {
    static constexpr Tile<T, Out> tiles[] = {
        tile<T, Out, GATED, 1>, tile<T, Out, GATED, 2>, tile<T, Out, GATED, 3>, tile<T, Out, GATED, 4>,
#if defined(__AVX512F__) || defined(__aarch64__)
        tile<T, Out, GATED, 5>, tile<T, Out, GATED, 6>, tile<T, Out, GATED, 7>, tile<T, Out, GATED, 8>,
        tile<T, Out, GATED, 9>, tile<T, Out, GATED, 10>, tile<T, Out, GATED, 11>, tile<T, Out, GATED, 12>,
#else
        tile<T, Out, GATED, 5>, tile<T, Out, GATED, 6>,
#endif
    };
    return tiles[rows - 1];
}

// Rows [0, num_rows) x panels [first, last), in tiles of even heights.
template <class T, class Out, bool GATED>
static void block(const Weights& weights, const T* x, int64_t x_stride, Out* y, int64_t y_stride, int64_t num_rows,
                  int64_t first, int64_t last) {
    constexpr int STEP = Step<T>::STEP, ROWS = Step<T>::SUMS / 2, WIDTH = GATED ? VL : PANEL;
    const int64_t panel_size = (weights.depth + STEP - 1) / STEP * STEP * PANEL, panel_bytes = panel_size * sizeof(T);
    const int64_t num_tiles = (num_rows + ROWS - 1) / ROWS;
    const T* packed = static_cast<const T*>(weights.packed);
    Fetch fetch{(const char*)(packed + first * panel_size), (const char*)(packed + last * panel_size)};
    const int64_t lead = num_tiles == 1 ? std::min(LEAD, panel_bytes) : panel_bytes;
    for (int64_t p = first; p < last; p++) {
        const T* panel = packed + p * panel_size;
        const float* bias = weights.bias ? weights.bias + p * PANEL : nullptr;
        const int64_t columns = std::min<int64_t>(WIDTH, weights.columns - p * WIDTH);
        for (int64_t t = 0; t < num_tiles; t++) {
            const int64_t row = num_rows * t / num_tiles, height = num_rows * (t + 1) / num_tiles - row;
            const char* from = (const char*)panel + panel_bytes * t / num_tiles + lead;
            fetch.until(from);
            Out whole[ROWS * WIDTH];    // where y ends within the panel
            Out* at = y + row * y_stride + p * WIDTH;
            const bool fits = columns == WIDTH;
            tile_of<T, Out, GATED>(height)(x + row * x_stride, x_stride, panel, bias, fits ? at : whole,
                                    fits ? y_stride : WIDTH, weights.depth, fetch, from, panel_bytes / num_tiles);
            for (int64_t r = 0; r < height && !fits; r++)
                std::copy(whole + r * WIDTH, whole + r * WIDTH + columns, at + r * y_stride);
        }
    }
}

// What thread `thread` of `num_threads` does of x [num_rows, K] -> y [num_rows, N]; strides in elements. All of them
// call this, inside a parallel region; a barrier has to come before anyone reads y.
template <class T, class Out, bool GATED = false>
static void share(const Weights& weights, const T* x, int64_t x_stride, Out* y, int64_t y_stride, int64_t num_rows,
                  int thread, int num_threads) {
    constexpr int WIDTH = GATED ? VL : PANEL;
    const int64_t panels = (weights.columns + WIDTH - 1) / WIDTH;
    // Rows are cut where x does not fit the cache, and where there are too few panels for the threads.
    const int64_t fitting = std::max<int64_t>(12, X_BYTES / int64_t(sizeof(T)) / weights.depth);
    const int64_t wanted = std::max((num_rows + fitting - 1) / fitting, (4 * num_threads + panels - 1) / panels);
    const int64_t blocks = std::max<int64_t>(1, std::min(wanted, num_rows / 12));
    int64_t item = blocks * panels * thread / num_threads;
    const int64_t end = blocks * panels * (thread + 1) / num_threads;
    while (item < end) {
        const int64_t b = item / panels, first = item % panels, last = std::min(panels, first + end - item);
        const int64_t row = num_rows * b / blocks, row_end = num_rows * (b + 1) / blocks;
        block<T, Out, GATED>(weights, x + row * x_stride, x_stride, y + row * y_stride, y_stride, row_end - row, first, last);
        item += last - first;
    }
}

}  // namespace linear
