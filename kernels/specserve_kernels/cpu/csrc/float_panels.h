// Products with weights that are bfloat16, float16 or float32.
#pragma once

#include <cstdint>

#include "linear.h"

namespace specserve {

// `multiply_unit` for such weights. The sum of an output is over its inputs in their order.
void multiply_float_unit(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t unit,
                         float* y);

// The weights of output `at` of a panel in one of its tiles.
void unpack_floats(Format format, const uint8_t* tile, int64_t at, float (&values)[kGroup]);

}  // namespace specserve
