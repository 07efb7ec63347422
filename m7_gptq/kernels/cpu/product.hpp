// The product of a model of type T: what decoder.hpp multiplies with. Each matrix may have its own bits, or none.
#pragma once

#include "decoder.hpp"
#include "multiply.hpp"

namespace quantized {

constexpr int64_t FEW_ROWS = 4;             // up to here every thread prepares all rows for itself

template <class T> struct Product {
    typedef quantized::Weights Weights;
    typedef linear::Product<T, typename linear::FormatOf<T>::type> Dense;
    typedef typename Dense::Input Input;
    static constexpr bool PAIRS = sizeof(Input) == 2;
    static constexpr int PHASES = 2;

    static int64_t scratch_bytes(const Weights& weights, int64_t num_rows, int threads) {
        if (weights.bits == 0) return 0;
        return (num_rows <= FEW_ROWS ? threads : 1) * Room::bytes(weights, num_rows, sizeof(Input));
    }

    static void expect(Member& member, const Weights& weights, bool gated) {
        const int64_t width = gated ? VL : PANEL;
        const ::Weights dense{weights.packed, weights.bias, weights.columns, weights.depth};
        if (weights.bits == 0) Dense::expect(member, dense, gated);
        else linear::expect_panels(member, weights.packed, (weights.columns + width - 1) / width, Layout(weights).bytes);
    }

    // scratch: as much memory as `scratch_bytes` says for the team's threads.
    template <class Out, bool GATED>
    static void share(Member& member, const Weights& weights, const Input* x, int64_t x_stride, Out* y, int64_t y_stride,
                      int64_t num_rows, char* scratch) {
        if (weights.bits == 0) {
            const ::Weights dense{weights.packed, weights.bias, weights.columns, weights.depth};
            return Dense::template share<Out, GATED>(member, dense, x, x_stride, y, y_stride, num_rows);
        }
        const To<Out, GATED> to{weights, y, y_stride};
        const int64_t panels = (weights.columns + to.WIDTH - 1) / to.WIDTH, panel_bytes = Layout(weights).bytes;
        // The first weights are on their way while x is prepared.
        const char* own = weights.packed + panels * member.thread / member.team.num_threads * panel_bytes;
        linear::Fetch{own, weights.packed + panels * panel_bytes}.until(own + linear::LEAD);
        const bool few = num_rows <= FEW_ROWS;
        if (few) scratch += member.thread * Room::bytes(weights, num_rows, sizeof(Input));
        const Room room(weights, scratch, num_rows, sizeof(Input));
        bool is_prepared = !few;
        auto prepare = [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; r++) prepare_row(weights, x + r * x_stride, room, r);
        };
        if (!few) member.share((int)num_rows, elementwise::grain(weights.inner), prepare);
        const Prepared prepared{room.x_bytes ? (const void*)room.x : x, room.x_bytes ? room.stride : x_stride, room.sums,
                                weights.int8 ? room.scales : nullptr};
        linear::share_panels(member, panels, panel_bytes, weights.inner,
                             weights.inner * (weights.int8 ? 1 : (int64_t)sizeof(Input)), num_rows,
                             [&](int64_t row, int64_t rows, int64_t first, int64_t last, const char*& fetched) {
            if (!is_prepared) prepare(0, num_rows);
            is_prepared = true;
            multiply({weights, prepared, row, rows, first, last, panels, fetched, to.finish, &to});
        });
    }

  private:
    template <class Out, bool GATED> struct To {
        static constexpr int WIDTH = GATED ? VL : PANEL;
        const Weights& weights;
        Out* y;
        int64_t y_stride;

        static void finish(const void* self, int64_t p, const float* sums, int64_t sums_stride, int64_t row,
                           int64_t num_rows) {
            const To& to = *(const To*)self;
            const float* bias = to.weights.bias ? to.weights.bias + p * PANEL : nullptr;
            linear::finish<Out, GATED>(sums, sums_stride, bias, to.y + row * to.y_stride + p * WIDTH, to.y_stride,
                                       num_rows, std::min<int64_t>(WIDTH, to.weights.columns - p * WIDTH));
        }
    };

    static void multiply(const Task& task) {
        if (task.weights.int8) return multiply_int8(task);
#ifdef HAVE_BF16_PRODUCTS
        if (PAIRS) return multiply_pairs(task);
#endif
        multiply_singles(task);
    }
};

// One product, on threads of its own. scratch: for as many threads as OpenMP may use.
template <class T, class Out, bool GATED>
static void run(const Weights& weights, const void* x, int64_t x_stride, void* y, int64_t y_stride, int64_t num_rows,
                char* scratch) {
    constexpr int64_t SMALL = 1 << 16;      // multiplications: below that, waking threads takes longer
    constexpr int MOST_THREADS = 256;
    const bool small = num_rows * weights.columns * weights.depth <= SMALL;
    const int threads = small ? 1 : std::min(MOST_THREADS, threads_worth_using());
    alignas(64) char counters[(MOST_THREADS + 1) * 16 * sizeof(std::atomic<int>)];
    Team team((std::atomic<int>*)counters, Product<T>::PHASES, threads);
    team.run([&](Member& member) {
        Product<T>::template share<Out, GATED>(member, weights, static_cast<const typename Product<T>::Input*>(x),
                                               x_stride, static_cast<Out*>(y), y_stride, num_rows, scratch);
    });
}

}  // namespace quantized
