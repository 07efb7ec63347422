// A panel of codes as the operands of some arithmetic, either straight from the packed bytes or unpacked before.
//
//     Packed<A, BITS>         the packed panel, taken apart in registers: where few rows share the work
//     Unpacked<A>             a slice of it in the L1 cache, as A multiplies it: where many do
//
// All have    STEP            elements of K that are read together
//             load<I>(k, c)   the operand of elements k + I and following, of the c-th VL columns; I < STEP
//             PLANES          parts that a code is multiplied in; the later ones count `worth`
#pragma once

#include "arithmetic.hpp"

namespace quantized {

typedef Exact<linear::Singles> Singles;
#if defined(HAVE_BF16_PRODUCTS)
typedef Exact<linear::Bf16Pairs> Pairs;
#endif

// ---- a register of packed lanes -> an operand. `AT` counts the elements of a lane.

template <class A, int BITS, int AT> struct Codes;

template <int AT> struct Codes<Int8, 4, AT> {
    static inline vi of(vu lanes) { return (vi)((AT == 0 ? lanes : lanes >> 4) & 0x0f0f0f0fu); }
};
template <int AT> struct Codes<Int8, 8, AT> {
    static inline vi of(vu lanes) { return (vi)lanes; }
};

// The byte of element AT, and how far it is shifted.
constexpr int shift_of(int bits, int at) { return 8 * (at % 4 % 2 * 2 + at % 4 / 2) + (bits == 4 ? at / 4 * 4 : 0); }

template <int BITS, int AT> struct Codes<Singles, BITS, AT> {
    static inline vf of(vu lanes) {
        const vu codes = (lanes >> shift_of(BITS, AT)) & (BITS == 4 ? 0xfu : 0xffu);
        return __builtin_convertvector((vi)codes, vf);
    }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
template <int AT> struct Codes<Pairs, 4, AT> {
    // A table of 16 numbers, twice: so that bit 4 of an index, the neighbour's, does not matter.
    static inline __m512bh of(vu lanes) {
        alignas(64) static constexpr uint16_t NUMBERS[32] = {
            0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150,
            0x4160, 0x4170, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0x4100, 0x4110, 0x4120, 0x4130,
            0x4140, 0x4150, 0x4160, 0x4170};
        constexpr int SHIFT = (AT & 2 ? 8 : 0) + (AT & 4 ? 4 : 0);
        const __m512i index = SHIFT ? _mm512_srli_epi16((__m512i)lanes, SHIFT) : (__m512i)lanes;
        return (__m512bh)_mm512_permutexvar_epi16(index, _mm512_load_si512(NUMBERS));
    }
};
template <int AT> struct Codes<Pairs, 8, AT> {
    // The float of a whole number up to 256 has nothing in its lower half.
    static inline __m512bh of(vu lanes) {
        const vf even = Codes<Singles, 8, AT>::of(lanes), odd = Codes<Singles, 8, AT + 1>::of(lanes);
        return (__m512bh)((load_as<vu>(&even) >> 16) | load_as<vu>(&odd));
    }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <int BITS, int AT> struct Codes<Pairs, BITS, AT> {
    static inline bfloat16x8_t of(vu lanes) {
        const vf even = Codes<Singles, BITS, AT>::of(lanes), odd = Codes<Singles, BITS, AT + 1>::of(lanes);
        return vreinterpretq_bf16_u32((uint32x4_t)((load_as<vu>(&even) >> 16) | load_as<vu>(&odd)));
    }
};
#endif

// ---- panels

template <class A, int BITS_> struct Packed {
    typedef A Arithmetic;
    static constexpr int BITS = BITS_, STEP = 32 / BITS;
    static constexpr int PLANES = BITS == 8 && A::SMALL_CODES_ONLY ? 2 : 1;
    const char* codes;

    Packed(const Weights& w, const Layout& layout, int64_t p) : codes(w.packed + p * layout.bytes + layout.codes) {}
    template <int I, int PLANE = 0> inline typename A::operand load(int64_t k, int c) const {
        const vu lanes = load_as<vu>(codes + k * PANEL * BITS / 8 + c * 4 * VL);
        if constexpr (PLANES == 2) return (typename A::operand)((PLANE == 0 ? lanes : lanes >> 4) & 0x0f0f0f0fu);
        else return Codes<A, BITS, I>::of(lanes);
    }
};

// A slice, from element `first` of K on, in the order [k / elements][2][VL], 4 bytes each.
template <class A> struct Unpacked {
    typedef A Arithmetic;
    static constexpr int STEP = A::elements, PLANES = 1;
    static constexpr int64_t BYTES = PANEL * 4 / A::elements;       // of an element of K
    const char* begin;          // where K begins, if it were all there

    Unpacked(const char* slice, int64_t first) : begin(slice - first * BYTES) {}
    template <int I, int PLANE = 0> inline typename A::operand load(int64_t k, int c) const {
        return load_as<typename A::operand>(begin + k * BYTES + c * 4 * VL);
    }
};

// The elements [first, end) of K, multiples of a step, into `to`.
template <class P> static void unpack(const P& panel, int64_t first, int64_t end, char* to) {
    typedef typename P::Arithmetic A;
    for (int64_t k = first; k < end; k += P::STEP)
        linear::steps<P::STEP, A::elements>([&](auto index) {
            constexpr int I = decltype(index)::value;
            for (int c = 0; c < 2; c++, to += 4 * VL) {
                const auto operand = panel.template load<I>(k, c);
                std::memcpy(to, &operand, sizeof(operand));
            }
        });
}

}  // namespace quantized
