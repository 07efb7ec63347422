// A register full of floats, written so that any compiler for any machine turns it into its widest instructions.
//
// GCC's and Clang's vector extensions: `a * b + c` on `vf` is one instruction on VL numbers at once. VL is 16 with
// AVX-512, 8 with AVX, 4 elsewhere (NEON, SSE).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int VL = 16;
#elif defined(__AVX__)
constexpr int VL = 8;
#else
constexpr int VL = 4;
#endif

typedef float vf __attribute__((vector_size(4 * VL)));
typedef int32_t vi __attribute__((vector_size(4 * VL)));
typedef uint32_t vu __attribute__((vector_size(4 * VL)));
typedef uint16_t vh __attribute__((vector_size(2 * VL)));

struct bf16 {
    uint16_t bits;      // the upper half of a float
};

template <class V, class T> static inline V load_as(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

static inline vf splat(float x) { return x - vf{}; }

static inline vf load(const float* p) { return load_as<vf>(p); }

static inline vf load(const bf16* p) {
    vu wide = __builtin_convertvector(load_as<vh>(p), vu) << 16;
    return load_as<vf>(&wide);
}

static inline void store(float* p, vf x) { std::memcpy(p, &x, sizeof(x)); }

// To the nearest bf16, ties to the even one. NaN is not handled: nothing here produces one from finite numbers.
static inline void store(bf16* p, vf x) {
    vu bits = load_as<vu>(&x);
    vh half = __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, vh);
    std::memcpy(p, &half, sizeof(half));
}

static inline float sum(vf x) {
    float total = 0;
    for (int i = 0; i < VL; i++) total += x[i];
    return total;
}

static inline float max(vf x) {
    float highest = x[0];
    for (int i = 1; i < VL; i++) highest = x[i] > highest ? x[i] : highest;
    return highest;
}

static inline vf max(vf a, vf b) { return a > b ? a : b; }

// 2^x for x <= 0, NaN for NaN: the integer part goes into the exponent, the rest through its Taylor series; error below 1e-7.
static inline vf exp2(vf x) {
    x = x < -126.0f ? splat(-126.0f) : x;
    vi whole = __builtin_convertvector(x - 0.5f, vi);           // truncates towards 0, so this rounds
    vf f = x - __builtin_convertvector(whole, vf);              // in [-1/2, 1/2]
    vf p = splat(1.5252734e-5f);
    p = p * f + 1.5403530e-4f;
    p = p * f + 1.3333558e-3f;
    p = p * f + 9.6181291e-3f;
    p = p * f + 5.5504109e-2f;
    p = p * f + 0.24022651f;
    p = p * f + 0.69314718f;
    p = p * f + 1.0f;
    vi bits = load_as<vi>(&p) + (whole << 23);
    return load_as<vf>(&bits);
}

constexpr float LOG2E = 1.44269504f;

// x / (1 + e^-x), by way of e^-|x|, which cannot overflow.
static inline vf silu(vf x) {
    const vf e = exp2(-LOG2E * max(x, -x));
    return x * (x > 0.0f ? splat(1.0f) : e) / (1.0f + e);
}
