// A register full of floats, written so that any compiler for any machine turns it into its widest instructions.
//
// GCC's and Clang's vector extensions: `a * b + c` on `vf` is one instruction on VL numbers at once. VL is 16 with
// AVX-512, 8 with AVX, 4 elsewhere (NEON, SSE).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int REGISTERS = 32;
#else
constexpr int REGISTERS = 16;
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

struct bf16 {
    uint16_t bits;      // the upper half of a float
};

// A bf16 in the room of a float: what is multiplied many times is widened once.
struct widened {
    float value;
};

template <class V, class T> static inline V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

static inline vf splat(float x) { return x - vf{}; }

static inline vf load(const float* p) { return load_as<vf>(p); }

static inline vf load(const bf16* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_as<__m256i>(p)), 16);   // GCC makes halves of the other
#else
    vu wide = __builtin_convertvector(load_as<vh>(p), vu) << 16;
    return load_as<vf>(&wide);
#endif
}

static inline vf load(const widened* p) { return load_as<vf>(p); }

static inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }

// To the nearest bf16, ties to the even one. NaN is not handled: nothing here produces one from finite numbers.
static inline vu round_to_bf16(vf x) {
    vu bits = load_as<vu>(&x);
    return bits + 0x7fff + ((bits >> 16) & 1);
}

static inline void store(bf16* p, vf x) {
    vh half = __builtin_convertvector(round_to_bf16(x) >> 16, vh);
    std::memcpy(p, &half, sizeof(half));
}

static inline void store(widened* p, vf x) {
    vu rounded = round_to_bf16(x) & 0xffff0000u;
    std::memcpy(p, &rounded, sizeof(rounded));
}

// One instruction by name. Written as `sum + a * b` it is two roundings (the kernels are compiled so that no compiler
// makes it one here and two there), and half the speed.
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

// Sums have one order, written down: nothing here is compiled with leave to change it.
typedef float v4 __attribute__((vector_size(16)));

static inline float sum(vf x) {
    v4 part[VL / 4];
    std::memcpy(part, &x, sizeof(x));
    for (int i = 1; i < VL / 4; i++) part[0] += part[i];
    return (part[0][0] + part[0][1]) + (part[0][2] + part[0][3]);
}

static inline float max(vf x) {
    v4 part[VL / 4];
    std::memcpy(part, &x, sizeof(x));
    for (int i = 1; i < VL / 4; i++) part[0] = part[0] > part[i] ? part[0] : part[i];
    float highest = part[0][0];
    for (int i = 1; i < 4; i++) highest = part[0][i] > highest ? part[0][i] : highest;
    return highest;
}

static inline vf max(vf a, vf b) { return a > b ? a : b; }

// 2^x for x <= 0, NaN for NaN: the integer part goes into the exponent, the rest through its Taylor series; error below 1e-7.
static inline vf exp2(vf x) {
    x = x < -126.0f ? splat(-126.0f) : x;
    vi whole = __builtin_convertvector(x - 0.5f, vi);           // truncates towards 0, so this rounds
    vf f = x - __builtin_convertvector(whole, vf);              // in [-1/2, 1/2]
    vf p = splat(1.5252734e-5f);
    p = multiply_add(splat(1.5403530e-4f), p, f);
    p = multiply_add(splat(1.3333558e-3f), p, f);
    p = multiply_add(splat(9.6181291e-3f), p, f);
    p = multiply_add(splat(5.5504109e-2f), p, f);
    p = multiply_add(splat(0.24022651f), p, f);
    p = multiply_add(splat(0.69314718f), p, f);
    p = multiply_add(splat(1.0f), p, f);
    vi bits = load_as<vi>(&p) + (whole << 23);
    return load_as<vf>(&bits);
}

constexpr float LOG2E = 1.44269504f;

// x / (1 + e^-x), by way of e^-|x|, which cannot overflow.
static inline vf silu(vf x) {
    const vf e = exp2(-LOG2E * max(x, -x));
    return x * (x > 0.0f ? splat(1.0f) : e) / (1.0f + e);
}
