// Observed acceptance rates of drafted nodes, and the merging of draft trees by these rates: the
// C++ version of specserve/speculation/calibration.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "tree.h"

namespace specserve {

// Counts of observations; both are halved whenever visits reach `memory`.
struct Counts {
    double hits = 0.0, visits = 0.0;

    void add(bool hit, double weight, double memory);
    double rate(double guess, double guess_weight) const;
};

// The constants of calibration.py, which explains them.
struct CalibrationNumbers {
    int max_depth;
    double guess_share, guess_weight, memory, request_memory;
};

class Calibration {
public:
    explicit Calibration(const CalibrationNumbers& numbers) : numbers_(numbers) {}

    // Merges trees with the same root into one with calibrated path probabilities, pruned to the
    // best max_nodes nodes. `sampled`: temperature > 0.
    Tree merged(
        const std::string& id, bool sampled, const std::vector<TreeView>& trees, int max_nodes);

    // Records the outcome: counts every proposed node whose parent was emitted.
    void settle(
        const std::string& id,
        bool sampled,
        const std::vector<TreeView>& trees,
        const std::vector<int32_t>& emitted);

    void forget(const std::string& id) { own_.erase(id); }

private:
    struct Key {
        int drafter_id, row;  // row: depth, probability in 1/20 steps, `sampled`
    };
    // By drafter id, then by row.
    using Table = std::unordered_map<int, std::vector<Counts>>;

    // Several trees with the same root as one. Per node: the conditional acceptance probability,
    // the largest among its proposers; the bit set of drafters that proposed it; that of drafters
    // that proposed any child of the same parent.
    struct MergedTree {
        Tree tree;
        std::vector<double> acceptance_probs;
        std::vector<uint32_t> proposers, sibling_drafters;
    };

    MergedTree merge(const std::string& id, bool sampled, const std::vector<TreeView>& trees);
    Counts& agreed(const MergedTree& merged, int node, bool sampled);

    std::vector<Key> keys(const TreeView& tree, bool sampled) const;
    Counts& at(Table& table, const Key& key) const;

    CalibrationNumbers numbers_;
    Table all_;
    // By `sibling_drafters` and `proposers`, then by probability in 1/20 steps and `sampled`.
    std::unordered_map<uint64_t, std::vector<Counts>> agreement_;
    std::unordered_map<int, Counts> claims_;
    std::unordered_map<std::string, Table> own_;
};

}  // namespace specserve
