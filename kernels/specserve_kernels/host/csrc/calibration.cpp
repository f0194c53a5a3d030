#include "calibration.h"

#include <cmath>

namespace specserve {

namespace {

constexpr int kSteps = 21;  // twentieths of a share, 0 and 1 included

// The node that `token` is under `parent`, or -1.
int child_of(const Tree& tree, int parent, int32_t token) {
    for (int node = parent + 1; node < tree.size(); ++node)
        if (tree.parents[node] == parent && tree.tokens[node] == token) return node;
    return -1;
}

}  // namespace

void Counts::add(bool hit, double weight, double memory) {
    if (visits >= memory) {
        hits /= 2;
        visits /= 2;
    }
    hits += hit;
    visits += weight;
}

double Counts::rate(double guess, double guess_weight) const {
    return (hits + guess_weight * guess) / (visits + guess_weight);
}

std::vector<Calibration::Key> Calibration::keys(const TreeView& tree, bool noisy) const {
    std::vector<Key> keys(tree.size);
    std::vector<int> depths(tree.size, 0);
    for (int node = 1; node < tree.size; ++node) {
        depths[node] = depths[tree.parents[node]] + 1;
        const int depth = std::min(depths[node], numbers_.max_depth);
        const int step = int(std::nearbyint(20 * tree.share(node)));
        keys[node] = {tree.sources[node], (depth * kSteps + step) * 2 + noisy};
    }
    return keys;
}

Counts& Calibration::at(Table& table, const Key& key) const {
    std::vector<Counts>& rows = table[key.source];
    if (rows.empty()) rows.resize((numbers_.max_depth + 1) * kSteps * 2);
    return rows[key.row];
}

Tree Calibration::merged(
    const std::string& id, bool noisy, const std::vector<TreeView>& trees, int max_nodes) {
    Table& own = own_[id];
    const double weight = numbers_.guess_weight;
    Tree merged(trees[0].tokens[0]);
    std::vector<double> shares{1.0};
    for (const TreeView& tree : trees) {
        const std::vector<Key> keys = this->keys(tree, noisy);
        std::vector<int> place(tree.size, 0);
        for (int node = 1; node < tree.size; ++node) {
            const Key& key = keys[node];
            const double claim =
                claims_[key.source].rate(numbers_.guess_share, weight) * tree.share(node);
            const double common = at(all_, key).rate(std::min(claim, 1.0), weight);
            const double share = at(own, key).rate(common, weight);
            const int parent = place[tree.parents[node]];
            int& index = place[node];
            index = child_of(merged, parent, tree.tokens[node]);
            if (index < 0) {
                index = merged.size();
                merged.add(tree.tokens[node], parent, 0.0, tree.sources[node]);
                shares.push_back(share);
            } else if (share > shares[index]) {
                shares[index] = share;
                merged.sources[index] = tree.sources[node];
            }
        }
    }
    for (int node = 1; node < merged.size(); ++node)
        merged.scores[node] = shares[node] * merged.scores[merged.parents[node]];
    return pruned(merged, max_nodes);
}

void Calibration::settle(
    const std::string& id,
    bool noisy,
    const std::vector<TreeView>& trees,
    const std::vector<int32_t>& emitted) {
    Table& own = own_[id];
    for (const TreeView& tree : trees) {
        const std::vector<Key> keys = this->keys(tree, noisy);
        int at_node = 0;
        for (const int32_t token : emitted) {
            int next = -1;
            for (int node = at_node + 1; node < tree.size; ++node) {
                if (tree.parents[node] != at_node) continue;
                const bool hit = tree.tokens[node] == token;
                at(all_, keys[node]).add(hit, 1.0, numbers_.memory);
                claims_[keys[node].source].add(hit, tree.share(node), numbers_.memory);
                at(own, keys[node]).add(hit, 1.0, numbers_.request_memory);
                if (hit) next = node;
            }
            if (next < 0) break;
            at_node = next;
        }
    }
}

}  // namespace specserve
