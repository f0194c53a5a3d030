// The end of a forward pass: the final norm, the unembedding, and the best tokens of each row.
#pragma once

#include <cstdint>
#include <memory>

#include "decoder.h"
#include "team.h"

namespace specserve {

class Unembedding {
   public:
    static constexpr int64_t kPhases = 3;

    Unembedding(const Decoder& decoder, const Head& head, const float* residual);

    void run(Team& team);

   private:
    void compute_unit(int64_t unit);
    float largest_logit(const float* logits, int64_t column) const;
    void find_top_tokens(int64_t row);

    const Decoder& d_;
    const Head& head_;
    const float* x_;
    RowBuffer normed_;
    int64_t num_units_;
    std::unique_ptr<float[]> best_;  // [num_rows][num_units] from `largest_logit`
};

}  // namespace specserve
