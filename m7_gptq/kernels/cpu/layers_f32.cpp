// Products of float32 models, and all layers around them.
#include "product.hpp"

namespace quantized {

extern "C" void quantized_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                              int64_t num_rows, void* scratch) {
    quantized::run<float, float, false>(*weights, x, x_stride, y, y_stride, num_rows, (char*)scratch);
}

extern "C" void quantized_gated_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                    int64_t num_rows, void* scratch) {
    quantized::run<float, float, true>(*weights, x, x_stride, y, y_stride, num_rows, (char*)scratch);
}

// As decoder::run.
extern "C" int64_t decoder_layers_f32(const Shape* shape, const Batch* batch, const decoder::Decoder<Weights>* decoder,
                                      void* x, const void* cos, const void* signed_sin, void* k_cache, void* v_cache,
                                      int64_t layer_size, float* logits, void* workspace, int64_t workspace_size) {
    return decoder::run<float, quantized::Product<float>>(*shape, *batch, *decoder, x, cos, signed_sin, k_cache, v_cache,
                                                          layer_size, logits, {(char*)workspace, workspace_size});
}

}  // namespace quantized
