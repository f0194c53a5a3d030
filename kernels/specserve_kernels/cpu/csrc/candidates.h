// Ranks the next tokens of a draft vocabulary, given a row's logits and the target's sampling
// parameters.
#pragma once

#include <cstdint>
#include <vector>

#include "sampler.h"

namespace specserve {

constexpr int64_t kMaxCandidates = 64;

// Finds the indices of the `wanted` largest values, the largest first, the lowest index first among
// equals; returns how many there are.
int64_t best_of(const float* values, int64_t count, int64_t wanted, int64_t* best);

// Tokens are ranked by log q at temperature 0, else by log q / T + g with noise g. Top-k, top-p and
// min-p are applied before the noise.
struct Sampling {
    float temperature;
    float top_p;
    float min_p;
    int64_t top_k;  // 0: all
    Key key;        // of the noise
};

// The best token first. Empty if the row's probabilities are not finite, as with a NaN logit.
struct Candidates {
    int64_t count;
    int64_t tokens[kMaxCandidates];       // ids of the target
    float probabilities[kMaxCandidates];  // softmax of what they are ranked by
};

struct DraftVocabulary {
    const int64_t* token_ids;  // [size] ids of the target
    int64_t size;
    float logit_scale;
};

// sampling: of each row. logits: these rows, `stride` floats apart. `wanted` candidates per row, at
// most kMaxCandidates.
std::vector<Candidates> find_candidates(const DraftVocabulary& vocabulary, const float* logits,
                                        int64_t stride, const std::vector<Sampling>& sampling,
                                        int64_t wanted, int num_threads);

}  // namespace specserve
