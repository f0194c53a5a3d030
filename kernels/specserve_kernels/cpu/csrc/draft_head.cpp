#include "draft_head.h"

#include <algorithm>
#include <vector>

#include "candidates.h"
#include "norm.h"

namespace specserve {
namespace {

struct Node {
    int64_t token;
    int64_t parent;  // index among the expanded nodes, -1 for the root
    double path_prob;
    int64_t depth;
    uint64_t word;  // ancestors among the expanded nodes
};

// One tree during its expansion: expanded nodes in cache order, and the frontier of candidates.
class Tree {
   public:
    // fused_rows [num_pending + 1][hidden_size]: of the pending draft inputs and of the root.
    Tree(ExpansionTask& task, const float* fused_rows, int64_t hidden_size)
        : task(task), fused_rows(fused_rows), hidden_size_(hidden_size) {
        nodes.push_back({task.root, -1, 1.0, 0, 1});
    }

    int64_t num_new() const { return int64_t(nodes.size()) - num_done; }
    bool has_new() const { return num_new() > 0; }

    // The hidden state of a node's draft input: fused for the root, else the parent's output.
    const float* hidden_in(const Node& node) const {
        return node.parent < 0 ? fused_rows + task.num_pending * hidden_size_
                               : outputs_.data() + node.parent * hidden_size_;
    }

    // Stores the head's outputs for the new nodes.
    void store_outputs(const float* outputs) {
        outputs_.insert(outputs_.end(), outputs, outputs + num_new() * hidden_size_);
    }

    void add(int64_t node, int64_t token, double probability) {
        if (probability <= 0.0) return;
        const Node& parent = nodes[node];
        frontier_.push_back(
            {token, node, parent.path_prob * probability, parent.depth + 1, parent.word});
    }

    // Selects the best candidates to be expanded in the next forward pass. One node of the budget
    // is reserved for a leaf, since children of the last node would not fit.
    void select_next(const ExpansionLimits& limits) {
        ++task.num_passes;
        num_done = int64_t(nodes.size());
        const int64_t room = std::min(limits.beam, task.budget - 1 - num_done);
        for (int64_t i = 0; i < room; ++i) {
            const int64_t at = best_candidate(limits.max_depth);
            if (at < 0 || frontier_[at].path_prob < limits.min_probability) return;
            nodes.push_back(frontier_[at]);
            nodes.back().word |= uint64_t(1) << (nodes.size() - 1);
            frontier_.erase(frontier_.begin() + at);
        }
    }

    // Writes the result: the expanded nodes, and the best candidates up to the budget.
    void finish() {
        while (int64_t(nodes.size()) < task.budget) {
            const int64_t at = best_candidate(INT64_MAX);
            if (at < 0) break;
            nodes.push_back(frontier_[at]);
            frontier_.erase(frontier_.begin() + at);
        }
        task.num_nodes = int64_t(nodes.size());
        for (int64_t i = 0; i < task.num_nodes; ++i) {
            task.tokens[i] = nodes[i].token;
            task.parents[i] = nodes[i].parent;
            task.path_probs[i] = nodes[i].path_prob;
        }
    }

    ExpansionTask& task;
    const float* fused_rows;
    std::vector<Node> nodes;
    int64_t num_done = 0;  // nodes that have been expanded

   private:
    int64_t best_candidate(int64_t max_depth) const {
        int64_t best = -1;
        for (int64_t i = 0; i < int64_t(frontier_.size()); ++i)
            if (frontier_[i].depth < max_depth &&
                (best < 0 || frontier_[i].path_prob > frontier_[best].path_prob))
                best = i;
        return best;
    }

    int64_t hidden_size_;
    std::vector<Node> frontier_;  // `word` is the parent's
    std::vector<float> outputs_;  // [expanded nodes][hidden_size]
};

// The rows of a forward pass, segment after segment.
struct Batch {
    std::vector<int32_t> cu_rows{0}, context_lens, block_tables;
    std::vector<uint64_t> ancestors;
    std::vector<int64_t> ids, positions, slots, lengths;
    std::vector<const int32_t*> slot_lists;
    std::vector<float> hidden_in;

