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

    // Several trees with the same root as one, and per node: how likely it is once its parent is
    // right, by the surest of its proposers; who they are; who proposed anything beside it.
    struct United {
        Tree tree;
        std::vector<double> shares;
        std::vector<uint32_t> proposers, present;
    };

    United united(const std::string& id, bool noisy, const std::vector<TreeView>& trees);
    Counts& agreed(const United& united, int node, bool noisy);

    std::vector<Key> keys(const TreeView& tree, bool noisy) const;
    Counts& at(Table& table, const Key& key) const;

    CalibrationNumbers numbers_;
    Table all_;
    // By who proposed a node and who did not, then by twentieths of the share and noise.
    std::unordered_map<uint64_t, std::vector<Counts>> agreement_;
    std::unordered_map<int, Counts> claims_;
    std::unordered_map<std::string, Table> own_;
};

}  // namespace specserve
