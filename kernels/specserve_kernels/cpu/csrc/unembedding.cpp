#include "unembedding.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "lanes.h"
#include "norm.h"

namespace specserve {
namespace {

// The num_top best tokens of a row: they lie in the num_top units whose best logits are largest.
void find_top(const float* logits, const float* unit_best, int64_t vocab_size, int64_t num_top,
              int64_t* top) {
    const int64_t num_units = (vocab_size + kColumns - 1) / kColumns;
    int64_t best_units[kMaxTop];
    auto find_best = [](int64_t count, int64_t wanted, const auto& value, int64_t* best) {
        int64_t found = 0;  // insertion into a short sorted list; equal values keep their order
        for (int64_t i = 0; i < count; ++i) {
            if (found == wanted && !(value(i) > value(best[found - 1]))) continue;
            int64_t at = found < wanted ? found++ : found - 1;
            for (; at > 0 && value(i) > value(best[at - 1]); --at) best[at] = best[at - 1];
            best[at] = i;
        }
        return found;
    };
    const int64_t found = find_best(
        num_units, num_top, [&](int64_t i) { return unit_best[i]; }, best_units);
    std::sort(best_units, best_units + found);
    int64_t candidates[kMaxTop * kColumns];
    int64_t num_candidates = 0;
    for (int64_t u = 0; u < found; ++u)
        for (int64_t c = 0; c < kColumns && best_units[u] * kColumns + c < vocab_size; ++c)
            candidates[num_candidates++] = best_units[u] * kColumns + c;
    int64_t best[kMaxTop];
    const int64_t count = find_best(
        num_candidates, num_top, [&](int64_t i) { return logits[candidates[i]]; }, best);
    for (int64_t i = 0; i < count; ++i) top[i] = candidates[best[i]];
}

}  // namespace

Unembedding::Unembedding(const Decoder& decoder, const Head& head, const float* residual)
    : d_(decoder),
      head_(head),
      x_(residual),
      normed_(head.num_rows, decoder.hidden_size),
      num_units_((decoder.head.weight.num_outputs + kColumns - 1) / kColumns),
      best_(new float[head.num_rows * num_units_]) {}

void Unembedding::run(Team& team) {
    team.share(head_.num_rows, [&](int64_t row) {
        thread_local std::vector<float> y;
        y.resize(d_.hidden_size);
        rms_norm(x_ + head_.rows[row] * d_.hidden_size, d_.norm, d_.hidden_size, d_.eps,
                 y.data());
        quantize_row(y.data(), normed_.rows(), row);
    });
    team.share(num_units_, [&](int64_t unit) { compute_unit(unit); });
    team.share(head_.num_top ? head_.num_rows : 0, [&](int64_t row) { find_top_tokens(row); });
}

void Unembedding::compute_unit(int64_t unit) {
    const int64_t stride = d_.head.weight.num_outputs, first = unit * kPanels;
    const int64_t last = std::min(first + kPanels, stride / kPanel);
    for (int64_t top = 0; top < head_.num_rows; top += kRowBlock) {
        const int64_t count = std::min(kRowBlock, head_.num_rows - top);
        float* logits = head_.logits + top * stride + first * kPanel;
        linear_panels(d_.head.weight, normed_.rows().from(top), count, first, last, logits, stride);
        for (int64_t row = top; row < top + count; ++row, logits += stride) {
            if (d_.head.bias)
                for (int64_t c = 0; c < (last - first) * kPanel; ++c)
                    logits[c] += d_.head.bias[first * kPanel + c];
            best_[row * num_units_ + unit] = largest_logit(logits, unit * kColumns);
        }
    }
}

// The largest logit of a unit; NaN if any of them is not finite.
float Unembedding::largest_logit(const float* logits, int64_t column) const {
    const int64_t count = std::min(kColumns, head_.vocab_size - column);
    if (count <= 0) return -INFINITY;
    float padded[kColumns];
    if (count < kColumns) {  // the last unit: filled up with one of its logits
        std::fill(std::copy_n(logits, count, padded), padded + kColumns, logits[0]);
        logits = padded;
    }
    Floats largest = load(logits), zeros = zero_floats();
    for (int64_t c = 0; c < kColumns; c += kLanes) {
        const Floats x = load(logits + c);
        largest = max(largest, x);
        zeros = mul_add(x, zero_floats(), zeros);
    }
    return lane_sum(zeros) == 0 ? lane_max(largest) : NAN;
}

void Unembedding::find_top_tokens(int64_t row) {
    const float* unit_best = best_.get() + row * num_units_;
    int64_t* top = head_.top + row * head_.num_top;
    for (int64_t unit = 0; unit < num_units_; ++unit)
        if (std::isnan(unit_best[unit])) return std::fill(top, top + head_.num_top, -1);
    find_top(head_.logits + row * d_.head.weight.num_outputs, unit_best, head_.vocab_size,
             head_.num_top, top);
}

}  // namespace specserve