    void add_row(int64_t id, int64_t position, int64_t slot, uint64_t word, const float* hidden,
                 int64_t hidden_size) {
        ids.push_back(id);
        positions.push_back(position);
        slots.push_back(slot);
        ancestors.push_back(word);
        hidden_in.insert(hidden_in.end(), hidden, hidden + hidden_size);
    }

    // Makes the rows since the last call a segment, which uses `length` slots of the slot list.
    void end_segment(const int32_t* slot_list, int64_t context_len, int64_t length) {
        cu_rows.push_back(int32_t(ids.size()));
        context_lens.push_back(int32_t(context_len));
        slot_lists.push_back(slot_list);
        lengths.push_back(length);
    }

    // A slot list is a block table with a block size of 1.
    Segments segments() {
        const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
        block_tables.assign(lengths.size() * longest, 0);
        for (size_t i = 0; i < lengths.size(); ++i)
            std::copy_n(slot_lists[i], lengths[i], block_tables.begin() + int64_t(i) * longest);
        return {cu_rows.data(),      context_lens.data(),     ancestors.data(),
                block_tables.data(), int64_t(lengths.size()), longest,          1};
    }
};

}  // namespace

// Auxiliary hidden states [num_rows][inputs of fc] -> fused [num_rows][outputs of fc].
SPECSERVE_API void specserve_fuse(const DraftHead& head, const float* aux_hidden, int64_t num_rows,
                                  float* fused, int32_t num_threads) {
    const int64_t num_inputs = head.fc.weight.num_inputs;
    std::vector<float> normed(head.num_norms ? num_rows * num_inputs : 0);
    const int64_t size = head.num_norms ? num_inputs / head.num_norms : 0;
    for (int64_t part = 0; part < num_rows * head.num_norms; ++part)
        rms_norm(aux_hidden + part * size, head.aux_norms + part % head.num_norms * size, size,
                 head.decoder->eps, normed.data() + part * size);
    multiply(head.fc, head.num_norms ? normed.data() : aux_hidden, num_rows, fused, num_threads);
}

namespace {

class TreeExpander {
   public:
    TreeExpander(const DraftHead& head, const ExpansionLimits& limits, const Cache& cache,
                 int num_threads)
        : head_(head),
          d_(*head.decoder),
          limits_(limits),
          cache_(cache),
          num_threads_(num_threads) {}

    void run(ExpansionTask* tasks, int64_t num_tasks) {
        std::vector<Tree> trees;
        trees.reserve(num_tasks);
        const std::vector<float> fused_rows = fuse_all(tasks, num_tasks);
        for (int64_t i = 0, first = 0; i < num_tasks; first += tasks[i++].num_pending + 1)
            trees.emplace_back(tasks[i], fused_rows.data() + first * d_.hidden_size,
                               d_.hidden_size);
        std::vector<Tree*> active;
        for (Tree& tree : trees) active.push_back(&tree);
        for (bool first = true; !active.empty(); first = false) {
            expand(active, first);
            for (Tree* tree : active) tree->select_next(limits_);
            active.erase(std::remove_if(active.begin(), active.end(),
                                        [](Tree* tree) { return !tree->has_new(); }),
                         active.end());
        }
        for (Tree& tree : trees) tree.finish();
    }

   private:
    struct NewNode {
        Tree* tree;
        int64_t node;
    };

    // The fused rows of all trees, one tree after the other.
    std::vector<float> fuse_all(const ExpansionTask* tasks, int64_t num_tasks) const {
        const int64_t width = head_.fc.weight.num_inputs;
        std::vector<float> aux_hidden;
        for (int64_t i = 0; i < num_tasks; ++i)
            aux_hidden.insert(aux_hidden.end(), tasks[i].aux_hidden,
                              tasks[i].aux_hidden + (tasks[i].num_pending + 1) * width);
        const auto num_rows = int64_t(aux_hidden.size()) / width;
        std::vector<float> fused_rows(num_rows * d_.hidden_size);
        specserve_fuse(head_, aux_hidden.data(), num_rows, fused_rows.data(), num_threads_);
        return fused_rows;
    }

