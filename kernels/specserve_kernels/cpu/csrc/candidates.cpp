#include "candidates.h"

#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "team.h"

namespace specserve {
namespace {

constexpr int64_t kPiece = 1024;  // logits of a row that a thread processes at a time
constexpr float kLog2e = 1.4426950408889634f;

float largest(const float* x, int64_t count) {
    Floats most = broadcast(x[0]);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) most = max(most, load(x + i));
    float result = lane_max(most);
    for (; i < count; ++i) result = std::max(result, x[i]);
    return result;
}

// y = 2^((x - most) * scale); returns the sum of y.
float exponents(const float* x, int64_t count, float most, float scale, float* y) {
    const Floats from = broadcast(most), by = broadcast(scale);
    Floats sum = zero_floats();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Floats value = exp2(mul(sub(load(x + i), from), by));
        store(y + i, value);
        sum = add(sum, value);
    }
    float result = lane_sum(sum);
    for (; i < count; ++i) result += y[i] = std::exp2((x[i] - most) * scale);
    return result;
}

// x /= y; returns the sum of x.
float quotients(float* x, const float* y, int64_t count) {
    Floats sum = zero_floats();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Floats value = div(load(x + i), load(y + i));
        store(x + i, value);
        sum = add(sum, value);
    }
    float result = lane_sum(sum);
    for (; i < count; ++i) result += x[i] /= y[i];
    return result;
}

bool is_filtered(const Sampling& sampling) {
    return sampling.temperature > 0.0f &&
           (sampling.top_k > 0 || sampling.top_p < 1.0f || sampling.min_p > 0.0f);
}

class Search {
   public:
    Search(const DraftVocabulary& vocabulary, const float* logits, int64_t stride,
           const std::vector<Sampling>& sampling, int64_t wanted)
        : v_(vocabulary),
          logits_(logits),
          stride_(stride),
          sampling_(sampling),
          wanted_(std::min(wanted, vocabulary.size)),
          num_rows_(int64_t(sampling.size())),
          num_pieces_((vocabulary.size + kPiece - 1) / kPiece),
          weights_(num_rows_ * vocabulary.size),
          sums_(num_rows_ * num_pieces_),
          found_(num_rows_) {}

    std::vector<Candidates> run(int num_threads) {
        run_team(2, num_threads, [&](Team& team) {
            team.share(num_rows_ * num_pieces_, [&](int64_t unit) { weigh(unit); });
            team.share(num_rows_, [&](int64_t row) { choose(row); });
        });
        return std::move(found_);
    }

   private:
    // Computes exp(log q / T + g) of a part of a row, up to a constant factor, and their sum. Rows
    // with top-k, top-p or min-p get their noise in `filter`, when the remaining tokens are known.
    void weigh(int64_t unit) {
        const int64_t row = unit / num_pieces_, first = unit % num_pieces_ * kPiece;
        const int64_t count = std::min(kPiece, v_.size - first);
        const Sampling& sampling = sampling_[row];
        const float* logits = logits_ + row * stride_;
        float* weights = weights_.data() + row * v_.size + first;
        const float temperature = sampling.temperature > 0.0f ? sampling.temperature : 1.0f;
        float sum = exponents(logits + first, count, largest(logits, v_.size),
                              v_.logit_scale * kLog2e / temperature, weights);
        if (sampling.temperature > 0.0f && !is_filtered(sampling)) {
            float noise[kPiece];
            exponentials(sampling.key, v_.token_ids + first, count, noise);
            sum = quotients(weights, noise, count);
        }
        sums_[unit] = sum;
    }

    void choose(int64_t row) {
        const float* weights = weights_.data() + row * v_.size;
        float sum = 0.0f;
        for (int64_t i = 0; i < num_pieces_; ++i) sum += sums_[row * num_pieces_ + i];
        Candidates& found = found_[row];
        found.count = 0;
        if (!std::isfinite(sum)) return;
        if (is_filtered(sampling_[row])) return filter(sampling_[row], weights, sum, found);
        int64_t places[kMaxCandidates];
        found.count = best_of(weights, v_.size, wanted_, places);
        for (int64_t i = 0; i < found.count; ++i) {
            found.tokens[i] = v_.token_ids[places[i]];
            found.probabilities[i] = weights[places[i]] / sum;
        }
    }

    // Applies top-k, top-p and min-p to the kMaxCandidates best tokens, and ranks those that remain
    // with noise.
    void filter(const Sampling& sampling, const float* weights, float sum,
                Candidates& found) const {
        const int64_t most =
            sampling.top_k > 0 ? std::min(sampling.top_k, kMaxCandidates) : kMaxCandidates;
        int64_t places[kMaxCandidates] = {}, tokens[kMaxCandidates] = {};
        float perturbed[kMaxCandidates], noise[kMaxCandidates];
        const int64_t num_best = best_of(weights, v_.size, std::min(most, v_.size), places);
        if (sampling.top_k > 0 && sampling.top_k <= kMaxCandidates) {
            sum = 0.0f;
            for (int64_t i = 0; i < num_best; ++i) sum += weights[places[i]];
        }
        float before = 0.0f;
        int64_t count = 0;
        for (; count < num_best; ++count) {
            const float weight = weights[places[count]];
            if (count && (before >= sampling.top_p * sum ||
                          weight < sampling.min_p * perturbed[0]))
                break;
            tokens[count] = v_.token_ids[places[count]];
            perturbed[count] = weight;
            before += weight;
        }
        exponentials(sampling.key, tokens, count, noise);
        const float total = quotients(perturbed, noise, count);
        found.count = best_of(perturbed, count, std::min(wanted_, count), places);
        for (int64_t i = 0; i < found.count; ++i) {
            found.tokens[i] = tokens[places[i]];
            found.probabilities[i] = perturbed[places[i]] / total;
        }
    }

    const DraftVocabulary& v_;
    const float* logits_;
    int64_t stride_;
    const std::vector<Sampling>& sampling_;
    int64_t wanted_, num_rows_, num_pieces_;
    std::vector<float> weights_, sums_;
    std::vector<Candidates> found_;
};

}  // namespace

int64_t best_of(const float* values, int64_t count, int64_t wanted, int64_t* best) {
    int64_t found = 0;
    auto offer = [&](int64_t i) {
        if (found == wanted && !(values[i] > values[best[found - 1]])) return;
        int64_t at = found < wanted ? found++ : found - 1;
        for (; at > 0 && values[i] > values[best[at - 1]]; --at) best[at] = best[at - 1];
        best[at] = i;
    };
    constexpr int64_t kBlock = 64;
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t last = std::min(first + kBlock, count);
        if (found == wanted && !(largest(values + first, last - first) > values[best[found - 1]]))
            continue;
        for (int64_t i = first; i < last; ++i) offer(i);
    }
    return found;
}

std::vector<Candidates> find_candidates(const DraftVocabulary& vocabulary, const float* logits,
                                        int64_t stride, const std::vector<Sampling>& sampling,
                                        int64_t wanted, int num_threads) {
    return Search(vocabulary, logits, stride, sampling, wanted).run(num_threads);
}

}  // namespace specserve
