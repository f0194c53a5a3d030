#include "unembedding.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "candidates.h"
#include "norm.h"

namespace specserve {
namespace {

// The num_top best tokens of a row: they lie in the num_top units whose best logits are largest.
void find_top(const float* logits, const float* unit_best, int64_t vocab_size, int64_t num_top,
              int64_t* top) {
    const int64_t num_units = (vocab_size + kColumns - 1) / kColumns;
    int64_t units[kMaxTop], tokens[kMaxTop * kColumns], best[kMaxTop];
    float values[kMaxTop * kColumns];
    const int64_t found = best_of(unit_best, num_units, num_top, units);
    std::sort(units, units + found);
    int64_t count = 0;
    for (int64_t u = 0; u < found; ++u) {
        const int64_t last = std::min((units[u] + 1) * kColumns, vocab_size);
        for (int64_t token = units[u] * kColumns; token < last; ++token) {
            values[count] = logits[token];
            tokens[count++] = token;
        }
    }
    const int64_t num_best = best_of(values, count, num_top, best);
    for (int64_t i = 0; i < num_best; ++i) top[i] = tokens[best[i]];
}

}  // namespace

Unembedding::Unembedding(const Decoder& decoder, const Head& head, const float* residual)
    : d_(decoder),
      head_(head),
      x_(residual),
      normed_(head.num_rows, decoder.hidden_size, is_quantized(decoder.head.weight.format)),
      num_units_(num_units(decoder.head)),
      best_(new float[head.num_rows * num_units_]) {}

void Unembedding::run(Team& team) {
    team.share(head_.num_rows, [&](int64_t row) {
        thread_local std::vector<float> y;
        y.resize(d_.hidden_size);
        rms_norm(x_ + head_.rows[row] * d_.hidden_size, d_.norm, d_.hidden_size, d_.eps,
                 y.data());
        store_row(y.data(), normed_.rows(), row);
    });
    team.share(num_units_, [&](int64_t unit) { compute_unit(unit); });
    team.share(head_.num_top ? head_.num_rows : 0, [&](int64_t row) { find_top_tokens(row); });
}

void Unembedding::compute_unit(int64_t unit) {
    const int64_t stride = d_.head.weight.num_outputs, first = unit * kColumns;
    multiply_unit(d_.head, normed_.rows(), head_.num_rows, unit,
                  [&](int64_t row, int64_t column, Floats out) {
                      store(head_.logits + row * stride + column, out);
                  });
    for (int64_t row = 0; row < head_.num_rows; ++row)
        best_[row * num_units_ + unit] = largest_logit(head_.logits + row * stride + first, first);
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

// The final norm and the unembedding only, of rows of `residual`.
SPECSERVE_API void specserve_decode_head(const Decoder& decoder, const Head& head,
                                         const float* residual, int32_t num_threads) {
    Unembedding end(decoder, head, residual);
    run_team(Unembedding::kPhases, num_threads, [&](Team& team) { end.run(team); });
}

}  // namespace specserve
