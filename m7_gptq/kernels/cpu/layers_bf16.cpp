// Products of bfloat16 models, and all layers around them.
#include "product.hpp"

namespace quantized {

// Columns in a panel.
extern "C" int32_t quantized_panel() { return quantized::PANEL; }

// Whether rows of x in bfloat16 are handed over as floats: this processor has no products of bf16.
extern "C" int32_t quantized_widens() { return sizeof(Product<bf16>::Input) == sizeof(float); }

// Memory that a product of a number of rows works in, in a model of bfloat16 or float32.
extern "C" int64_t quantized_scratch_bytes(const Weights* weights, int64_t num_rows, int32_t is_bf16) {
    const int threads = omp_get_max_threads();
    return is_bf16 ? quantized::Product<bf16>::scratch_bytes(*weights, num_rows, threads)
                   : quantized::Product<float>::scratch_bytes(*weights, num_rows, threads);
}

extern "C" void quantized_bf16(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                               int64_t num_rows, void* scratch) {
    quantized::run<bf16, bf16, false>(*weights, x, x_stride, y, y_stride, num_rows, (char*)scratch);
}

// bf16 in, fp32 out: logits are not rounded.
extern "C" void quantized_bf16_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                   int64_t num_rows, void* scratch) {
    quantized::run<bf16, float, false>(*weights, x, x_stride, y, y_stride, num_rows, (char*)scratch);
}

extern "C" void quantized_gated_bf16(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                     int64_t num_rows, void* scratch) {
    quantized::run<bf16, bf16, true>(*weights, x, x_stride, y, y_stride, num_rows, (char*)scratch);
}

// As decoder::run.
extern "C" int64_t decoder_layers_bf16(const Shape* shape, const Batch* batch, const decoder::Decoder<Weights>* decoder,
                                       void* x, const void* cos, const void* signed_sin, void* k_cache, void* v_cache,
                                       int64_t layer_size, float* logits, void* workspace, int64_t workspace_size) {
    return decoder::run<bf16, quantized::Product<bf16>>(*shape, *batch, *decoder, x, cos, signed_sin, k_cache, v_cache,
                                                        layer_size, logits, {(char*)workspace, workspace_size});
}

}  // namespace quantized
