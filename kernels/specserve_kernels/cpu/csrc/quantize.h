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

inline Rows from_row(const Rows& rows, int64_t row, int64_t size) {
    const int64_t groups = row * (size / kGroup);
    return {rows.values + row * size, rows.scales + groups, rows.offsets + groups,
            rows.sums + groups};
}

// One group of the first of `rows`; x has its values alone.
void quantize_group(const float* x, const Rows& rows, int64_t group);

// All groups of the first of `rows`.
void quantize_row(const float* x, int64_t size, const Rows& rows);

}  // namespace specserve
