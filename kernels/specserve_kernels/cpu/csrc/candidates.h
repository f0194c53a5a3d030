// Which tokens of a draft vocabulary may come next, by a row's logits and how its target draws.
#pragma once

#include <cstdint>
#include <vector>

#include "sampler.h"

namespace specserve {

constexpr int64_t kMaxCandidates = 64;

// By log q at temperature 0, else by log q / T + g; top-k, top-p and min-p come before the noise.
struct Draw {
    float temperature;
    float top_p;
    float min_p;
    int64_t top_k;  // 0: all
    Key key;        // of the noise
};

// The best first. Logits that are no numbers give none.
struct Candidates {
    int64_t count;
    int64_t tokens[kMaxCandidates];  // the target's
    float shares[kMaxCandidates];    // probabilities
};

struct DraftVocabulary {
    const int64_t* token_ids;  // [size]
    int64_t size;
    float logit_scale;
};

// logits: a row of the vocabulary after `stride` floats the next; `wanted`: at most kMaxCandidates.
std::vector<Candidates> find_candidates(const DraftVocabulary& vocabulary, const float* logits,
                                        int64_t stride, const std::vector<Draw>& draws,
                                        int64_t wanted, int num_threads);

}  // namespace specserve
