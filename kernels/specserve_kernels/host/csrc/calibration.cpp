#include "calibration.h"

#include <cmath>

namespace specserve {

namespace {

constexpr int kMaxDrafterBit = 31;  // this and all larger drafter ids share one bit
constexpr int kSteps = 21;  // probabilities in steps of 1/20, from 0 to 1

// The child of `parent` with this token, or -1.
int child_of(const Tree& tree, int parent, int32_t token) {
    for (int node = parent + 1; node < tree.size(); ++node)
        if (tree.parents[node] == parent && tree.tokens[node] == token) return node;
    return -1;
}

// Calls seen(node, hit) for the children of the root and of every emitted node; hit: the child was
// emitted.
template <class Seen>
void follow(
    const int16_t* parents,
    const int32_t* tokens,
    int size,
    const std::vector<int32_t>& emitted,
    Seen&& seen) {
    int at_node = 0;
    for (const int32_t token : emitted) {
        int next = -1;
        for (int node = at_node + 1; node < size; ++node) {
            if (parents[node] != at_node) continue;
            const bool hit = tokens[node] == token;
            seen(node, hit);
            if (hit) next = node;
        }
        if (next < 0) break;
        at_node = next;
    }
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

std::vector<Calibration::Key> Calibration::keys(const TreeView& tree, bool sampled) const {
    std::vector<Key> keys(tree.size);
    std::vector<int> depths(tree.size, 0);
    for (int node = 1; node < tree.size; ++node) {
        depths[node] = depths[tree.parents[node]] + 1;
        const int depth = std::min(depths[node], numbers_.max_depth);
        const int step = int(std::nearbyint(20 * tree.acceptance_prob(node)));
        keys[node] = {tree.drafter_ids[node], (depth * kSteps + step) * 2 + sampled};
    }
    return keys;
}

Counts& Calibration::at(Table& table, const Key& key) const {
    std::vector<Counts>& rows = table[key.drafter_id];
    if (rows.empty()) rows.resize((numbers_.max_depth + 1) * kSteps * 2);
    return rows[key.row];
}

Calibration::MergedTree Calibration::merge(
    const std::string& id, bool sampled, const std::vector<TreeView>& trees) {
    Table& own = own_[id];
    const double weight = numbers_.guess_weight;
    MergedTree all{Tree(trees[0].tokens[0]), {1.0}, {0}, {0}};
    std::vector<uint32_t> child_drafters{0};  // per node, drafters that proposed a child of it
    for (const TreeView& tree : trees) {
        const std::vector<Key> keys = this->keys(tree, sampled);
        std::vector<int> place(tree.size, 0);
        for (int node = 1; node < tree.size; ++node) {
            const Key& key = keys[node];
            const double claim = claims_[key.drafter_id].rate(numbers_.guess_share, weight) *
                                 tree.acceptance_prob(node);
            const double common = at(all_, key).rate(std::min(claim, 1.0), weight);
            const double prob = at(own, key).rate(common, weight);
            const uint32_t bit = uint32_t(1) << std::min(key.drafter_id, kMaxDrafterBit);
            const int parent = place[tree.parents[node]];
            int& index = place[node];
            index = child_of(all.tree, parent, tree.tokens[node]);
            if (index < 0) {
                index = all.tree.size();
                all.tree.add(tree.tokens[node], parent, 0.0, tree.drafter_ids[node]);
                all.acceptance_probs.push_back(prob);
                all.proposers.push_back(0);
                child_drafters.push_back(0);
            } else if (prob > all.acceptance_probs[index]) {
                all.acceptance_probs[index] = prob;
                all.tree.drafter_ids[index] = tree.drafter_ids[node];
            }
            all.proposers[index] |= bit;
            child_drafters[parent] |= bit;
        }
    }
    for (int node = 1; node < all.tree.size(); ++node)
        all.sibling_drafters.push_back(child_drafters[all.tree.parents[node]]);
    return all;
}

Counts& Calibration::agreed(const MergedTree& merged, int node, bool sampled) {
    const uint64_t who = uint64_t(merged.sibling_drafters[node]) << 32 | merged.proposers[node];
    std::vector<Counts>& rows = agreement_[who];
    if (rows.empty()) rows.resize(kSteps * 2);
    return rows[int(std::nearbyint(20 * merged.acceptance_probs[node])) * 2 + sampled];
}

Tree Calibration::merged(
    const std::string& id, bool sampled, const std::vector<TreeView>& trees, int max_nodes) {
    MergedTree all = merge(id, sampled, trees);
    for (int node = 1; node < all.tree.size(); ++node) {
        const double prob =
            agreed(all, node, sampled).rate(all.acceptance_probs[node], numbers_.guess_weight);
        all.tree.path_probs[node] = prob * all.tree.path_probs[all.tree.parents[node]];
    }
    return pruned(all.tree, max_nodes);
}

void Calibration::settle(
    const std::string& id,
    bool sampled,
    const std::vector<TreeView>& trees,
    const std::vector<int32_t>& emitted) {
    const MergedTree all = merge(id, sampled, trees);
    follow(all.tree.parents.data(), all.tree.tokens.data(), all.tree.size(), emitted,
           [&](int node, bool hit) { agreed(all, node, sampled).add(hit, 1.0, numbers_.memory); });
    Table& own = own_[id];
    for (const TreeView& tree : trees) {
        const std::vector<Key> keys = this->keys(tree, sampled);
        follow(tree.parents, tree.tokens, tree.size, emitted, [&](int node, bool hit) {
            at(all_, keys[node]).add(hit, 1.0, numbers_.memory);
            claims_[keys[node].drafter_id].add(hit, tree.acceptance_prob(node), numbers_.memory);
            at(own, keys[node]).add(hit, 1.0, numbers_.request_memory);
        });
    }
}

}  // namespace specserve
