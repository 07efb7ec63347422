// The entry for Python; the work is in attention.hpp.
#include "attention.hpp"

namespace {

template <class T>
int64_t attend(const Shape& shape, const Batch& batch, const void* q, long q_stride, const void* k_cache,
               const void* v_cache, void* out, Workspace workspace) {
    const int threads = threads_worth_using();
    auto* counters = workspace.take<std::atomic<int>>(Team::num_counters(1, threads));
    const attention::Work<T> work(workspace, shape, batch, threads);
    if (!workspace.fits()) return workspace.used;
    Team team(counters, 1, threads);
    team.run([&](Member& member) {
        attention::share(member, work, shape, batch, (const T*)q, q_stride, (const T*)k_cache, (const T*)v_cache, (T*)out);
    });
    return 0;
}

}  // namespace

// q: rows of `q_stride` elements that begin with [H_q, D]; out [T, H_q, D]; caches [num_slots, H_kv, D] of one layer.
// Returns 0; or, where the workspace is too small, how many bytes it takes: then nothing was done.
extern "C" int64_t attend_paged(const Shape* shape, const Batch* batch, const void* q, int64_t q_stride,
                                const void* k_cache, const void* v_cache, void* out, void* workspace,
                                int64_t workspace_size) {
    return (shape->is_bf16 ? attend<bf16> : attend<float>)(*shape, *batch, q, q_stride, k_cache, v_cache, out,
                                                           {(char*)workspace, workspace_size});
}
