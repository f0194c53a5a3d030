// Draft trees on the host: the C++ half of specserve/tree.py, whose functions are its twins.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace specserve {

constexpr int kMaxNodes = 64;

// Node 0 is the root; every node comes after its parent. Scores are those of whole paths.
struct Tree {
    std::vector<int32_t> tokens;
    std::vector<int16_t> parents;
    std::vector<double> scores;
    std::vector<uint8_t> sources;

    explicit Tree(int32_t root) : tokens{root}, parents{-1}, scores{1.0}, sources{0} {}

    int size() const { return int(tokens.size()); }

    void add(int32_t token, int parent, double score, uint8_t source) {
        tokens.push_back(token);
        parents.push_back(int16_t(parent));
        scores.push_back(score);
        sources.push_back(source);
    }
};

// A tree as somebody else keeps it.
struct TreeView {
    int size;
    const int32_t* tokens;
    const int16_t* parents;
    const float* scores;
    const uint8_t* sources;

    double share(int node) const {
        const double above = scores[parents[node]];
        return above > 0.0 ? scores[node] / above : 0.0;
    }
};

// Throws std::invalid_argument unless this is a tree that a verifier may walk.
void validate(const TreeView& tree, int vocab_size, int max_nodes);

// The most likely chain first: depth first, children by falling score, which the parent's caps.
Tree laid_out(const Tree& tree);

// The best nodes by path score, root included, laid out.
Tree pruned(const Tree& tree, int max_nodes);
Tree pruned(const TreeView& tree, int max_nodes);

// How many of the drafted nodes of some trees, the likeliest first, give the most tokens per second:
// seconds[n] is what a pass with n of them takes. Per tree the number of nodes that stay, its root
// included.
std::vector<int> worthwhile(
    const std::vector<TreeView>& trees, const std::vector<double>& seconds);

// Grows a tree by the most likely paths. `expand(payload, depth, add)` calls `add(token, share,
// payload)` for what may follow a node; paths less likely than `floor` are left out. Of two that
// are equally likely the one that was found first goes first.
template <class Payload, class Expand>
Tree grow_best_first(
    int32_t root, Payload payload, int max_nodes, double floor, uint8_t source, Expand&& expand) {
    struct Open {
        double score;
        int age, parent, depth;
        int32_t token;
        Payload payload;
    };
    const auto later = [](const Open& a, const Open& b) {
        return a.score != b.score ? a.score < b.score : a.age > b.age;
    };
    Tree tree(root);
    std::vector<Open> heap;
    int num_found = 0, depth = 0;
    while (tree.size() < max_nodes) {
        const int node = tree.size() - 1;
        expand(payload, depth, [&](int32_t token, double share, Payload next) {
            const double score = tree.scores[node] * share;
            if (score < floor) return;
            heap.push_back({score, num_found++, node, depth + 1, token, std::move(next)});
            std::push_heap(heap.begin(), heap.end(), later);
        });
        if (heap.empty()) break;
        std::pop_heap(heap.begin(), heap.end(), later);
        Open& best = heap.back();
        tree.add(best.token, best.parent, best.score, source);
        payload = std::move(best.payload);
        depth = best.depth;
        heap.pop_back();
    }
    return laid_out(tree);
}

}  // namespace specserve
