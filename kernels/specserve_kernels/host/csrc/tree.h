// Draft trees on the host: the C++ version of reference/tree.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace specserve {

// Node 0 is the root; parents precede their children.
struct Tree {
    std::vector<int32_t> tokens;
    std::vector<int16_t> parents;
    std::vector<double> path_probs;
    std::vector<uint8_t> drafter_ids;

    explicit Tree(int32_t root) : tokens{root}, parents{-1}, path_probs{1.0}, drafter_ids{0} {}

    int size() const { return int(tokens.size()); }

    void add(int32_t token, int parent, double path_prob, uint8_t drafter_id) {
        tokens.push_back(token);
        parents.push_back(int16_t(parent));
        path_probs.push_back(path_prob);
        drafter_ids.push_back(drafter_id);
    }
};

// A view of a tree in memory that it does not own.
struct TreeView {
    int size;
    const int32_t* tokens;
    const int16_t* parents;
    const float* path_probs;
    const uint8_t* drafter_ids;

    // The conditional acceptance probability of a node, given its parent; `node` is not the root.
    double acceptance_prob(int node) const {
        const double above = path_probs[parents[node]];
        return above > 0.0 ? path_probs[node] / above : 0.0;
    }
};

// Throws std::invalid_argument unless the verifier can walk this tree.
void validate(const TreeView& tree, int vocab_size, int max_nodes);

// Orders nodes depth first, children by descending path probability, which is capped at the
// parent's.
Tree laid_out(const Tree& tree);

// The best nodes by path probability, root included, in the order of `laid_out`.
Tree pruned(const Tree& tree, int max_nodes);
Tree pruned(const TreeView& tree, int max_nodes);

// Selects the nodes worth verifying: of all drafted nodes of the trees, by descending path
// probability, the number that gives the most expected tokens per second, where a forward pass with
// n drafted nodes takes seconds[n]. Returns per tree the number of nodes to keep, its root
// included.
std::vector<int> select_nodes(
    const std::vector<TreeView>& trees, const std::vector<double>& seconds);

// Expands a tree best-first by path probability. `expand(payload, depth, add)` calls `add(token,
// prob, payload)` for each candidate child of a node, with its conditional acceptance probability.
// Paths less likely than `floor` are dropped; of equally likely ones the one found first comes
// first.
template <class Payload, class Expand>
Tree grow_best_first(
    int32_t root,
    Payload payload,
    int max_nodes,
    double floor,
    uint8_t drafter_id,
    Expand&& expand) {
    struct Open {
        double path_prob;
        int age, parent, depth;
        int32_t token;
        Payload payload;
    };
    const auto later = [](const Open& a, const Open& b) {
        return a.path_prob != b.path_prob ? a.path_prob < b.path_prob : a.age > b.age;
    };
    Tree tree(root);
    std::vector<Open> heap;
    int num_found = 0, depth = 0;
    while (tree.size() < max_nodes) {
        const int node = tree.size() - 1;
        expand(payload, depth, [&](int32_t token, double prob, Payload next) {
            const double path_prob = tree.path_probs[node] * prob;
            if (path_prob < floor) return;
            heap.push_back({path_prob, num_found++, node, depth + 1, token, std::move(next)});
            std::push_heap(heap.begin(), heap.end(), later);
        });
        if (heap.empty()) break;
        std::pop_heap(heap.begin(), heap.end(), later);
        Open& best = heap.back();
        tree.add(best.token, best.parent, best.path_prob, drafter_id);
        payload = std::move(best.payload);
        depth = best.depth;
        heap.pop_back();
    }
    return laid_out(tree);
}

}  // namespace specserve
