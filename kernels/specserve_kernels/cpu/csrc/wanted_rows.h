#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "decoder.h"

namespace specserve {

// The rows of a forward pass whose output of the last layer is needed. For all other rows the last
// layer only computes K and V. A prompt needs its last row only, and the pending draft inputs of a
// draft head need none.
class WantedRows {
   public:
    WantedRows(const Decoder& d, const Pass& pass, const Head& head)
        : index_(pass.num_rows, -1), segments_(pass.segments.num_segments) {
        const int64_t* end = pass.aux_layers + pass.num_aux_layers;
        if (std::find(pass.aux_layers, end, d.num_layers) != end)
            std::fill(index_.begin(), index_.end(), 0);
        for (int64_t i = 0; i < head.num_rows; ++i) index_[head.rows[i]] = 0;
        for (int64_t row = 0, segment = 0; row < pass.num_rows; ++row) {
            while (row >= pass.segments.cu_rows[segment + 1]) ++segment;
            if (index_[row] < 0) continue;
            index_[row] = num_rows();
            rows_.push_back(row);
            segments_[segment] = true;
        }
    }

    int64_t num_rows() const { return int64_t(rows_.size()); }
    int64_t row(int64_t index) const { return rows_[index]; }  // of the wanted ones
    int64_t index_of(int64_t row) const { return index_[row]; }  // among those; -1: not wanted
    bool has_segment(int64_t segment) const { return segments_[segment]; }

   private:
    std::vector<int64_t> rows_, index_;
    std::vector<char> segments_;  // 1: has a wanted row
};

}  // namespace specserve
