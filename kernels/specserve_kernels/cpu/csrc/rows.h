// Activations in groups of 32 along a row: quantized to 8-bit integers for products with int4 and
// int8 weights, as they are for products with float weights. Rows are stored in blocks, so that the
// values that one tile of weights is multiplied with are contiguous.
#pragma once

#include <cstdint>
#include <memory>

namespace specserve {

constexpr int kGroup = 32;
// Rows of a block. Their sums fit the AVX-512 registers; a tree of 8 drafted nodes fits one block.
constexpr int kRowsTogether = 12;

// One group of inputs, quantized, for all rows of a block.
struct GroupOfRows {
    int8_t* values;  // [height][kGroup], -127..127
    float* scales;   // [height]; NaN where a value of the group was not finite
    float* offsets;  // [height], scale * sum: the factor of a weight's minimum
    int32_t* sums;   // [height], sum of the group's integers
};

// Rows of `size` values each, a multiple of kGroup: `floats` alone, or all but `floats`.
struct Rows {
    int8_t* values;  // [num_blocks][num_groups][height][kGroup]
    float* scales;   // [num_blocks][num_groups][height], as the next two
    float* offsets;
    int32_t* sums;
    float* floats;  // as `values`
    int64_t num_groups;
    int64_t height;  // kRowsTogether, or the number of rows if that is smaller

    GroupOfRows at(int64_t block, int64_t group) const {
        const int64_t from = (block * num_groups + group) * height;
        return {values + from * kGroup, scales + from, offsets + from, sums + from};
    }

    // [height][kGroup], one group of inputs as they are, for all rows of a block.
    float* floats_at(int64_t block, int64_t group) const {
        return floats + (block * num_groups + group) * height * kGroup;
    }

    // The rows from `row` on, which must be a multiple of kRowsTogether.
    Rows from(int64_t row) const {
        const int64_t skipped = row * num_groups;
        if (floats)
            return {nullptr, nullptr, nullptr, nullptr, floats + skipped * kGroup, num_groups, height};
        return {values + skipped * kGroup, scales + skipped, offsets + skipped, sums + skipped,
                nullptr, num_groups, height};
    }
};

// Rows and their memory.
class RowBuffer {
   public:
    // `quantized`: the rows are for products with int4 and int8 weights.
    RowBuffer(int64_t num_rows, int64_t size, bool quantized);

    const Rows& rows() const { return rows_; }

   private:
    std::unique_ptr<int8_t[]> values_;
    std::unique_ptr<float[]> floats_;
    std::unique_ptr<int32_t[]> sums_;
    Rows rows_;
};

// Stores one group of a row, quantized if `rows` are; x points to the values of that group.
void store_group(const float* x, const Rows& rows, int64_t row, int64_t group);

// Stores all groups of a row.
void store_row(const float* x, const Rows& rows, int64_t row);

}  // namespace specserve
