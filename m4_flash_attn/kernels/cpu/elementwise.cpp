// Everything between the products: norms, rotary positions, the activation, and the write to the KV cache.
//
// Each is a few additions per number read. Done one operation at a time, every intermediate result goes to memory and
// back; done together, a row stays in registers and in the L1 cache.
#include "batch.hpp"

#include <cmath>
#include <vector>

namespace {

constexpr long SMALL = 16384;       // numbers: below this, waking the other threads costs more than they save

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    to->bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

template <class T> inline float inverse_rms(const T* x, int n, float eps) {
    vf squares{};
    int i = 0;
    for (; i + VL <= n; i += VL) {
        vf v = load(x + i);
        squares += v * v;
    }
    float total = sum(squares);
    for (; i < n; i++) total += to_float(x[i]) * to_float(x[i]);
    return 1.0f / std::sqrt(total / n + eps);
}

template <class T> void scale_row(const T* x, const T* weight, float factor, T* out, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store(out + i, load(x + i) * factor * load(weight + i));
    for (; i < n; i++) put(out + i, to_float(x[i]) * factor * to_float(weight[i]));
}

template <class T> void add_row(T* x, const T* y, int n) {
    int i = 0;
    for (; i + VL <= n; i += VL) store(x + i, load(x + i) + load(y + i));
    for (; i < n; i++) put(x + i, to_float(x[i]) + to_float(y[i]));
}

template <class T> void rms_norm_rows(long rows, int n, T* x, const T* addend, const T* weight, float eps, T* out) {
#pragma omp parallel for schedule(static) if (rows * n > SMALL)
    for (long r = 0; r < rows; r++) {
        T* row = x + r * n;
        if (addend) add_row(row, addend + r * n, n);
        scale_row(row, weight, inverse_rms(row, n, eps), out + r * n, n);
    }
}

template <class T> void silu_mul_rows(long rows, int n, const T* gate_up, T* out) {
#pragma omp parallel for schedule(static) if (rows * n > SMALL)
    for (long r = 0; r < rows; r++) {
        const T *gate = gate_up + r * 2 * n, *up = gate + n;
        T* to = out + r * n;
        int i = 0;
        for (; i + VL <= n; i += VL) {
            // 1 / (1 + e^-g), by way of e^-|g|, which cannot overflow
            vf g = load(gate + i), e = exp2(-LOG2E * max(g, -g));
            vf sigmoid = (g > 0.0f ? splat(1.0f) : e) / (1.0f + e);
            store(to + i, g * sigmoid * load(up + i));
        }
        for (; i < n; i++) {
            float g = to_float(gate[i]);
            put(to + i, g / (1.0f + std::exp(-g)) * to_float(up[i]));
        }
    }
}

// One head: norm (where the model has one), then rotation. `out` may be `x`.
template <class T>
void rotate_head(const T* x, const T* norm, float eps, const T* cos, const T* signed_sin, T* out, int n) {
    float row[1024];
    const float factor = norm ? inverse_rms(x, n, eps) : 1.0f;
    for (int i = 0; i < n; i++) row[i] = norm ? to_float(x[i]) * factor * to_float(norm[i]) : to_float(x[i]);
    for (int i = 0; i < n / 2; i++) {
        put(out + i, row[i] * to_float(cos[i]) + row[n / 2 + i] * to_float(signed_sin[i]));
        put(out + n / 2 + i, row[n / 2 + i] * to_float(cos[n / 2 + i]) + row[i] * to_float(signed_sin[n / 2 + i]));
    }
}

template <class T>
void rotate_store(const Shape& shape, const Batch& batch, T* qkv, const T* q_norm, const T* k_norm, float eps,
                  const T* cos, const T* signed_sin, T* k_cache, T* v_cache) {
    const int D = shape.head_dim, Hq = shape.num_heads, Hkv = shape.num_kv_heads;
    const long width = (long)(Hq + 2 * Hkv) * D, slot_size = (long)Hkv * D;
#pragma omp parallel for schedule(static) if (batch.num_tokens * width > SMALL)
    for (long t = 0; t < batch.num_tokens; t++) {
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

template <class T>
void store_rows(const Shape& shape, const Batch& batch, const T* k, const T* v, long k_stride, long v_stride,
                T* k_cache, T* v_cache) {
    const long slot_size = (long)shape.num_kv_heads * shape.head_dim;
    for (long t = 0; t < batch.num_tokens; t++) {
        const long slot = batch.slot_mapping[t];
        if (slot < 0) continue;
        std::memcpy(k_cache + slot * slot_size, k + t * k_stride, slot_size * sizeof(T));
        std::memcpy(v_cache + slot * slot_size, v + t * v_stride, slot_size * sizeof(T));
    }
}

}  // namespace

// x [rows, n] += addend (where there is one), then out = x / rms(x) * weight.
extern "C" void add_rms_norm(int32_t is_bf16, int64_t rows, int64_t n, void* x, const void* addend,
                             const void* weight, float eps, void* out) {
    if (is_bf16) rms_norm_rows(rows, n, (bf16*)x, (const bf16*)addend, (const bf16*)weight, eps, (bf16*)out);
    else rms_norm_rows(rows, n, (float*)x, (const float*)addend, (const float*)weight, eps, (float*)out);
}

// gate_up [rows, 2 n] -> silu(gate) * up [rows, n].
extern "C" void silu_mul(int32_t is_bf16, int64_t rows, int64_t n, const void* gate_up, void* out) {
    if (is_bf16) silu_mul_rows(rows, n, (const bf16*)gate_up, (bf16*)out);
    else silu_mul_rows(rows, n, (const float*)gate_up, (float*)out);
}

// qkv [T, H_q + 2 H_kv, D], cos and signed_sin [T, D]: q is normed and rotated in place, k on its way into the cache;
// v goes there as it is.
extern "C" void rotate_store_kv(const Shape* shape, const Batch* batch, void* qkv, const void* q_norm,
                                const void* k_norm, float eps, const void* cos, const void* signed_sin, void* k_cache,
                                void* v_cache) {
    if (shape->is_bf16)
        rotate_store(*shape, *batch, (bf16*)qkv, (const bf16*)q_norm, (const bf16*)k_norm, eps, (const bf16*)cos,
                     (const bf16*)signed_sin, (bf16*)k_cache, (bf16*)v_cache);
    else
        rotate_store(*shape, *batch, (float*)qkv, (const float*)q_norm, (const float*)k_norm, eps, (const float*)cos,
                     (const float*)signed_sin, (float*)k_cache, (float*)v_cache);
}

// k, v: rows of `k_stride`, `v_stride` elements, [H_kv, D] each, into the slots of the step's tokens.
extern "C" void store_kv(const Shape* shape, const Batch* batch, const void* k, const void* v, int64_t k_stride,
                         int64_t v_stride, void* k_cache, void* v_cache) {
    if (shape->is_bf16)
        store_rows(*shape, *batch, (const bf16*)k, (const bf16*)v, k_stride, v_stride, (bf16*)k_cache, (bf16*)v_cache);
    else
        store_rows(*shape, *batch, (const float*)k, (const float*)v, k_stride, v_stride, (float*)k_cache,
                   (float*)v_cache);
}
