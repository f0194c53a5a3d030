// Activations as 8-bit integers, in groups of 32 along a row.
#pragma once

#include <cstdint>

namespace specserve {

constexpr int kGroup = 32;

struct Rows {  // quantised, of `size` values each; `size` is a multiple of kGroup
    int8_t* values;  // [num_rows][size], -127..127
    float* scales;   // [num_rows][size / kGroup]; NaN or inf where a value of the group was
    float* offsets;  // [num_rows][size / kGroup], scale * sum of the group's integers
    int32_t* sums;   // [num_rows][size / kGroup], sum of the group's integers
};

void quantize_row(const float* x, int64_t size, const Rows& rows, int64_t row);

}  // namespace specserve
