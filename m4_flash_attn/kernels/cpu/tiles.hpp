// Products of small tiles, the inner loops of attention, in two kinds of arithmetic.
//
//     C [rows, 16 n]  =  C * alpha  +  A [rows, depth] x B [depth, columns]
//
// Singles:  one number per element of A and B; works everywhere.
// Pairs:    two neighbouring bf16 per element, multiplied and added to a float in one instruction (AVX512-BF16).
//           Twice the numbers per register, so half the depth.
#pragma once

#include "vec.hpp"

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#include <immintrin.h>
#define HAVE_PAIRS 1
#endif

struct Singles {
    typedef float element;
    static constexpr int per_element = 1;
    static inline vf multiply_add(vf sum, element a, const element* b) { return sum + a * load(b); }
};

#ifdef HAVE_PAIRS
struct Pairs {
    typedef uint32_t element;
    static constexpr int per_element = 2;
    static inline vf multiply_add(vf sum, element a, const element* b) {
        return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32((int)a), (__m512bh)_mm512_loadu_si512(b));
    }
};
#endif

// R rows and N registers of columns: R * N sums stay in registers while the depth runs.
template <class Kind, int R, int N>
static inline void tile(const typename Kind::element* a, long a_stride, const typename Kind::element* b, long b_stride,
                        float* c, long c_stride, const float* alpha, int depth) {
    vf sums[R][N];
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) sums[r][n] = alpha ? load(c + r * c_stride + n * VL) * alpha[r] : vf{};
    for (int d = 0; d < depth; d++)
        for (int r = 0; r < R; r++)
            for (int n = 0; n < N; n++)
                sums[r][n] = Kind::multiply_add(sums[r][n], a[r * a_stride + d], b + d * b_stride + n * VL);
    for (int r = 0; r < R; r++)
        for (int n = 0; n < N; n++) store(c + r * c_stride + n * VL, sums[r][n]);
}

template <class Kind, int N>
static inline void tile_rows(int rows, const typename Kind::element* a, long a_stride, const typename Kind::element* b,
                             long b_stride, float* c, long c_stride, const float* alpha, int depth) {
    switch (rows) {
        case 1: return tile<Kind, 1, N>(a, a_stride, b, b_stride, c, c_stride, alpha, depth);
        case 2: return tile<Kind, 2, N>(a, a_stride, b, b_stride, c, c_stride, alpha, depth);
        case 3: return tile<Kind, 3, N>(a, a_stride, b, b_stride, c, c_stride, alpha, depth);
        case 4: return tile<Kind, 4, N>(a, a_stride, b, b_stride, c, c_stride, alpha, depth);
        case 5: return tile<Kind, 5, N>(a, a_stride, b, b_stride, c, c_stride, alpha, depth);
        default: return tile<Kind, 6, N>(a, a_stride, b, b_stride, c, c_stride, alpha, depth);
    }
}

// C [rows, columns] = C * alpha + A x B, or A x B where `alpha` is null. `columns` is a multiple of VL.
template <class Kind>
static void multiply(int rows, int columns, int depth, const typename Kind::element* a, long a_stride,
                     const typename Kind::element* b, long b_stride, float* c, long c_stride, const float* alpha) {
    for (int row = 0; row < rows; row += 6) {
        int height = rows - row < 6 ? rows - row : 6;
        const float* factors = alpha ? alpha + row : nullptr;
        int column = 0;
        for (; column + 4 * VL <= columns; column += 4 * VL)
            tile_rows<Kind, 4>(height, a + row * a_stride, a_stride, b + column, b_stride,
                               c + row * c_stride + column, c_stride, factors, depth);
        for (; column < columns; column += VL)
            tile_rows<Kind, 1>(height, a + row * a_stride, a_stride, b + column, b_stride,
                               c + row * c_stride + column, c_stride, factors, depth);
    }
}
