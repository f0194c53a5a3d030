// Draft trees on the host: the C++ version of reference/tree.py.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace specserve {

constexpr uint8_t kDraftedId = 1;  // drafter id of the nodes of grown trees

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

// Node 0 is the root; parents precede their children.
struct Tree {
    std::vector<int32_t> tokens;
    std::vector<int16_t> parents;
    std::vector<double> path_probs;
    std::vector<uint8_t> drafter_ids;

    explicit Tree(int32_t root) : tokens{root}, parents{-1}, path_probs{1.0}, drafter_ids{0} {}

    explicit Tree(const TreeView& view) : Tree(view.tokens[0]) {
        for (int node = 1; node < view.size; ++node)
            add(view.tokens[node], view.parents[node], view.path_probs[node], view.drafter_ids[node]);
    }

    int size() const { return int(tokens.size()); }

    void add(int32_t token, int parent, double path_prob, uint8_t drafter_id) {
        tokens.push_back(token);
        parents.push_back(int16_t(parent));
        path_probs.push_back(path_prob);
        drafter_ids.push_back(drafter_id);
    }
};

// Throws std::invalid_argument unless the verifier can walk this tree.
inline void validate(const TreeView& tree, int vocab_size, int max_nodes) {
    const auto refuse = [](const std::string& why) { throw std::invalid_argument(why); };
    if (tree.size < 1 || tree.size > max_nodes)
        refuse("tree has " + std::to_string(tree.size) + " nodes; expected 1 to " +
               std::to_string(max_nodes));
    if (tree.parents[0] != -1)
        refuse("parents[0] is " + std::to_string(tree.parents[0]) + "; the root's parent is -1");
    for (int node = 0; node < tree.size; ++node)
        if (tree.tokens[node] < 0 || tree.tokens[node] >= vocab_size)
            refuse("a tree token is outside the vocabulary of " + std::to_string(vocab_size));
    for (int node = 1; node < tree.size; ++node)
        for (int other = 1; other < node; ++other)
            if (tree.parents[other] == tree.parents[node] && tree.tokens[other] == tree.tokens[node])
                refuse("two children of one node carry the same token");
    for (int node = 1; node < tree.size; ++node) {
        const int parent = tree.parents[node];
        if (parent < 0 || parent >= node) refuse("a node's parent must come before it");
        // Written so that a NaN fails.
        if (!(0.0f <= tree.path_probs[node] && tree.path_probs[node] <= tree.path_probs[parent]))
            refuse("a path probability must be in [0, its parent's]");
    }
}

// Orders nodes depth first, children by descending path probability, which is capped at the
// parent's.
inline Tree laid_out(const Tree& tree) {
    const int size = tree.size();
    std::vector<double> capped(size, 1.0);
    std::vector<std::vector<int>> children(size);
    for (int node = 1; node < size; ++node) {
        capped[node] = std::min(tree.path_probs[node], capped[tree.parents[node]]);
        children[tree.parents[node]].push_back(node);
    }
    Tree laid(tree.tokens[0]);
    std::vector<int> stack, place(size, 0);
    for (int node = 0;;) {
        std::vector<int>& below = children[node];
        std::stable_sort(below.begin(), below.end(),
                         [&](int a, int b) { return capped[a] > capped[b]; });
        stack.insert(stack.end(), below.rbegin(), below.rend());
        if (stack.empty()) return laid;
        node = stack.back();
        stack.pop_back();
        place[node] = laid.size();
        laid.add(tree.tokens[node], place[tree.parents[node]], capped[node], tree.drafter_ids[node]);
    }
}

// The best nodes by path probability, root included, in the order of `laid_out`.
inline Tree pruned(const Tree& tree, int max_nodes) {
    if (tree.size() <= max_nodes) return laid_out(tree);
    std::vector<int> ranked(tree.size());
    std::iota(ranked.begin(), ranked.end(), 0);
    // Stable: a child never ranks before its parent.
    std::stable_sort(ranked.begin(), ranked.end(),
                     [&](int a, int b) { return tree.path_probs[a] > tree.path_probs[b]; });
    ranked.resize(max_nodes);
    std::sort(ranked.begin(), ranked.end());
    std::vector<int> place(tree.size(), 0);
    Tree kept(tree.tokens[0]);
    for (const int node : ranked) {
        if (node == 0) continue;
        place[node] = kept.size();
        kept.add(tree.tokens[node], place[tree.parents[node]], tree.path_probs[node],
                 tree.drafter_ids[node]);
    }
    return laid_out(kept);
}

inline Tree build_tree(const std::vector<int32_t>& tokens, const std::vector<int>& parents,
                       const std::vector<double>& path_probs, uint8_t drafter_id) {
    if (tokens.empty() || parents.size() != tokens.size() || path_probs.size() != tokens.size())
        throw std::invalid_argument("build_tree: expected a root, and as much of everything");
    Tree tree(tokens[0]);
    for (size_t node = 1; node < tokens.size(); ++node) {
        if (parents[node] < 0 || parents[node] >= int(node))
            throw std::invalid_argument("build_tree: a node's parent must come before it");
        tree.add(tokens[node], parents[node], path_probs[node], drafter_id);
    }
    return laid_out(tree);
}

// The nodes worth verifying; nothing in place of a tree that is kept whole.
inline std::vector<std::optional<Tree>> select_nodes(const std::vector<TreeView>& trees,
                                                     const std::vector<double>& seconds) {
    struct Drafted {
        float path_prob;
        int tree;
    };
    std::vector<Drafted> drafted;
    for (size_t tree = 0; tree < trees.size(); ++tree)
        for (int node = 1; node < trees[tree].size; ++node)
            drafted.push_back({trees[tree].path_probs[node], int(tree)});
    std::stable_sort(drafted.begin(), drafted.end(), [](const Drafted& a, const Drafted& b) {
        return a.path_prob > b.path_prob;
    });
    double expected = double(trees.size()), best_rate = expected / seconds.at(0);
    size_t best = 0;
    for (size_t count = 1; count <= drafted.size(); ++count) {
        expected += drafted[count - 1].path_prob;
        if (expected / seconds.at(count) > best_rate) {
            best = count;
            best_rate = expected / seconds[count];
        }
    }
    std::vector<int> num_kept(trees.size(), 1);
    for (size_t index = 0; index < best; ++index) ++num_kept[drafted[index].tree];
    std::vector<std::optional<Tree>> selected(trees.size());
    for (size_t tree = 0; tree < trees.size(); ++tree)
        if (num_kept[tree] < trees[tree].size)
            selected[tree] = pruned(Tree(trees[tree]), num_kept[tree]);
    return selected;
}

// Expands a tree best-first by path probability. `expand(payload, depth, add)` calls `add(token,
// prob, payload)` for each candidate child of a node, with its conditional acceptance probability.
// Paths less likely than `floor` are dropped; of equally likely ones the one found first comes
// first.
template <class Payload, class Expand>
Tree grow_best_first(int32_t root, Payload payload, int max_nodes, double floor, Expand&& expand) {
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
        tree.add(best.token, best.parent, best.path_prob, kDraftedId);
        payload = std::move(best.payload);
        depth = best.depth;
        heap.pop_back();
    }
    return laid_out(tree);
}

}  // namespace specserve
