// The products of bfloat16 models, and all layers around them.
#include "products.hpp"

// Columns in a panel of packed weights, of either type.
extern "C" int32_t linear_panel() { return linear::PANEL; }

// Whether rows of x are handed over as floats: this processor has no products of bf16.
extern "C" int32_t linear_widens() { return sizeof(linear::Packed<bf16>::Input) == sizeof(float); }

extern "C" void linear_bf16(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                            int64_t num_rows) {
    linear::run<bf16, bf16, false>(*weights, x, x_stride, y, y_stride, num_rows);
}

// bf16 in, fp32 out: logits are not rounded.
extern "C" void linear_bf16_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                int64_t num_rows) {
    linear::run<bf16, float, false>(*weights, x, x_stride, y, y_stride, num_rows);
}

// silu(x A^T) * (x B^T): the rows of A and B are packed by turns, VL of each in a panel.
extern "C" void linear_gated_bf16(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                  int64_t num_rows) {
    linear::run<bf16, bf16, true>(*weights, x, x_stride, y, y_stride, num_rows);
}

// As decoder::run.
extern "C" int64_t decoder_layers_bf16(const Shape* shape, const Batch* batch, const decoder::Decoder<Weights>* decoder,
                                       void* x, const void* cos, const void* signed_sin, void* k_cache, void* v_cache,
                                       int64_t layer_size, float* logits, void* workspace, int64_t workspace_size) {
    return decoder::run<bf16, linear::Packed<bf16>>(*shape, *batch, *decoder, x, cos, signed_sin, k_cache, v_cache, layer_size,
                                                logits, {(char*)workspace, workspace_size});
}
