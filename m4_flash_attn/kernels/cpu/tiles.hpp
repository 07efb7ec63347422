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
#define HAVE_PAIRS 1
#endif

struct Singles {
    typedef float element;
    static constexpr int per_element = 1;
    static inline vf multiply_add(vf sum, element a, const element* b) { return ::multiply_add(sum, splat(a), load(b)); }
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
    // Unrolled whole: only then are the sums registers.
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) sums[r][n] = alpha ? load(c + r * c_stride + n * VL) * alpha[r] : vf{};
    for (int d = 0; d < depth; d++)
#pragma GCC unroll 6
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++)
                sums[r][n] = Kind::multiply_add(sums[r][n], a[r * a_stride + d], b + d * b_stride + n * VL);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
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
    constexpr int N = REGISTERS == 32 ? 4 : 2;      // 6 x N sums, a row of B and an element of A have to fit
    for (int row = 0; row < rows; row += 6) {
        int height = rows - row < 6 ? rows - row : 6;
        const float* factors = alpha ? alpha + row : nullptr;
        int column = 0;
        for (; column + N * VL <= columns; column += N * VL)
            tile_rows<Kind, N>(height, a + row * a_stride, a_stride, b + column, b_stride,
                               c + row * c_stride + column, c_stride, factors, depth);
        for (; column < columns; column += VL)
            tile_rows<Kind, 1>(height, a + row * a_stride, a_stride, b + column, b_stride,
                               c + row * c_stride + column, c_stride, factors, depth);
    }
}

// VL x VL numbers: rows become columns. Unrolled whole, as the sums above: x lies in registers.
static inline void transpose(vf (&x)[VL]) {
#if defined(__AVX512F__)
    __m512i y[16], z[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32((__m512i)x[2 * i], (__m512i)x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32((__m512i)x[2 * i], (__m512i)x[2 * i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            z[4 * i + 2 * h] = _mm512_unpacklo_epi64(y[4 * i + h], y[4 * i + 2 + h]);
            z[4 * i + 2 * h + 1] = _mm512_unpackhi_epi64(y[4 * i + h], y[4 * i + 2 + h]);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        y[i] = _mm512_shuffle_i32x4(z[i], z[4 + i], 0x88);
        y[4 + i] = _mm512_shuffle_i32x4(z[i], z[4 + i], 0xdd);
        y[8 + i] = _mm512_shuffle_i32x4(z[8 + i], z[12 + i], 0x88);
        y[12 + i] = _mm512_shuffle_i32x4(z[8 + i], z[12 + i], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        x[i] = (vf)_mm512_shuffle_i32x4(y[i], y[8 + i], 0x88);
        x[4 + i] = (vf)_mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0x88);
        x[8 + i] = (vf)_mm512_shuffle_i32x4(y[i], y[8 + i], 0xdd);
        x[12 + i] = (vf)_mm512_shuffle_i32x4(y[4 + i], y[12 + i], 0xdd);
    }
#elif defined(__AVX__)
    __m256 y[8];
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        y[2 * i] = _mm256_unpacklo_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
        y[2 * i + 1] = _mm256_unpackhi_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 2; i++)
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            x[4 * i + 2 * h] = (vf)_mm256_shuffle_ps(y[4 * i + h], y[4 * i + 2 + h], 0x44);
            x[4 * i + 2 * h + 1] = (vf)_mm256_shuffle_ps(y[4 * i + h], y[4 * i + 2 + h], 0xee);
        }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        y[i] = _mm256_permute2f128_ps((__m256)x[i], (__m256)x[4 + i], 0x20);
        y[4 + i] = _mm256_permute2f128_ps((__m256)x[i], (__m256)x[4 + i], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) x[i] = (vf)y[i];
#else
    float rows[VL][VL];
    std::memcpy(rows, x, sizeof(rows));
    for (int i = 0; i < VL; i++)
        for (int j = 0; j < VL; j++) x[i][j] = rows[j][i];
#endif
}
