#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "api.h"

namespace specserve {
namespace {

constexpr int kBlocks = 16;        // counters computed together, so that the compiler vectorizes
constexpr int kTokens = 4 * kBlocks;
constexpr int64_t kPiece = 512;  // tokens whose words are computed before they are used
constexpr float kMostNoise = 22.9f;  // -log(-log(1 - 2^-33)) is 22.87
constexpr float kLog2 = 0.693148f;   // rounded up

// words[i][b]: word i of counters[b] (Philox4x32-10, Salmon et al., SC'11).
void philox(const Key& key, const uint32_t (&counters)[kBlocks], uint32_t (&words)[4][kBlocks]) {
    constexpr uint64_t kLow = 0xffffffff;
    uint64_t seed_low = key.seed & kLow, seed_high = key.seed >> 32;
    uint64_t w[4][kBlocks];  // 64 bits throughout: converting in every round is more expensive
    for (int b = 0; b < kBlocks; ++b) {
        w[0][b] = counters[b];
        w[1][b] = key.position & kLow;
        w[2][b] = key.position >> 32;
        w[3][b] = 0;
    }
    for (int round = 0; round < 10; ++round) {
        for (int b = 0; b < kBlocks; ++b) {
            const uint64_t even = (w[0][b] & kLow) * uint64_t(0xD2511F53);
            const uint64_t odd = (w[2][b] & kLow) * uint64_t(0xCD9E8D57);
            w[0][b] = (odd >> 32) ^ w[1][b] ^ seed_low;
            w[1][b] = odd & kLow;
            w[2][b] = (even >> 32) ^ w[3][b] ^ seed_high;
            w[3][b] = even & kLow;
        }
        seed_low = (seed_low + 0x9E3779B9) & kLow;
        seed_high = (seed_high + 0xBB67AE85) & kLow;
    }
    for (int i = 0; i < 4; ++i)
        for (int b = 0; b < kBlocks; ++b) words[i][b] = uint32_t(w[i][b]);
}

float noise_of(uint32_t word) {
    const double uniform = (double(word) + 0.5) * 0x1p-32;
    return float(-std::log(-std::log(uniform)));
}

// An upper bound of the noise: -log(u) >= 1 - u, and the leading zeros of 1 - u bound its log.
float noise_bound(uint32_t word) {
    const uint32_t rest = ~word;
    return kLog2 * float(rest ? __builtin_clz(rest) + 1 : 33);
}

uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

// a if all bits of the mask are set, b if none is; without a branch, so that loops vectorize.
float either(uint32_t mask, float a, float b) {
    return float_of((bits_of(a) & mask) | (bits_of(b) & ~mask));
}

// -log(u), computed as 2 atanh(s). If u > 1/2, -log(u) = 2 atanh(x / (2 - x)) for x = 1 - u, which
// float32 can distinguish from 0. Otherwise log(u) = exponent * log(2) + 2 atanh((m - 1) / (m + 1))
// for u's mantissa m.
float exponential_of(uint32_t word) {
    const uint32_t high = 0 - (word >> 31);
    const float x = (float(int32_t(word ^ high)) + 0.5f) * 0x1p-32f;
    const float exponent = 0.69314718f * float(int32_t(bits_of(x) >> 23) - 127);
    const float mantissa = float_of((bits_of(x) & 0x7fffff) | 0x3f800000);
    const float s = either(high, x, mantissa - 1.0f) / either(high, 2.0f - x, mantissa + 1.0f);
    const float q = s * s;
    const float series = 1 + q * (1 / 3.f + q * (1 / 5.f + q * (1 / 7.f + q * (1 / 9.f + q / 11))));
    const float log = 2.0f * s * series;
    return either(high, log, -exponent - log);
}

// words [count]: the Philox words of the given tokens, at most kPiece.
void words_of(const Key& key, const int64_t* tokens, int64_t count, uint32_t* words) {
    uint32_t by_block[4][kBlocks], counters[kBlocks] = {};
    uint8_t block[kPiece];
    for (int64_t i = 0; i < count;) {
        const int64_t from = i;
        int used = 0;
        for (; i < count; ++i) {
            const auto counter = uint32_t(tokens[i] >> 2);
            if (!used || counters[used - 1] != counter) {
                if (used == kBlocks) break;
                counters[used++] = counter;
            }
            block[i] = uint8_t(used - 1);
        }
        philox(key, counters, by_block);
        for (int64_t j = from; j < i; ++j) words[j] = by_block[tokens[j] & 3][block[j]];
    }
}

// values [count]: kFunction of the words of the given tokens.
template <float (*kFunction)(uint32_t)>
void evaluate(const Key& key, const int64_t* tokens, int64_t count, float* values) {
    uint32_t words[kPiece];
    for (; count > 0; tokens += kPiece, values += kPiece, count -= kPiece) {
        const int64_t size = std::min(count, kPiece);
        words_of(key, tokens, size, words);
        for (int64_t i = 0; i < size; ++i) values[i] = kFunction(words[i]);
    }
}

// The token with the largest logit + noise, the lowest id among equals.
int64_t gumbel_argmax(const Key& key, const float* logits, int64_t vocab_size) {
    int64_t best = std::max_element(logits, logits + vocab_size) - logits;
    float noise;
    evaluate<noise_of>(key, &best, 1, &noise);
    float most = logits[best] + noise;  // a lower bound, which few other tokens can exceed
    uint32_t words[4][kBlocks], counters[kBlocks];
    for (int64_t first = 0; first < vocab_size; first += kTokens) {
        const int64_t last = std::min(first + kTokens, vocab_size);
        float largest = logits[first];
        for (int64_t token = first; token < last; ++token) largest = std::max(largest, logits[token]);
        if (!(largest + kMostNoise >= most)) continue;
        for (int b = 0; b < kBlocks; ++b) counters[b] = uint32_t(first >> 2) + uint32_t(b);
        philox(key, counters, words);
        for (int64_t token = first; token < last; ++token) {
            const uint32_t word = words[token & 3][(token - first) >> 2];
            if (!(logits[token] + noise_bound(word) >= most)) continue;
            const float sum = logits[token] + noise_of(word);
            if (sum > most || (sum == most && token < best)) most = sum, best = token;
        }
    }
    return best;
}

}  // namespace

void exponentials(const Key& key, const int64_t* tokens, int64_t count, float* values) {
    evaluate<exponential_of>(key, tokens, count, values);
}

// noise [num_rows][num_tokens] of token_ids [num_rows][num_tokens].
SPECSERVE_API void specserve_gumbel_noise(const int64_t* seeds, const int64_t* positions,
                                          const int64_t* token_ids, int64_t num_rows,
                                          int64_t num_tokens, float* noise, int32_t num_threads) {
    const int64_t num_pieces = (num_tokens + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(num_threads) if (num_rows * num_pieces > 1)
    for (int64_t piece = 0; piece < num_rows * num_pieces; ++piece) {
        const int64_t row = piece / num_pieces, first = piece % num_pieces * kPiece;
        const int64_t at = row * num_tokens + first;
        evaluate<noise_of>({uint64_t(seeds[row]), uint64_t(positions[row])}, token_ids + at,
                           std::min(kPiece, num_tokens - first), noise + at);
    }
}

// tokens [num_rows]; logits [num_rows][vocab_size], rows `stride` floats apart; sampled [num_rows],
// 0: argmax without noise.
SPECSERVE_API void specserve_gumbel_argmax(const float* logits, int64_t stride,
                                           const int64_t* seeds, const int64_t* positions,
                                           const uint8_t* sampled, int64_t num_rows,
                                           int64_t vocab_size, int64_t* tokens,
                                           int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows > 1) schedule(dynamic, 1)
    for (int64_t row = 0; row < num_rows; ++row) {
        const float* of_row = logits + row * stride;
        const Key key{uint64_t(seeds[row]), uint64_t(positions[row])};
        tokens[row] = sampled[row] ? gumbel_argmax(key, of_row, vocab_size)
                                   : std::max_element(of_row, of_row + vocab_size) - of_row;
    }
}

}  // namespace specserve
