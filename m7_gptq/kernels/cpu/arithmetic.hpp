// What multiplies rows of x by codes. A step multiplies `elements` neighbours of a row with those of VL columns.
//
//     Int8       four bytes of x and four codes to an integer: exact, so no order of sums can be seen in it
//     Singles    m4's: a float and a code that was made a float
//     Bf16Pairs  m4's: two bf16 and two codes, which are exact in bf16 up to 256
//
// Int8 has a tier for each kind of processor. vpdpbusd adds four products to 32 bits. maddubs adds two products to 16,
// and saturates: so its codes are below 16, and at most 8 sums are added before they are widened. Codes of 8 bits go
// there as two planes, the lower four bits and the upper ones, which count 16 times.
#pragma once

#include "packed.hpp"

namespace quantized {

// The sums of a group are floats, of one chain.
template <class A> struct Exact : A {
    typedef vf sum;
    static constexpr int BLOCK = 0;         // elements of K after which `partial` sums are added up; 0: never
    static constexpr bool SMALL_CODES_ONLY = false;
    // Rows of a tile whose sums, of a group and of all, find room in registers; with bf16 the chains must be more.
    static constexpr int TALLEST = REGISTERS == 32 && A::elements == 2 ? 8 : 6;
    typedef vf partial;
    static inline vf value(sum x) { return x; }
};

typedef int16_t vi16 __attribute__((vector_size(4 * VL)));
typedef uint16_t vu16 __attribute__((vector_size(4 * VL)));

struct Int8 {
    typedef int8_t element;
    typedef vi operand;
    typedef vi sum;
    static constexpr int elements = 4, TALLEST = 6;
    static inline operand row(const int8_t* x) { return load_as<int32_t>(x) - vi{}; }
    static inline vf value(sum x) { return __builtin_convertvector(x, vf); }

#if (defined(__AVX512VNNI__) && defined(__AVX512F__)) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
    typedef vi partial;
    static constexpr int BLOCK = 0;
    static constexpr bool SMALL_CODES_ONLY = false;
    static inline partial dot(partial sum, operand x, operand codes) {
#if defined(__AVX512F__)
        return (vi)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)codes, (__m512i)x);
#else
        return (vi)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)codes, (__m256i)x);
#endif
    }
    static inline sum add(sum, partial part, int) { return part; }
#else
    typedef vi16 partial;
    static constexpr int BLOCK = 32;        // 8 sums of two products: at most 8 * 2 * 15 * 127
    static constexpr bool SMALL_CODES_ONLY = true;
#if defined(__AVX512BW__)
    static inline partial dot(partial sum, operand x, operand codes) {
        return sum + (vi16)_mm512_maddubs_epi16((__m512i)codes, (__m512i)x);
    }
    static inline sum add(sum total, partial part, int worth) {
        return total + (vi)_mm512_madd_epi16((__m512i)part, _mm512_set1_epi16((short)worth));
    }
#elif defined(__AVX2__)
    static inline partial dot(partial sum, operand x, operand codes) {
        return sum + (vi16)_mm256_maddubs_epi16((__m256i)codes, (__m256i)x);
    }
    static inline sum add(sum total, partial part, int worth) {
        return total + (vi)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16((short)worth));
    }
#else
    static inline partial dot(partial sum, operand x, operand codes) {
        const vi16 two_x = (vi16)x;
        const vu16 two = (vu16)codes;
        return sum + (vi16)(two & 0xff) * ((two_x << 8) >> 8) + (vi16)(two >> 8) * (two_x >> 8);
    }
    static inline sum add(sum total, partial part, int worth) {
        return total + (((vi)part << 16 >> 16) + ((vi)part >> 16)) * worth;
    }
#endif
#endif
};

// The names of the tiers, for who asks.
static inline const char* int8_tier() {
#if defined(__AVX512VNNI__) && defined(__AVX512F__)
    return "avx512_vnni";
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
    return "avx_vnni";
#elif defined(__AVX512BW__)
    return "avx512";
#elif defined(__AVX2__)
    return "avx2";
#else
    return "plain";
#endif
}

}  // namespace quantized
