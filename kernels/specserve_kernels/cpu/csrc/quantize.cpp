#include "quantize.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace specserve {
namespace {

uint32_t magnitude_bits(float x) {  // ordered like |x|, with NaN above everything
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x7fffffffu;
}

}  // namespace

void quantize_group(const float* x, const Rows& rows, int64_t group) {
    uint32_t bits = 0;
    for (int i = 0; i < kGroup; ++i) bits = std::max(bits, magnitude_bits(x[i]));
    float most;
    std::memcpy(&most, &bits, sizeof most);
    const bool finite = bits < 0x7f800000u;
    // The reciprocal of what is hardly there would be infinite: such a group is zero.
    const float inverse = finite && most > 1e-30f ? 127.0f / most : 0.0f;
    int8_t* values = rows.values + group * kGroup;
    int32_t sum = 0;
    for (int i = 0; i < kGroup; ++i) {
        const int32_t value = finite ? int32_t(std::nearbyint(x[i] * inverse)) : 0;
        values[i] = int8_t(value);
        sum += value;
    }
    rows.scales[group] = finite ? most / 127.0f : NAN;
    rows.offsets[group] = rows.scales[group] * float(sum);
    rows.sums[group] = sum;
}

void quantize_row(const float* x, int64_t size, const Rows& rows) {
    for (int64_t group = 0; group < size / kGroup; ++group)
        quantize_group(x + group * kGroup, rows, group);
}

}  // namespace specserve