    // One expansion step: a forward pass over the new nodes, and in the first step also over the
    // pending draft inputs.
    void expand(const std::vector<Tree*>& active, bool first) {
        Batch batch;
        const int64_t size = d_.hidden_size;
        for (Tree* tree : active)
            if (first) add_pending(batch, *tree);
        std::vector<int64_t> wanted;
        std::vector<NewNode> new_nodes;
        for (Tree* tree : active) {
            const ExpansionTask& task = tree->task;
            for (int64_t i = tree->num_done; i < int64_t(tree->nodes.size()); ++i) {
                const Node& node = tree->nodes[i];
                wanted.push_back(int64_t(batch.ids.size()));
                new_nodes.push_back({tree, i});
                batch.add_row(node.token, task.position + node.depth,
                              task.slot_list[task.num_context + i], node.word,
                              tree->hidden_in(node), size);
            }
            batch.end_segment(task.slot_list, task.num_context,
                              task.num_context + int64_t(tree->nodes.size()));
        }
        const auto num_rows = int64_t(batch.ids.size()), num_new = int64_t(new_nodes.size());
        const Pass pass{batch.segments(),   num_rows,
                        batch.ids.data(),   batch.positions.data(),
                        batch.slots.data(), batch.hidden_in.data(),
                        cache_,             nullptr,
                        0,                  nullptr};
        stride_ = d_.head.weight.num_outputs;
        logits_.resize(num_new * stride_);
        residual_.resize(num_rows * size);
        const Head head{num_new, wanted.data(), head_.vocab_size, logits_.data(), 0, nullptr};
        specserve_decode(d_, pass, head, residual_.data(), num_threads_);
        if (head_.norm_output)
            for (int64_t row : wanted) {
                float* out = residual_.data() + row * size;
                rms_norm(out, d_.norm, size, d_.eps, out);
            }
        int64_t done = 0;
        for (Tree* tree : active) {  // the rows of a tree follow one another
            tree->store_outputs(residual_.data() + wanted[done] * size);
            done += tree->num_new();
        }
        rank(new_nodes);
    }

    void add_pending(Batch& batch, const Tree& tree) const {
        const ExpansionTask& task = tree.task;
        const int64_t before = task.num_context - task.num_pending;
        for (int64_t top = 0; top < task.num_pending; top += kMaxSegmentRows) {
            const int64_t count = std::min(kMaxSegmentRows, task.num_pending - top);
            for (int64_t i = 0; i < count; ++i)
                batch.add_row(task.pending_tokens[top + i],
                              task.position - task.num_pending + top + i,
                              task.slot_list[before + top + i],
                              ~uint64_t(0) >> (kMaxSegmentRows - 1 - i),
                              tree.fused_rows + (top + i) * d_.hidden_size, d_.hidden_size);
            batch.end_segment(task.slot_list, before + top, before + top + count);
        }
    }

    void rank(const std::vector<NewNode>& new_nodes) {
        std::vector<Sampling> sampling;
        for (const NewNode& one : new_nodes) {
            const ExpansionTask& task = one.tree->task;
            const int64_t position = task.noise_position + one.tree->nodes[one.node].depth;
            sampling.push_back({task.temperature, task.top_p, task.min_p, task.top_k,
                             {task.seed, uint64_t(position)}});
        }
        const DraftVocabulary vocabulary{head_.token_ids, head_.vocab_size, head_.logit_scale};
        const std::vector<Candidates> found = find_candidates(
            vocabulary, logits_.data(), stride_, sampling, limits_.branching, num_threads_);
        for (size_t row = 0; row < new_nodes.size(); ++row)
            for (int64_t i = 0; i < found[row].count; ++i)
                new_nodes[row].tree->add(new_nodes[row].node, found[row].tokens[i],
                                         found[row].probabilities[i]);
    }

    const DraftHead& head_;
    const Decoder& d_;
    const ExpansionLimits& limits_;
    const Cache& cache_;
    int num_threads_;
    int64_t stride_ = 0;
    std::vector<float> logits_, residual_;
};

}  // namespace

// Expands all trees together and fills in their results.
SPECSERVE_API void specserve_expand(const DraftHead& head, const ExpansionLimits& limits,
                                    const Cache& cache, ExpansionTask* tasks, int64_t num_tasks,
                                    int32_t num_threads) {
    TreeExpander(head, limits, cache, num_threads).run(tasks, num_tasks);
}

}  // namespace specserve
