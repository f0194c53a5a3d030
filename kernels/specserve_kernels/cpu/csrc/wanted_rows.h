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
        : place_(pass.num_rows, -1), segments_(pass.segments.num_segments) {
        const bool all = std::count(pass.taps, pass.taps + pass.num_taps, d.num_layers) > 0;
        if (all) std::fill(place_.begin(), place_.end(), 0);
        for (int64_t i = 0; i < head.num_rows; ++i) place_[head.rows[i]] = 0;
        for (int64_t row = 0, segment = 0; row < pass.num_rows; ++row) {
            while (row >= pass.segments.cu_rows[segment + 1]) ++segment;
            if (place_[row] < 0) continue;
            place_[row] = num_rows();
            rows_.push_back(row);
            segments_[segment] = true;
        }
    }

    int64_t num_rows() const { return int64_t(rows_.size()); }
    int64_t row(int64_t place) const { return rows_[place]; }  // of the wanted ones
    int64_t place(int64_t row) const { return place_[row]; }  // among those; -1: not wanted
    bool has_segment(int64_t segment) const { return segments_[segment]; }

   private:
    std::vector<int64_t> rows_, place_;
    std::vector<char> segments_;  // 1: has a wanted row
};

}  // namespace specserve
