// The linear layers' entries for Python; the work is in linear.hpp.
#include "linear.hpp"
#include "threads.hpp"

namespace {

constexpr int64_t SMALL = 1 << 16;      // multiplications: below that, waking threads takes longer

template <class T, class Out, bool GATED = false>
void run(const Weights& weights, const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t num_rows) {
#pragma omp parallel if (num_rows * weights.columns * weights.depth > SMALL)
    linear::share<T, Out, GATED>(weights, static_cast<const T*>(x), x_stride, static_cast<Out*>(y), y_stride, num_rows,
                  omp_get_thread_num(), omp_get_num_threads());
}

}  // namespace

// Columns in a panel of packed weights.
extern "C" int32_t linear_panel() { return linear::PANEL; }

extern "C" void linear_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                           int64_t num_rows) {
    run<float, float>(*weights, x, x_stride, y, y_stride, num_rows);
}

extern "C" void linear_bf16(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                            int64_t num_rows) {
    run<bf16, bf16>(*weights, x, x_stride, y, y_stride, num_rows);
}

// bf16 in, fp32 out: logits are not rounded.
extern "C" void linear_bf16_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                int64_t num_rows) {
    run<bf16, float>(*weights, x, x_stride, y, y_stride, num_rows);
}

// silu(x A^T) * (x B^T): the rows of A and B are packed by turns, VL of each in a panel.
extern "C" void linear_gated_f32(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                 int64_t num_rows) {
    run<float, float, true>(*weights, x, x_stride, y, y_stride, num_rows);
}

extern "C" void linear_gated_bf16(const Weights* weights, const void* x, int64_t x_stride, void* y, int64_t y_stride,
                                  int64_t num_rows) {
    run<bf16, bf16, true>(*weights, x, x_stride, y, y_stride, num_rows);
}
