// The products of float32 models, and all layers around them.
#include "products.hpp"

extern "C" void linear_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                           int64_t num_rows) {
    linear::run<float, float, false>(*weights, x, x_stride, y, y_stride, num_rows);
}

// silu(x A^T) * (x B^T): the rows of A and B are packed by turns, VL of each in a panel.
extern "C" void linear_gated_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                 int64_t num_rows) {
    linear::run<float, float, true>(*weights, x, x_stride, y, y_stride, num_rows);
}

// As decoder::run.
extern "C" int64_t decoder_layers_f32(const Shape* shape, const Batch* batch, const decoder::Decoder<Weights>* decoder,
                                      void* x, const void* cos, const void* signed_sin, void* k_cache, void* v_cache,
                                      int64_t layer_size, float* logits, void* workspace, int64_t workspace_size) {
    return decoder::run<float, linear::Packed<float>>(*shape, *batch, *decoder, x, cos, signed_sin, k_cache, v_cache, layer_size,
                                                logits, {(char*)workspace, workspace_size});
}
