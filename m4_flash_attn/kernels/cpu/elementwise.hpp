// Everything between the products: norms, rotary positions, the activation, and the write to the KV cache.
//
// Each is a few additions per number read. Done one operation at a time, every intermediate result goes to memory and
// back; done together, a row stays in registers and in the L1 cache.
#pragma once

#include "batch.hpp"

#include <algorithm>
#include <cmath>

namespace elementwise {

// Rows of `width` numbers that are taken together, when threads share them out.
static inline int grain(long width) { return (int)std::max(1L, 16384 / width); }

static inline float to_float(float x) { return x; }
static inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
static inline void put(float* to, float x) { *to = x; }
static inline uint32_t round_to_bf16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits + 0x7fff + ((bits >> 16) & 1);
}
static inline void put(bf16* to, float x) { to->bits = round_to_bf16(x) >> 16; }
static inline void put(widened* to, float x) {
    const uint32_t bits = round_to_bf16(x) & 0xffff0000u;
    std::memcpy(to, &bits, 4);
}

template <class T> static inline float inverse_rms(const T* x, int n, float eps) {
    vf squares{};
    int i = 0;
    for (; i + VL <= n; i += VL) {
        vf v = load(x + i);
        squares = multiply_add(squares, v, v);
    }
    float total = sum(squares);
    for (; i < n; i++) total += to_float(x[i]) * to_float(x[i]);
    return 1.0f / std::sqrt(total / n + eps);
}

template <class T, class Out> static void scale_row(const T* x, const T* weight, float factor, Out* out, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store(out + i, load(x + i) * factor * load(weight + i));
    for (; i < n; i++) put(out + i, to_float(x[i]) * factor * to_float(weight[i]));
}

template <class T> static void add_row(T* x, const T* y, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store(x + i, load(x + i) + load(y + i));
    for (; i < n; i++) put(x + i, to_float(x[i]) + to_float(y[i]));
}

// The rows [first, last) of x [rows, n] += addend (where there is one), then out = x / rms(x) * weight. `out` may be `x`.
template <class T, class Out>
static void add_rms_norm(long first, long last, int n, T* x, const T* addend, const T* weight, float eps, Out* out) {
    for (long r = first; r < last; r++) {
        T* row = x + r * n;
        if (addend) add_row(row, addend + r * n, n);
        scale_row(row, weight, inverse_rms(row, n, eps), out + r * n, n);
    }
}

// The rows [first, last) of gate_up [rows, 2 n] -> silu(gate) * up [rows, n].
template <class T> static void silu_mul(long first, long last, int n, const T* gate_up, T* out) {
    for (long r = first; r < last; r++) {
        const T *gate = gate_up + r * 2 * n, *up = gate + n;
        T* to = out + r * n;
        int i = 0;
        for (; i + VL <= n; i += VL) {
            store(to + i, silu(load(gate + i)) * load(up + i));
        }
        for (; i < n; i++) {
            float g = to_float(gate[i]);
            put(to + i, g / (1.0f + std::exp(-g)) * to_float(up[i]));
        }
    }
}

// One head: norm (where the model has one), then rotation: each number of its left half with one of its right. `out` may
// be `x`.
template <class T>
static void rotate_head(const T* x, const T* norm, float eps, const T* cos, const T* signed_sin, T* out, int n) {
    const float factor = norm ? inverse_rms(x, n, eps) : 1.0f;
    const int half = n / 2;
    int i = 0;
    for (; i + VL <= half; i += VL) {
        const int j = i + half;
        vf left = load(x + i), right = load(x + j);
        if (norm) left = left * factor * load(norm + i), right = right * factor * load(norm + j);
        store(out + i, left * load(cos + i) + right * load(signed_sin + i));
        store(out + j, right * load(cos + j) + left * load(signed_sin + j));
    }
    for (; i < half; i++) {
        const int j = i + half;
        float left = to_float(x[i]), right = to_float(x[j]);
        if (norm) left = left * factor * to_float(norm[i]), right = right * factor * to_float(norm[j]);
        put(out + i, left * to_float(cos[i]) + right * to_float(signed_sin[i]));
        put(out + j, right * to_float(cos[j]) + left * to_float(signed_sin[j]));
    }
}

// The tokens [first, last): q is normed and rotated in place, k on its way into the cache; v goes there as it is.
template <class T>
static void rotate_store(long first, long last, const Shape& shape, const Batch& batch, T* qkv, const T* q_norm,
                         const T* k_norm, float eps, const T* cos, const T* signed_sin, T* k_cache, T* v_cache) {
    const int D = shape.head_dim, Hq = shape.num_heads, Hkv = shape.num_kv_heads;
    const long width = (long)(Hq + 2 * Hkv) * D, slot_size = (long)Hkv * D;
    for (long t = first; t < last; t++) {
        T* row = qkv + t * width;
        const long slot = batch.slot_mapping[t];
        const T *c = cos + t * D, *s = signed_sin + t * D;
        for (int h = 0; h < Hq; h++) rotate_head(row + h * D, q_norm, eps, c, s, row + h * D, D);
        if (slot < 0) continue;
        for (int h = 0; h < Hkv; h++)
            rotate_head(row + (Hq + h) * D, k_norm, eps, c, s, k_cache + slot * slot_size + h * D, D);
        std::memcpy(v_cache + slot * slot_size, row + (Hq + Hkv) * D, slot_size * sizeof(T));
    }
}

}  // namespace elementwise
