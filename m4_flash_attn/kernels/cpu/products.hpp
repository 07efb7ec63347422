// What the entries for Python call: one product, on threads of its own. The work is in linear.hpp.
//
// The tiles of the products are most of what is compiled, so they stand in one file for each type: products_f32.cpp and
// products_bf16.cpp, which two cores compile at the same time.
#pragma once

#include "decoder.hpp"

namespace linear {

constexpr int64_t SMALL = 1 << 16;      // multiplications: below that, waking threads takes longer
constexpr int MOST_THREADS = 256;

template <class T> using Packed = Product<T, typename FormatOf<T>::type>;

template <class T, class Out, bool GATED>
static void run(const Weights& weights, const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t num_rows) {
    const bool small = num_rows * weights.columns * weights.depth <= SMALL;
    const int threads = small ? 1 : std::min(MOST_THREADS, threads_worth_using());
    alignas(64) char room[(MOST_THREADS + 1) * 16 * sizeof(std::atomic<int>)];
    Team team((std::atomic<int>*)room, 1, threads);
    team.run([&](Member& member) {
        Packed<T>::template share<Out, GATED>(member, weights, static_cast<const typename Packed<T>::Input*>(x), x_stride,
                                              static_cast<Out*>(y), y_stride, num_rows);
    });
}

}  // namespace linear
