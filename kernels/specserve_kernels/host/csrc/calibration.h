// Observed acceptance rates of drafted nodes, and the merging of draft trees by these rates: the
// C++ version of reference/calibration.py.
#pragma once

#include <cstdint>
#include <unordered_map>
#include <vector>

#include "tree.h"

namespace specserve {

// Counts of observations; both are halved whenever visits reach `memory`.
struct Counts {
    double hits = 0.0, visits = 0.0;

    void add(bool hit, double weight, double memory);
    double rate(double prior, double prior_weight) const;
};

// Explained in reference/calibration.py.
struct CalibrationNumbers {
    int max_depth;
    double prior_ratio, prior_weight, memory;
};

class Calibration {
public:
    explicit Calibration(const CalibrationNumbers& numbers) : numbers_(numbers) {}

    // Merges trees with the same root into one with calibrated path probabilities, pruned to the
    // best max_nodes nodes. `sampled`: temperature > 0.
    Tree merged(bool sampled, const std::vector<TreeView>& trees, int max_nodes);

    // Counts every proposed node whose parent was emitted.
    void record_outcome(
        bool sampled, const std::vector<TreeView>& trees, const std::vector<int32_t>& emitted);

private:
    // One entry per depth, estimate in steps of 1/20, and `sampled`.
    using Rows = std::vector<Counts>;

    int row_of(const TreeView& tree, int node, int depth, bool sampled) const;
    Rows& rows_of(int drafter_id);

    CalibrationNumbers numbers_;
    std::unordered_map<int, Rows> counts_;  // by drafter id
    std::unordered_map<int, Counts> ratios_;  // by drafter id: accepted nodes per estimate
};

}  // namespace specserve
