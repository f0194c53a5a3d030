#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "lanes.h"

namespace specserve {

RowBuffer::RowBuffer(int64_t num_rows, int64_t size, bool quantized) {
    const int64_t num_groups = size / kGroup;
    const int64_t num_blocks = (num_rows + kRowsTogether - 1) / kRowsTogether;
    const int64_t height = std::min<int64_t>(num_rows, kRowsTogether);
    const int64_t count = num_blocks * num_groups * height;
    if (!quantized) {
        floats_.reset(new float[count * kGroup]);
        rows_ = {nullptr, nullptr, nullptr, nullptr, floats_.get(), num_groups, height};
        return;
    }
    values_.reset(new int8_t[count * kGroup]);
    floats_.reset(new float[2 * count]);
    sums_.reset(new int32_t[count]);
    rows_ = {values_.get(), floats_.get(), floats_.get() + count, sums_.get(),
             nullptr,       num_groups,    height};
}

void store_group(const float* x, const Rows& rows, int64_t row, int64_t group) {
    const int64_t block = row / kRowsTogether, at = row % kRowsTogether;
    if (rows.floats) {
        std::memcpy(rows.floats_at(block, group) + at * kGroup, x, kGroup * sizeof *x);
        return;
    }
    const GroupOfRows to = rows.at(block, group);
    Ints bits = magnitude_bits(load(x));
    for (int i = kLanes; i < kGroup; i += kLanes) bits = max(bits, magnitude_bits(load(x + i)));
    const int32_t most_bits = lane_max(bits);
    float most;
    std::memcpy(&most, &most_bits, sizeof most);
    const bool finite = most_bits < 0x7f800000;
    int8_t* values = to.values + at * kGroup;
    // 127 / most might be infinite if `most` is tiny; such a group is quantized to zero.
    int32_t sum = 0;
    if (finite && most > 1e-30f) {
        const Floats inverse = broadcast(127.0f / most);
        Ints total = zero_ints();
        for (int i = 0; i < kGroup; i += kLanes) {
            const Ints rounded = to_nearest(mul(load(x + i), inverse));
            store_bytes(values + i, rounded);
            total = add(total, rounded);
        }
        sum = lane_sum(total);
    } else {
        std::memset(values, 0, kGroup);
    }
    to.scales[at] = finite ? most / 127.0f : NAN;
    to.offsets[at] = to.scales[at] * float(sum);
    to.sums[at] = sum;
}

void store_row(const float* x, const Rows& rows, int64_t row) {
    for (int64_t group = 0; group < rows.num_groups; ++group)
        store_group(x + group * kGroup, rows, row, group);
}

}  // namespace specserve
