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

void quantize_row(const float* x, int64_t size, const Rows& rows, int64_t row) {
    const int64_t num_groups = size / kGroup;
    int8_t* values = rows.values + row * size;
    for (int64_t g = 0; g < num_groups; ++g) {
        const float* from = x + g * kGroup;
        uint32_t bits = 0;
        for (int i = 0; i < kGroup; ++i) bits = std::max(bits, magnitude_bits(from[i]));
        float most;
        std::memcpy(&most, &bits, sizeof most);
        const bool finite = bits < 0x7f800000u;
        // The reciprocal of what is hardly there would be infinite: such a group is zero.
        const float inverse = finite && most > 1e-30f ? 127.0f / most : 0.0f;
        int32_t sum = 0;
        for (int i = 0; i < kGroup; ++i) {
            const int32_t value = finite ? int32_t(std::nearbyint(from[i] * inverse)) : 0;
            values[g * kGroup + i] = int8_t(value);
            sum += value;
        }
        const int64_t at = row * num_groups + g;
        rows.scales[at] = finite ? most / 127.0f : NAN;
        rows.offsets[at] = rows.scales[at] * float(sum);
        rows.sums[at] = sum;
    }
}

}  // namespace specserve
