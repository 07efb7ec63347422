// All layers of the model in one parallel region: the threads meet at barriers and never go back to Python in between.
//
//     for each layer:   norm | qkv | rotate + store | attend | o | add + norm | gate, up, silu x up | down
//     then:             add + norm, and the output matrix where every token is its sequence's newest
//
// Called part by part, a step of one token spends a fifth of its time on calls and on waking threads.
#include "attention.hpp"
#include "elementwise.hpp"
#include "linear.hpp"
#include "threads.hpp"

namespace {

struct Layer {
    Weights qkv, o, gate_up, down;          // gate_up is gated
    const void *input_norm, *post_attention_norm;
    const void *q_norm, *k_norm;            // null where the model has none
};

// The same for the whole life of a model.
struct Decoder {
    const Layer* layers;
    const void* norm;                       // behind the last layer
    Weights head;                           // the output matrix, where `logits` may be asked for
    int32_t num_layers, hidden_size;
    float eps;
};

template <class T>
int64_t run(const Shape& shape, const Batch& batch, const Decoder& decoder, void* x_, const void* cos_,
            const void* signed_sin_, void* k_cache, void* v_cache, long layer_size, float* logits, Workspace workspace) {
    T* x = (T*)x_;
    const T *cos = (const T*)cos_, *signed_sin = (const T*)signed_sin_;
    const long tokens = batch.num_tokens, hidden = decoder.hidden_size, intermediate = decoder.layers[0].down.depth;
    const long heads = (long)shape.num_heads * shape.head_dim, qkv_width = decoder.layers[0].qkv.columns;
    const float eps = decoder.eps;
    T* normed = workspace.take<T>(tokens * hidden);
    T* qkv = workspace.take<T>(tokens * qkv_width);
    T* attended = workspace.take<T>(tokens * heads);
    T* delta = workspace.take<T>(tokens * hidden);
    T* activated = workspace.take<T>(tokens * intermediate);
    const attention::Work<T> work(workspace, shape, batch, omp_get_max_threads());
    if (!workspace.fits()) return workspace.used;
#pragma omp parallel
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        const long first = tokens * thread / threads, last = tokens * (thread + 1) / threads;
        auto multiply = [&](const Weights& weights, const T* from, T* to) {
            linear::share(weights, from, (int64_t)weights.depth, to, (int64_t)weights.columns, tokens, thread, threads);
#pragma omp barrier
        };
        for (int i = 0; i < decoder.num_layers; i++) {
            const Layer& layer = decoder.layers[i];
            T *k = (T*)k_cache + i * layer_size, *v = (T*)v_cache + i * layer_size;
            elementwise::add_rms_norm(first, last, hidden, x, i > 0 ? delta : nullptr, (const T*)layer.input_norm,
                                      eps, normed);
#pragma omp barrier
            multiply(layer.qkv, normed, qkv);
            elementwise::rotate_store(first, last, shape, batch, qkv, (const T*)layer.q_norm, (const T*)layer.k_norm,
                                      eps, cos, signed_sin, k, v);
#pragma omp barrier
            attention::share(work, shape, batch, qkv, qkv_width, (const T*)k, (const T*)v, attended);
            multiply(layer.o, attended, delta);
            elementwise::add_rms_norm(first, last, hidden, x, delta, (const T*)layer.post_attention_norm, eps,
                                      normed);
#pragma omp barrier
            linear::share<T, T, true>(layer.gate_up, normed, hidden, activated, intermediate, tokens, thread,
                                      threads);
#pragma omp barrier
            multiply(layer.down, activated, delta);
        }
        elementwise::add_rms_norm(first, last, hidden, x, delta, (const T*)decoder.norm, eps, x);
        if (logits) {
#pragma omp barrier
            linear::share(decoder.head, x, hidden, logits, (int64_t)decoder.head.columns, tokens, thread, threads);
        }
    }
    return 0;
}

}  // namespace

// x [T, hidden] is changed in place; caches [layers, num_slots, H_kv, D], `layer_size` elements a layer; logits [T, vocab]
// or null.
// Returns 0; or, where the workspace is too small, how many bytes it takes: then nothing was done.
extern "C" int64_t decoder_layers(const Shape* shape, const Batch* batch, const Decoder* decoder, void* x,
                                  const void* cos, const void* signed_sin, void* k_cache, void* v_cache,
                                  int64_t layer_size, float* logits, void* workspace, int64_t workspace_size) {
    return (shape->is_bf16 ? run<bf16> : run<float>)(*shape, *batch, *decoder, x, cos, signed_sin, k_cache, v_cache,
                                                     layer_size, logits, {(char*)workspace, workspace_size});
}
