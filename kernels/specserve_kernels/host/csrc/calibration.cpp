#include "calibration.h"

#include <cmath>

namespace specserve {

namespace {

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

double Counts::rate(double prior, double prior_weight) const {
    return (hits + prior_weight * prior) / (visits + prior_weight);
}

int Calibration::row_of(const TreeView& tree, int node, int depth, bool sampled) const {
    const int step = int(std::nearbyint(20 * tree.acceptance_prob(node)));
    return (std::min(depth, numbers_.max_depth) * kSteps + step) * 2 + sampled;
}

Calibration::Rows& Calibration::rows_of(int drafter_id) {
    Rows& rows = counts_[drafter_id];
    if (rows.empty()) rows.resize((numbers_.max_depth + 1) * kSteps * 2);
    return rows;
}

Tree Calibration::merged(bool sampled, const std::vector<TreeView>& trees, int max_nodes) {
    Tree all(trees[0].tokens[0]);
    std::vector<double> probs{1.0};  // conditional, per merged node
    for (const TreeView& tree : trees) {
        std::vector<int> place(tree.size, 0), depths(tree.size, 0);
        for (int node = 1; node < tree.size; ++node) {
            depths[node] = depths[tree.parents[node]] + 1;
            const int drafter_id = tree.drafter_ids[node];
            const double ratio =
                ratios_[drafter_id].rate(numbers_.prior_ratio, numbers_.prior_weight);
            const double prior = std::min(ratio * tree.acceptance_prob(node), 1.0);
            const double prob = rows_of(drafter_id)[row_of(tree, node, depths[node], sampled)].rate(
                prior, numbers_.prior_weight);
            const int parent = place[tree.parents[node]];
            int& index = place[node];
            index = child_of(all, parent, tree.tokens[node]);
            if (index < 0) {
                index = all.size();
                all.add(tree.tokens[node], parent, 0.0, uint8_t(drafter_id));
                probs.push_back(prob);
            } else if (prob > probs[index]) {
                probs[index] = prob;
                all.drafter_ids[index] = uint8_t(drafter_id);
            }
        }
    }
    for (int node = 1; node < all.size(); ++node)
        all.path_probs[node] = probs[node] * all.path_probs[all.parents[node]];
    return pruned(all, max_nodes);
}

void Calibration::record_outcome(
    bool sampled, const std::vector<TreeView>& trees, const std::vector<int32_t>& emitted) {
    for (const TreeView& tree : trees) {
        std::vector<int> depths(tree.size, 0);
        for (int node = 1; node < tree.size; ++node)
            depths[node] = depths[tree.parents[node]] + 1;
        follow(tree.parents, tree.tokens, tree.size, emitted, [&](int node, bool hit) {
            const int drafter_id = tree.drafter_ids[node];
            rows_of(drafter_id)[row_of(tree, node, depths[node], sampled)].add(
                hit, 1.0, numbers_.memory);
            ratios_[drafter_id].add(hit, tree.acceptance_prob(node), numbers_.memory);
        });
    }
}

}  // namespace specserve
