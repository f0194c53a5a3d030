// Gumbel noise keyed by (seed, position, token), as `gumbel_noise` in ops.py defines it.
#pragma once

#include <cstdint>

namespace specserve {

struct Key {  // of the noise of one row
    uint64_t seed;
    uint64_t position;
};

// noise [count] of the given tokens; fastest if they are consecutive.
void gumbel_noise(const Key& key, const int64_t* tokens, int64_t count, float* noise);

// values [count]: -log(u) of the given tokens in float32 arithmetic. The noise is -log of it, so
// that exp(noise) = 1 / value. Fastest if the tokens ascend.
void exponentials(const Key& key, const int64_t* tokens, int64_t count, float* values);

// The token with the largest logit + noise, the lowest id among equals; `gumbel_argmax` in ops.py.
int64_t gumbel_argmax(const Key& key, const float* logits, int64_t vocab_size);

}  // namespace specserve
