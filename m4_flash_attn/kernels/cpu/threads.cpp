// Says how these kernels were compiled, for who asks later (build.py).
#include "threads.hpp"

extern "C" int kernels_have_threads() { return HAVE_THREADS; }
