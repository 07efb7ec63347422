// All layers of the model in one parallel region: the threads meet at barriers and never go back to Python in between.
//
//     for each layer:   norm | qkv | rotate + store | attend | o | add + norm | gate, up, silu x up | down
//     in the end:       add + norm
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
    int32_t num_layers, hidden_size;
    float eps;
};

// What the layers work in, for T tokens.
template <class T> struct Buffers {
    T *normed, *qkv, *attended, *delta, *activated;

    Buffers(std::vector<T>& memory, long tokens, const Shape& shape, long hidden, long intermediate) {
        const long heads = (long)shape.num_heads * shape.head_dim, kv = (long)shape.num_kv_heads * shape.head_dim;
        memory.resize(tokens * (2 * hidden + 2 * heads + 2 * kv + intermediate));
        T* next = memory.data();
        auto take = [&](long width) { T* taken = next; next += tokens * width; return taken; };
        normed = take(hidden);
        qkv = take(heads + 2 * kv);
        attended = take(heads);
        delta = take(hidden);
        activated = take(intermediate);
    }
};

template <class T>
void run(const Shape& shape, const Batch& batch, const Decoder& decoder, T* x, const T* cos, const T* signed_sin,
         T* k_cache, T* v_cache, long layer_size) {
    static thread_local std::vector<T> memory;      // kept: fresh pages for every step would cost more than the work
    const long tokens = batch.num_tokens, hidden = decoder.hidden_size, intermediate = decoder.layers[0].down.depth;
    const long qkv_width = decoder.layers[0].qkv.columns;
    const float eps = decoder.eps;
    const Buffers<T> b(memory, tokens, shape, hidden, intermediate);
    const attention::Plan plan = attention::make_plan(shape, batch, omp_get_max_threads());
    std::vector<float> parts_memory(attention::parts_size(plan, shape));
    float* parts = parts_memory.data();
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
            T *k = k_cache + i * layer_size, *v = v_cache + i * layer_size;
            elementwise::add_rms_norm(first, last, hidden, x, i > 0 ? b.delta : nullptr, (const T*)layer.input_norm,
                                      eps, b.normed);
#pragma omp barrier
            multiply(layer.qkv, b.normed, b.qkv);
            elementwise::rotate_store(first, last, shape, batch, b.qkv, (const T*)layer.q_norm, (const T*)layer.k_norm,
                                      eps, cos, signed_sin, k, v);
#pragma omp barrier
            attention::share<T, typename attention::KindOf<T>::type>(plan, shape, batch, b.qkv, qkv_width, k, v,
                                                                     b.attended, parts);
            multiply(layer.o, b.attended, b.delta);
            elementwise::add_rms_norm(first, last, hidden, x, b.delta, (const T*)layer.post_attention_norm, eps,
                                      b.normed);
#pragma omp barrier
            linear::share<T, T, true>(layer.gate_up, b.normed, hidden, b.activated, intermediate, tokens, thread,
                                      threads);
#pragma omp barrier
            multiply(layer.down, b.activated, b.delta);
        }
        elementwise::add_rms_norm(first, last, hidden, x, b.delta, (const T*)decoder.norm, eps, x);
    }
}

}  // namespace

// x [T, hidden] is changed in place; caches [layers, num_slots, H_kv, D], `layer_size` elements a layer.
extern "C" void decoder_layers(const Shape* shape, const Batch* batch, const Decoder* decoder, void* x,
                               const void* cos, const void* signed_sin, void* k_cache, void* v_cache,
                               int64_t layer_size) {
    if (shape->is_bf16)
        run(*shape, *batch, *decoder, (bf16*)x, (const bf16*)cos, (const bf16*)signed_sin, (bf16*)k_cache,
            (bf16*)v_cache, layer_size);
    else
        run(*shape, *batch, *decoder, (float*)x, (const float*)cos, (const float*)signed_sin, (float*)k_cache,
            (float*)v_cache, layer_size);
}
