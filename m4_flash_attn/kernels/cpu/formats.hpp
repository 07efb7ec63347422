// How weights are stored, and what multiplies them.
//
//     packed  [panels of 2 VL columns][K][2 VL]         fp32
//             [panels of 2 VL columns][K / 2][2 VL][2]  bf16: pairs of neighbours, as vdpbf16ps multiplies them
//
// Without instructions for bf16 the pairs are taken apart in registers: the upper half of each is a float as it is, the
// lower half is shifted. Weights of fewer bits go the same way, with a Format of their own.
#pragma once

#include "vec.hpp"

// A layer as Python hands it over; kernels/cpu/linear.py writes the same layout.
struct Weights {
    const void* packed;     // padded with zeros to whole panels and pairs, aligned to 64 bytes
    const float* bias;      // for all columns of all panels, or null
    int32_t columns, depth; // N, K; of a gated layer N is the number of its outputs, half of the weights' columns
};

namespace linear {

constexpr int PANEL = 2 * VL;

// ---- arithmetic: a step multiplies `elements` neighbours of a row of x with those of VL columns

struct Singles {
    typedef float element;
    typedef vf operand;
    static constexpr int elements = 1;
    static inline operand row(const float* x) { return splat(*x); }
    static inline operand last(const float* x) { return row(x); }
    static inline vf dot(vf sum, operand a, operand b) { return multiply_add(sum, a, b); }
};

#if defined(__AVX512BF16__) && defined(__AVX512F__)
#define HAVE_BF16_PRODUCTS 1
struct Bf16Pairs {
    typedef bf16 element;
    typedef __m512bh operand;
    static constexpr int elements = 2;
    static inline operand row(const bf16* x) { return (__m512bh)_mm512_set1_epi32((int)load_as<uint32_t>(x)); }
    static inline operand last(const bf16* x) { return (__m512bh)_mm512_set1_epi32(x->bits); }
    static inline operand load(const bf16* w) { return (__m512bh)_mm512_loadu_si512(w); }
    static inline vf dot(vf sum, operand a, operand b) { return (vf)_mm512_dpbf16_ps((__m512)sum, a, b); }
};
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAVE_BF16_PRODUCTS 1
struct Bf16Pairs {
    typedef bf16 element;
    typedef bfloat16x8_t operand;
    static constexpr int elements = 2;
    static inline operand row(const bf16* x) { return vreinterpretq_bf16_u32(vdupq_n_u32(load_as<uint32_t>(x))); }
    static inline operand last(const bf16* x) { return vreinterpretq_bf16_u32(vdupq_n_u32(x->bits)); }
    static inline operand load(const bf16* w) { return vreinterpretq_bf16_u32((uint32x4_t)load_as<vu>(w)); }
    static inline vf dot(vf sum, operand a, operand b) { return (vf)vbfdotq_f32((float32x4_t)sum, a, b); }
};
#endif

// ---- formats of weights
//
// A Format is one panel of some layer, and says
//
//     Weights, Arithmetic     of what, and what multiplies it
//     STEP                    elements of K that are read together
//     UNPACK_ROWS             from how many rows on a panel is unpacked first
//     load<I>(k, c)           the operand of elements k + I and following, of the c-th VL columns; I < STEP
//     begin(), bytes(w)       where the panel lies, and how long it is, to fetch it ahead

constexpr int64_t NEVER = int64_t(1) << 62;

struct Float32 {
    typedef ::Weights Weights;
    typedef Singles Arithmetic;
    static constexpr int STEP = 1;
    static constexpr int64_t UNPACK_ROWS = NEVER;
    const float* panel;

    Float32(const Weights& w, int64_t p) : panel((const float*)w.packed + p * w.depth * PANEL) {}
    explicit Float32(const float* panel) : panel(panel) {}
    template <int I> inline vf load(int64_t k, int c) const { return ::load(panel + k * PANEL + c * VL); }
    const char* begin() const { return (const char*)panel; }
    static int64_t bytes(const Weights& w) { return 4 * int64_t(w.depth) * PANEL; }
};

#ifdef HAVE_BF16_PRODUCTS
typedef Bf16Pairs Bf16Arithmetic;
#else
typedef Singles Bf16Arithmetic;     // a bf16 is the upper half of a float: two operations make two of a pair
#endif

struct Bfloat16 {
    typedef ::Weights Weights;
    typedef Bf16Arithmetic Arithmetic;
    static constexpr int STEP = 2;
    static constexpr int64_t UNPACK_ROWS = REGISTERS == 32 ? NEVER : 60;
    const bf16* panel;

    Bfloat16(const Weights& w, int64_t p) : panel((const bf16*)((const char*)w.packed + p * bytes(w))) {}
    template <int I> inline typename Arithmetic::operand load(int64_t k, int c) const {
        const bf16* at = panel + k * PANEL + c * 2 * VL;
#ifdef HAVE_BF16_PRODUCTS
        return Arithmetic::load(at);
#else
        const vu pairs = load_as<vu>(at);
        return I == 0 ? (vf)(pairs << 16) : (vf)(pairs & 0xffff0000u);
#endif
    }
    const char* begin() const { return (const char*)panel; }
    static int64_t bytes(const Weights& w) { return 2 * int64_t((w.depth + 1) / 2 * 2) * PANEL; }
};

// What a format's rows of x are kept as, in a model of type T.
template <class T, class Arithmetic> struct InputOf { typedef T type; };
template <> struct InputOf<bf16, Singles> { typedef widened type; };

}  // namespace linear
