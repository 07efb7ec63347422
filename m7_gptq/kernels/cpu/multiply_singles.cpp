// Products with rows of x in float32, as they are.
#include "multiply.hpp"

namespace quantized {

void multiply_singles(const Task& task) {
    if (task.weights.bits == 4) Multiply<Singles, 4>(task).run();
    else Multiply<Singles, 8>(task).run();
}

}  // namespace quantized
