// RMSNorm (Zhang and Sennrich 2019).
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace specserve {

// y = x / rms(x) * weight, each [size], a multiple of kLanes; y may be x.
inline void rms_norm(const float* x, const float* weight, int64_t size, double eps, float* y) {
    Floats sum = zero_floats();
    for (int64_t i = 0; i < size; i += kLanes) sum = mul_add(load(x + i), load(x + i), sum);
    const float scale = 1.0f / std::sqrt(lane_sum(sum) / float(size) + float(eps));
    for (int64_t i = 0; i < size; i += kLanes)
        store(y + i, mul(mul(load(x + i), broadcast(scale)), load(weight + i)));
}

}  // namespace specserve
