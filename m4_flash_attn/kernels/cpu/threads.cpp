// Says how these kernels were compiled, for who asks later (build.py, dtype.py).
#include "threads.hpp"

extern "C" int kernels_have_threads() { return HAVE_THREADS; }

// The widest instructions that they use.
extern "C" const char* kernels_tier() {
#if defined(__AVX512BF16__) && defined(__AVX512F__)
    return "avx512_bf16";
#elif defined(__AVX512F__)
    return "avx512";
#elif defined(__AVX2__) && defined(__FMA__)
    return "avx2";
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    return "neon_bf16";
#elif defined(__aarch64__)
    return "neon";
#else
    return "other";
#endif
}
