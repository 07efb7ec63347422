// Products with rows of x quantised to 8 bits.
#include "multiply.hpp"

namespace quantized {

void multiply_int8(const Task& task) {
    if (task.weights.bits == 4) Multiply<Int8, 4>(task).run();
    else Multiply<Int8, 8>(task).run();
}

}  // namespace quantized

// The widest instructions that multiply integers here.
extern "C" const char* quantized_int8_tier() { return quantized::int8_tier(); }
