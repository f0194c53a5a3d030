// Observed acceptance rates of drafted nodes, and the merging of draft trees by these rates: the
// C++ version of reference/calibration.py, which explains the parameters.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "tree.h"

namespace specserve {

class Calibration {
   public:
    Calibration(int max_depth, double prior_ratio, double prior_weight, double memory)
        : max_depth_(max_depth),
          prior_ratio_(prior_ratio),
          prior_weight_(prior_weight),
          memory_(memory) {}

    Tree merged(bool sampled, const std::vector<TreeView>& trees, int max_nodes) {
        Tree all(trees.at(0).tokens[0]);
        std::vector<double> probs{1.0};  // conditional, per merged node
        for (const TreeView& tree : trees) {
            const std::vector<int> depths = depths_of(tree);
            std::vector<int> place(tree.size, 0);
            for (int node = 1; node < tree.size; ++node) {
                const uint8_t drafter_id = tree.drafter_ids[node];
                const double ratio = ratios_[drafter_id].rate(prior_ratio_, prior_weight_);
                const double prior = std::min(ratio * tree.acceptance_prob(node), 1.0);
                const double prob =
                    counts_of(tree, node, depths[node], sampled).rate(prior, prior_weight_);
                const int parent = place[tree.parents[node]];
                int& index = place[node];
                index = child_of(all, parent, tree.tokens[node]);
                if (index < 0) {
                    index = all.size();
                    all.add(tree.tokens[node], parent, 0.0, drafter_id);
                    probs.push_back(prob);
                } else if (prob > probs[index]) {
                    probs[index] = prob;
                    all.drafter_ids[index] = drafter_id;
                }
            }
        }
        for (int node = 1; node < all.size(); ++node)
            all.path_probs[node] = probs[node] * all.path_probs[all.parents[node]];
        return pruned(all, max_nodes);
    }

    void record_outcome(bool sampled, const std::vector<TreeView>& trees,
                        const std::vector<int32_t>& emitted) {
        for (const TreeView& tree : trees) {
            const std::vector<int> depths = depths_of(tree);
            int reached = 0;
            for (const int32_t token : emitted) {
                int next = -1;
                for (int node = reached + 1; node < tree.size; ++node) {
                    if (tree.parents[node] != reached) continue;
                    const bool hit = tree.tokens[node] == token;
                    counts_of(tree, node, depths[node], sampled).add(hit, 1.0, memory_);
                    ratios_[tree.drafter_ids[node]].add(hit, tree.acceptance_prob(node), memory_);
                    if (hit) next = node;
                }
                if (next < 0) break;
                reached = next;
            }
        }
    }

   private:
    static constexpr int kSteps = 21;  // estimates in steps of 1/20, from 0 to 1

    struct Counts {
        double hits = 0.0, visits = 0.0;

        void add(bool hit, double weight, double memory) {
            if (visits >= memory) {
                hits /= 2;
                visits /= 2;
            }
            hits += hit;
            visits += weight;
        }

        double rate(double prior, double prior_weight) const {
            return (hits + prior_weight * prior) / (visits + prior_weight);
        }
    };

    static std::vector<int> depths_of(const TreeView& tree) {
        std::vector<int> depths(tree.size, 0);
        for (int node = 1; node < tree.size; ++node) depths[node] = depths[tree.parents[node]] + 1;
        return depths;
    }

    // The child of `parent` with this token, or -1.
    static int child_of(const Tree& tree, int parent, int32_t token) {
        for (int node = parent + 1; node < tree.size(); ++node)
            if (tree.parents[node] == parent && tree.tokens[node] == token) return node;
        return -1;
    }

    Counts& counts_of(const TreeView& tree, int node, int depth, bool sampled) {
        std::vector<Counts>& counts = counts_[tree.drafter_ids[node]];
        if (counts.empty()) counts.resize((max_depth_ + 1) * kSteps * 2);
        const int step = int(std::nearbyint(20 * tree.acceptance_prob(node)));
        return counts[(std::min(depth, max_depth_) * kSteps + step) * 2 + sampled];
    }

    int max_depth_;
    double prior_ratio_, prior_weight_, memory_;
    std::unordered_map<int, std::vector<Counts>> counts_;  // by drafter id
    std::unordered_map<int, Counts> ratios_;  // by drafter id: accepted nodes per estimate
};

}  // namespace specserve
