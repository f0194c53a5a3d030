// Position-keyed Gumbel noise; the contract is `gumbel_noise` and `gumbel_argmax` in ops.py.
#pragma once

#include <cstdint>

namespace specserve {

struct Key {  // of a row
    uint64_t seed;
    uint64_t position;
};

// noise [count] of these tokens; quickest where they follow one another.
void gumbel_noise(const Key& key, const int64_t* tokens, int64_t count, float* noise);

// Of these tokens -log(u), to float32, where the noise is -log(-log(u)): what exp(noise) divides by.
// Quickest where the tokens ascend.
void exponentials(const Key& key, const int64_t* tokens, int64_t count, float* values);

// The token of the largest logit + noise, the lowest among equals.
int64_t gumbel_argmax(const Key& key, const float* logits, int64_t vocab_size);

}  // namespace specserve
