// All layers of the model in one parallel region: threads share out its phases and never go back to Python in between.
//
//     for each layer:   norm | qkv | rotate + store | attend | o | add + norm | gate, up, silu x up | down
//     then:             add + norm, and the output matrix where every token is its sequence's newest
//
// Called part by part, a step of one token spends a fifth of its time on calls and on waking threads.
//
// What multiplies is a policy, so that other weights run through the same layers: linear::Product over some Format, or
// anything that has its Weights (with `columns` and `depth`), Input and share. One that makes something else of x first
// says how much memory that takes (scratch_bytes), and in how many phases it is done.
#pragma once

#include "attention.hpp"
#include "elementwise.hpp"
#include "linear.hpp"
#include "team.hpp"

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

// Memory for whatever a product makes of x: as much as the one that takes most. No two run at the same time.
template <class Linear>
static int64_t scratch_bytes(const Decoder<typename Linear::Weights>& decoder, bool with_head, int64_t tokens,
                             int threads) {
    int64_t most = with_head ? Linear::scratch_bytes(decoder.head, tokens, threads) : 0;
    for (int i = 0; i < decoder.num_layers; i++) {
        const auto& layer = decoder.layers[i];
        for (const auto* weights : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
            most = std::max(most, Linear::scratch_bytes(*weights, tokens, threads));
    }
    return most;
}

// x [T, hidden] is changed in place; caches [layers, num_slots, H_kv, D], `layer_size` elements a layer; logits
// [T, vocab] or null. They are given where every row goes on to the output matrix: then x is of no use afterwards.
// Returns 0; or, where the workspace is too small, how many bytes it takes: then nothing was done.
template <class T, class Linear>
int64_t run(const Shape& shape, const Batch& batch, const Decoder<typename Linear::Weights>& decoder, void* x_,
            const void* cos_, const void* signed_sin_, void* k_cache, void* v_cache, long layer_size, float* logits,
            Workspace workspace) {
    typedef typename Linear::Weights Weights;
    typedef typename Linear::Input Input;       // what a product reads: T, or T in the room of a float
    T* x = (T*)x_;
    const T *cos = (const T*)cos_, *signed_sin = (const T*)signed_sin_;
    const long tokens = batch.num_tokens, hidden = decoder.hidden_size, intermediate = decoder.layers[0].down.depth;
    const long heads = (long)shape.num_heads * shape.head_dim, qkv_width = decoder.layers[0].qkv.columns;
    const float eps = decoder.eps;
    const int threads = threads_worth_using(), per_product = Linear::PHASES;
    const int phases = (4 + 4 * per_product) * decoder.num_layers + 1 + per_product;
    auto* counters = workspace.take<std::atomic<int>>(Team::num_counters(phases, threads));
    Input* normed = workspace.take<Input>(tokens * hidden);
    T* qkv = workspace.take<T>(tokens * qkv_width);
    Input* attended = workspace.take<Input>(tokens * heads);
    T* delta = workspace.take<T>(tokens * hidden);
    Input* activated = workspace.take<Input>(tokens * intermediate);
    char* scratch = workspace.take<char>(scratch_bytes<Linear>(decoder, logits != nullptr, tokens, threads));
    const attention::Work<T> work(workspace, shape, batch, threads);
    if (!workspace.fits()) return workspace.used;
    Team team(counters, phases, threads);
    team.run([&](Member& member) {
        auto norm = [&](const T* addend, const void* weight, auto* out) {
            member.share(tokens, elementwise::grain(hidden), [&](long first, long last) {
                elementwise::add_rms_norm(first, last, hidden, x, addend, (const T*)weight, eps, out);
            });
        };
        auto multiply = [&](const Weights& weights, const Input* from, T* to, const Weights& next, bool gated = false) {
            Linear::expect(member, next, gated);
            Linear::template share<T, false>(member, weights, from, weights.depth, to, weights.columns, tokens,
                                             scratch);
        };
        Linear::expect(member, decoder.layers[0].qkv, false);
        for (int i = 0; i < decoder.num_layers; i++) {
            const Layer<Weights>& layer = decoder.layers[i];
            const bool is_last = i + 1 == decoder.num_layers;
            T *k = (T*)k_cache + i * layer_size, *v = (T*)v_cache + i * layer_size;
            norm(i > 0 ? delta : nullptr, layer.input_norm, normed);
            multiply(layer.qkv, normed, qkv, layer.o);
            member.share(tokens, elementwise::grain(qkv_width), [&](long first, long last) {
                elementwise::rotate_store(first, last, shape, batch, qkv, (const T*)layer.q_norm,
                                          (const T*)layer.k_norm, eps, cos, signed_sin, k, v);
            });
            attention::share(member, work, shape, batch, qkv, qkv_width, (const T*)k, (const T*)v, attended);
            multiply(layer.o, attended, delta, layer.gate_up, true);
            norm(delta, layer.post_attention_norm, normed);
            Linear::expect(member, layer.down, false);
            Linear::template share<Input, true>(member, layer.gate_up, normed, hidden, activated, intermediate, tokens,
                                                scratch);
            multiply(layer.down, activated, delta, is_last ? layer.down : decoder.layers[i + 1].qkv);
        }
        if (logits) {
            Linear::expect(member, decoder.head, false);
            norm(delta, decoder.norm, normed);
            Linear::template share<float, false>(member, decoder.head, normed, hidden, logits, decoder.head.columns,
                                                 tokens, scratch);
        } else {
            norm(delta, decoder.norm, x);
        }
    });
    return 0;
}

}  // namespace decoder
