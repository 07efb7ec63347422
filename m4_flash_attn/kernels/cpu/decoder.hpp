// All layers of the model in one parallel region: the threads meet at barriers and never go back to Python in between.
//
//     for each layer:   norm | qkv | rotate + store | attend | o | add + norm | gate, up, silu x up | down
//     then:             add + norm, and the output matrix where every token is its sequence's newest
//
// Called part by part, a step of one token spends a fifth of its time on calls and on waking threads.
//
// What multiplies is a policy, so that other weights run through the same layers. A Linear has
//
//     Weights                                         of one product, as Python hands them over; `columns` and `depth`
//     share<T, Out, GATED>(weights, x, x_stride, y, y_stride, num_rows, thread, num_threads)      as linear::share
#pragma once

#include "attention.hpp"
#include "elementwise.hpp"
#include "linear.hpp"
#include "threads.hpp"

namespace decoder {

template <class Weights> struct Layer {
    Weights qkv, o, gate_up, down;          // gate_up is gated
    const void *input_norm, *post_attention_norm;
    const void *q_norm, *k_norm;            // null where the model has none
};

// The same for the whole life of a model.
template <class Weights> struct Decoder {
    const Layer<Weights>* layers;
    const void* norm;                       // behind the last layer
    Weights head;                           // the output matrix, where `logits` may be asked for
    int32_t num_layers, hidden_size;
    float eps;
};

// x [T, hidden] is changed in place; caches [layers, num_slots, H_kv, D], `layer_size` elements a layer; logits [T, vocab]
// or null.
// Returns 0; or, where the workspace is too small, how many bytes it takes: then nothing was done.
template <class T, class Linear>
int64_t run(const Shape& shape, const Batch& batch, const Decoder<typename Linear::Weights>& decoder, void* x_,
            const void* cos_, const void* signed_sin_, void* k_cache, void* v_cache, long layer_size, float* logits,
            Workspace workspace) {
    typedef typename Linear::Weights Weights;
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
            Linear::template share<T, T, false>(weights, from, weights.depth, to, weights.columns, tokens, thread, threads);
#pragma omp barrier
        };
        for (int i = 0; i < decoder.num_layers; i++) {
            const Layer<Weights>& layer = decoder.layers[i];
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
            Linear::template share<T, T, true>(layer.gate_up, normed, hidden, activated, intermediate, tokens, thread,
                                               threads);
#pragma omp barrier
            multiply(layer.down, activated, delta);
        }
        elementwise::add_rms_norm(first, last, hidden, x, delta, (const T*)decoder.norm, eps, x);
        if (logits) {
#pragma omp barrier
            Linear::template share<T, float, false>(decoder.head, x, hidden, logits, decoder.head.columns, tokens, thread,
                                                    threads);
        }
    }
    return 0;
}

}  // namespace decoder
