#include "sampler.h"

#include <algorithm>
#include <cmath>

namespace specserve {
namespace {

constexpr int kBlocks = 16;        // counters at a time, for the compiler to put side by side
constexpr int kTokens = 4 * kBlocks;
constexpr float kMostNoise = 22.9f;  // -log(-log(1 - 2^-33)) is 22.87
constexpr float kLog2 = 0.693148f;   // rounded up

// words[i][b]: word i of counter first + b (Philox4x32-10, Salmon et al., SC'11).
void philox(const Key& key, uint32_t first, uint32_t (&words)[4][kBlocks]) {
    uint32_t seed_low = uint32_t(key.seed), seed_high = uint32_t(key.seed >> 32);
    for (int b = 0; b < kBlocks; ++b) {
        words[0][b] = first + uint32_t(b);
        words[1][b] = uint32_t(key.position);
        words[2][b] = uint32_t(key.position >> 32);
        words[3][b] = 0;
    }
    for (int round = 0; round < 10; ++round) {
        for (int b = 0; b < kBlocks; ++b) {
            const uint64_t even = uint64_t(0xD2511F53u) * words[0][b];
            const uint64_t odd = uint64_t(0xCD9E8D57u) * words[2][b];
            words[0][b] = uint32_t(odd >> 32) ^ words[1][b] ^ seed_low;
            words[1][b] = uint32_t(odd);
            words[2][b] = uint32_t(even >> 32) ^ words[3][b] ^ seed_high;
            words[3][b] = uint32_t(even);
        }
        seed_low += 0x9E3779B9u;
        seed_high += 0xBB67AE85u;
    }
}

float noise_of(uint32_t word) {
    const double uniform = (double(word) + 0.5) * 0x1p-32;
    return float(-std::log(-std::log(uniform)));
}

// No less than the noise: -log(u) is at least 1 - u, and the bits of that tell its logarithm.
float noise_bound(uint32_t word) {
    const uint32_t rest = ~word;
    return kLog2 * float(rest ? __builtin_clz(rest) + 1 : 33);
}

}  // namespace

void gumbel_noise(const Key& key, const int64_t* tokens, int64_t count, float* noise) {
    uint32_t words[4][kBlocks];
    int64_t first = -1;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t block = tokens[i] >> 2, from = block / kBlocks * kBlocks;
        if (from != first) philox(key, uint32_t(first = from), words);
        noise[i] = noise_of(words[tokens[i] & 3][block - from]);
    }
}

int64_t gumbel_argmax(const Key& key, const float* logits, int64_t vocab_size) {
    int64_t best = std::max_element(logits, logits + vocab_size) - logits;
    float noise;
    gumbel_noise(key, &best, 1, &noise);
    float most = logits[best] + noise;  // the first guess; hardly any other token comes near
    uint32_t words[4][kBlocks];
    for (int64_t first = 0; first < vocab_size; first += kTokens) {
        const int64_t last = std::min(first + kTokens, vocab_size);
        float largest = logits[first];
        for (int64_t token = first; token < last; ++token) largest = std::max(largest, logits[token]);
        if (!(largest + kMostNoise >= most)) continue;
        philox(key, uint32_t(first >> 2), words);
        for (int64_t token = first; token < last; ++token) {
            const uint32_t word = words[token & 3][(token - first) >> 2];
            if (!(logits[token] + noise_bound(word) >= most)) continue;
            const float sum = logits[token] + noise_of(word);
            if (sum > most || (sum == most && token < best)) most = sum, best = token;
        }
    }
    return best;
}

}  // namespace specserve
