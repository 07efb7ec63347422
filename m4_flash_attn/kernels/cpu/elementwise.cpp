// The entries for Python; the work is in elementwise.hpp.
#include "elementwise.hpp"
#include "pace.hpp"

namespace {

constexpr long SMALL = 16384;       // numbers: below this, waking the other threads costs more than they save

// f(first, last) on each thread's rows.
template <class F> void share_rows(long rows, long width, F&& f) {
    const int wanted = rows * width > SMALL ? threads_worth_using() : 1;
#pragma omp parallel num_threads(wanted)
    {
        const long thread = omp_get_thread_num(), threads = omp_get_num_threads();
        f(rows * thread / threads, rows * (thread + 1) / threads);
    }
}

template <class T> void norm(int64_t rows, int64_t n, void* x, const void* addend, const void* weight, float eps, void* out) {
    share_rows(rows, n, [=](long first, long last) {
        elementwise::add_rms_norm(first, last, n, (T*)x, (const T*)addend, (const T*)weight, eps, (T*)out);
    });
}

template <class T> void silu(int64_t rows, int64_t n, const void* gate_up, void* out) {
    share_rows(rows, n, [=](long first, long last) {
        elementwise::silu_mul(first, last, n, (const T*)gate_up, (T*)out);
    });
}

template <class T>
void rotate(const Shape& shape, const Batch& batch, void* qkv, const void* q_norm, const void* k_norm, float eps,
            const void* cos, const void* signed_sin, void* k_cache, void* v_cache) {
    const long width = (long)(shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim;
    share_rows(batch.num_tokens, width, [&](long first, long last) {
        elementwise::rotate_store(first, last, shape, batch, (T*)qkv, (const T*)q_norm, (const T*)k_norm, eps,
                                  (const T*)cos, (const T*)signed_sin, (T*)k_cache, (T*)v_cache);
    });
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
    (is_bf16 ? norm<bf16> : norm<float>)(rows, n, x, addend, weight, eps, out);
}

// gate_up [rows, 2 n] -> silu(gate) * up [rows, n].
extern "C" void silu_mul(int32_t is_bf16, int64_t rows, int64_t n, const void* gate_up, void* out) {
    (is_bf16 ? silu<bf16> : silu<float>)(rows, n, gate_up, out);
}

// qkv [T, H_q + 2 H_kv, D], cos and signed_sin [T, D]: see elementwise.hpp.
extern "C" void rotate_store_kv(const Shape* shape, const Batch* batch, void* qkv, const void* q_norm,
                                const void* k_norm, float eps, const void* cos, const void* signed_sin, void* k_cache,
                                void* v_cache) {
    (shape->is_bf16 ? rotate<bf16> : rotate<float>)(*shape, *batch, qkv, q_norm, k_norm, eps, cos, signed_sin, k_cache,
                                                    v_cache);
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
