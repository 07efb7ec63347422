// The entry for Python; the work is in attention.hpp.
#include "attention.hpp"
#include "threads.hpp"

namespace {

template <class T>
void attend(const Shape& shape, const Batch& batch, const T* q, long q_stride, const T* k_cache, const T* v_cache,
            T* out) {
    const attention::Plan plan = attention::make_plan(shape, batch, omp_get_max_threads());
    std::vector<float> parts(attention::parts_size(plan, shape));
#pragma omp parallel
    attention::share<T, typename attention::KindOf<T>::type>(plan, shape, batch, q, q_stride, k_cache, v_cache, out,
                                                             parts.data());
}

}  // namespace

// q: rows of `q_stride` elements that begin with [H_q, D]; out [T, H_q, D]; caches [num_slots, H_kv, D] of one layer.
extern "C" void attend_paged(const Shape* shape, const Batch* batch, const void* q, int64_t q_stride,
                             const void* k_cache, const void* v_cache, void* out) {
    if (shape->is_bf16)
        attend(*shape, *batch, (const bf16*)q, q_stride, (const bf16*)k_cache, (const bf16*)v_cache, (bf16*)out);
    else
        attend(*shape, *batch, (const float*)q, q_stride, (const float*)k_cache, (const float*)v_cache, (float*)out);
}
