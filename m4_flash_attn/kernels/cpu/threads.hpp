// OpenMP, or what stands for it where the compiler has none: one thread.
#pragma once

#ifdef _OPENMP
constexpr bool HAVE_THREADS = true;
// Declared here, not included: Apple's compiler understands OpenMP, and torch brings its library, but nobody the header.
extern "C" {
int omp_get_max_threads(void);
int omp_get_num_threads(void);
int omp_get_thread_num(void);
}
#else
constexpr bool HAVE_THREADS = false;
static inline int omp_get_max_threads() { return 1; }
static inline int omp_get_num_threads() { return 1; }
static inline int omp_get_thread_num() { return 0; }
#endif
