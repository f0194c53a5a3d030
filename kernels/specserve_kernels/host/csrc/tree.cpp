#include "tree.h"

#include <numeric>
#include <stdexcept>
#include <string>

namespace specserve {

void validate(const TreeView& tree, int vocab_size, int max_nodes) {
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
            if (tree.parents[other] == tree.parents[node] &&
                tree.tokens[other] == tree.tokens[node])
                refuse("two children of one node carry the same token");
    for (int node = 1; node < tree.size; ++node) {
        const int parent = tree.parents[node];
        if (parent < 0 || parent >= node) refuse("a node's parent must come before it");
        // Written so that a NaN fails.
        if (!(0.0f <= tree.path_probs[node] && tree.path_probs[node] <= tree.path_probs[parent]))
            refuse("a path probability must be in [0, its parent's]");
    }
}

Tree laid_out(const Tree& tree) {
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
        std::stable_sort(
            below.begin(), below.end(), [&](int a, int b) { return capped[a] > capped[b]; });
        stack.insert(stack.end(), below.rbegin(), below.rend());
        if (stack.empty()) return laid;
        node = stack.back();
        stack.pop_back();
        place[node] = laid.size();
        laid.add(
            tree.tokens[node],
            place[tree.parents[node]],
            capped[node],
            tree.drafter_ids[node]);
    }
}

Tree pruned(const Tree& tree, int max_nodes) {
    if (tree.size() <= max_nodes) return laid_out(tree);
    std::vector<int> ranked(tree.size());
    std::iota(ranked.begin(), ranked.end(), 0);
    // Stable: a child never ranks before its parent.
    std::stable_sort(ranked.begin(), ranked.end(), [&](int a, int b) {
        return tree.path_probs[a] > tree.path_probs[b];
    });
    ranked.resize(max_nodes);
    std::sort(ranked.begin(), ranked.end());
    std::vector<int> place(tree.size(), 0);
    Tree kept(tree.tokens[0]);
    for (const int node : ranked) {
        if (node == 0) continue;
        place[node] = kept.size();
        kept.add(
            tree.tokens[node],
            place[tree.parents[node]],
            tree.path_probs[node],
            tree.drafter_ids[node]);
    }
    return laid_out(kept);
}

Tree pruned(const TreeView& view, int max_nodes) {
    Tree tree(view.tokens[0]);
    for (int node = 1; node < view.size; ++node)
        tree.add(
            view.tokens[node], view.parents[node], view.path_probs[node], view.drafter_ids[node]);
    return pruned(tree, max_nodes);
}

std::vector<int> select_nodes(
    const std::vector<TreeView>& trees, const std::vector<double>& seconds) {
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
    std::vector<int> kept(trees.size(), 1);
    for (size_t index = 0; index < best; ++index) ++kept[drafted[index].tree];
    return kept;
}

}  // namespace specserve
