// How often drafted nodes come true, and the merging of trees by it: the C++ half of
// specserve/drafting/calibration.py.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "tree.h"

namespace specserve {

// Observations that fade.
struct Counts {
    double hits = 0.0, visits = 0.0;

    void add(bool hit, double weight, double memory);
    double rate(double guess, double guess_weight) const;
};

// The numbers of calibration.py, where they are explained.
struct CalibrationNumbers {
    int max_depth;
    double guess_share, guess_weight, memory, request_memory;
};

class Calibration {
public:
    explicit Calibration(const CalibrationNumbers& numbers) : numbers_(numbers) {}

    // One tree of several with the same root, calibrated, its best nodes; `noisy`: temperature > 0.
    Tree merged(
        const std::string& id, bool noisy, const std::vector<TreeView>& trees, int max_nodes);

    // Count the nodes of proposals whose parents were emitted.
    void settle(
        const std::string& id,
        bool noisy,
        const std::vector<TreeView>& trees,
        const std::vector<int32_t>& emitted);

    void forget(const std::string& id) { own_.erase(id); }

private:
    struct Key {
        int source, row;  // row: depth, twentieths of the share, noise
    };
    // By source, then by row.
    using Table = std::unordered_map<int, std::vector<Counts>>;

    std::vector<Key> keys(const TreeView& tree, bool noisy) const;
    Counts& at(Table& table, const Key& key) const;

    CalibrationNumbers numbers_;
    Table all_;
    std::unordered_map<int, Counts> claims_;
    std::unordered_map<std::string, Table> own_;
};

}  // namespace specserve
