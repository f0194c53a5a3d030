// Activations as 8-bit integers, in groups of 32 along a row; rows stand in blocks, so that what a tile
// of weights is multiplied with lies together.
#pragma once

#include <cstdint>
#include <memory>

namespace specserve {

constexpr int kGroup = 32;
constexpr int kRowsTogether = 12;  // whose sums fit the registers of AVX-512; room for a tree of eight

// The same group of the rows of a block.
struct GroupOfRows {
    int8_t* values;  // [height][kGroup], -127..127
    float* scales;   // [height]; NaN where a value of the group was not finite
    float* offsets;  // [height], scale * sum
    int32_t* sums;   // [height], of the group's integers
};

// Quantised rows of `size` values each, a multiple of kGroup.
struct Rows {
    int8_t* values;  // [num_blocks][num_groups][height][kGroup]
    float* scales;   // [num_blocks][num_groups][height], and so are these:
    float* offsets;
    int32_t* sums;
    int64_t num_groups;
    int64_t height;  // kRowsTogether, or fewer if these are all rows

    GroupOfRows at(int64_t block, int64_t group) const {
        const int64_t from = (block * num_groups + group) * height;
        return {values + from * kGroup, scales + from, offsets + from, sums + from};
    }

    // Those from `row` on, a multiple of kRowsTogether.
    Rows from(int64_t row) const {
        const int64_t skipped = row * num_groups;
        return {values + skipped * kGroup, scales + skipped, offsets + skipped, sums + skipped,
                num_groups, height};
    }
};

// Quantised rows and their memory.
class RowBuffer {
   public:
    RowBuffer(int64_t num_rows, int64_t size);

    const Rows& rows() const { return rows_; }

   private:
    std::unique_ptr<int8_t[]> values_;
    std::unique_ptr<float[]> floats_;
    std::unique_ptr<int32_t[]> sums_;
    Rows rows_;
};

// One group of a row; x has its values alone.
void quantize_group(const float* x, const Rows& rows, int64_t row, int64_t group);

// All groups of a row.
void quantize_row(const float* x, const Rows& rows, int64_t row);

}  // namespace specserve
