"""C++ of others: what the tests of the build compile."""

THREADS = """#ifdef _OPENMP
extern "C" int kernels_have_threads() { return 1; }
#else
extern "C" int kernels_have_threads() { return 0; }
#endif
"""

# Weights of 8 bits with one scale: another package's format, under m4's product and layers.
OTHER_FORMAT = """#include "decoder.hpp"

struct Int8 {
    struct Weights {
        const int8_t* packed;       // [panels][K][PANEL]
        const float* bias;
        int32_t columns, depth;
        float scale;
    };
    typedef linear::Singles Arithmetic;
    static constexpr int STEP = 1;
    static constexpr int64_t UNPACK_ROWS = 4;
    const int8_t* panel;
    float scale;

    Int8(const Weights& w, int64_t p) : panel(w.packed + p * bytes(w)), scale(w.scale) {}
    template <int I> vf load(int64_t k, int c) const {
        float numbers[VL];
        for (int i = 0; i < VL; i++) numbers[i] = scale * panel[(k + I) * linear::PANEL + c * VL + i];
        return ::load(numbers);
    }
    const char* begin() const { return (const char*)panel; }
    static int64_t bytes(const Weights& w) { return int64_t(w.depth) * linear::PANEL; }
};

extern "C" int panel() { return linear::PANEL; }

extern "C" void int8_linear(const int8_t* packed, float scale, int columns, int depth, const float* x, float* y,
                            int rows) {
    alignas(64) char room[4 * 16 * sizeof(std::atomic<int>)];
    Team team((std::atomic<int>*)room, 1, std::min(3, threads_worth_using()));
    const Int8::Weights weights{packed, nullptr, columns, depth, scale};
    team.run([&](Member& member) {
        linear::Product<float, Int8>::share<float, false>(member, weights, x, depth, y, columns, rows);
    });
}

extern "C" int layers_compile() {
    return decoder::run<float, linear::Product<float, Int8>> != nullptr
        && decoder::run<bf16, linear::Product<bf16, Int8>> != nullptr;
}
"""
