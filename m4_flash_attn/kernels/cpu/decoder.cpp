// The entry for Python, over the packed weights of linear.hpp; the work is in decoder.hpp.
#include "decoder.hpp"

namespace {

struct Packed {
    typedef ::Weights Weights;
    template <class T, class Out, bool GATED>
    static void share(const Weights& weights, const T* x, int64_t x_stride, Out* y, int64_t y_stride, int64_t num_rows,
                      int thread, int num_threads) {
        linear::share<T, Out, GATED>(weights, x, x_stride, y, y_stride, num_rows, thread, num_threads);
    }
};

}  // namespace

// As decoder::run.
extern "C" int64_t decoder_layers(const Shape* shape, const Batch* batch, const decoder::Decoder<Weights>* decoder,
                                  void* x, const void* cos, const void* signed_sin, void* k_cache, void* v_cache,
                                  int64_t layer_size, float* logits, void* workspace, int64_t workspace_size) {
    return (shape->is_bf16 ? decoder::run<bf16, Packed> : decoder::run<float, Packed>)(
        *shape, *batch, *decoder, x, cos, signed_sin, k_cache, v_cache, layer_size, logits,
        {(char*)workspace, workspace_size});
}
