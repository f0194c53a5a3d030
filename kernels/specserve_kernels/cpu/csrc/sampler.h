// Gumbel noise keyed by (seed, position, token), as `gumbel_noise` in ops.py defines it.
#pragma once

#include <cstdint>

namespace specserve {

struct Key {  // of the noise of one row
    uint64_t seed;
    uint64_t position;
};

// values [count]: -log(u) of the given tokens in float32 arithmetic. The noise is -log of it, so
// that exp(noise) = 1 / value. Fastest if the tokens ascend.
void exponentials(const Key& key, const int64_t* tokens, int64_t count, float* values);

}  // namespace specserve
