// Products with rows of x in bfloat16, as they are.
#include "multiply.hpp"

namespace quantized {

#ifdef HAVE_BF16_PRODUCTS
void multiply_pairs(const Task& task) {
    if (task.weights.bits == 4) Multiply<Pairs, 4>(task).run();
    else Multiply<Pairs, 8>(task).run();
}
#endif

}  // namespace quantized
