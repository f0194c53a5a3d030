#include "draft_head.h"

#include <algorithm>
#include <vector>

#include "candidates.h"
#include "norm.h"
#include "team.h"

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
    // `entering` [num_waiting + 1][hidden_size]: rows of the pending draft inputs and of the root.
    Tree(Growing& task, const float* entering, int64_t hidden_size)
        : task(task), entering(entering), hidden_size_(hidden_size) {
        nodes.push_back({task.root, -1, 1.0, 0, 1});
    }

    int64_t num_fresh() const { return int64_t(nodes.size()) - num_done; }
    bool growing() const { return num_fresh() > 0; }

    // The row of a node's draft input: the fused states for the root, else the parent's output.
    const float* row(const Node& node) const {
        return node.parent < 0 ? entering + task.num_waiting * hidden_size_
                               : rows_.data() + node.parent * hidden_size_;
    }

    // Stores the output rows of the fresh nodes.
    void keep_rows(const float* rows) {
        rows_.insert(rows_.end(), rows, rows + num_fresh() * hidden_size_);
    }

    void add(int64_t node, int64_t token, double prob) {
        if (prob <= 0.0) return;
        const Node& parent = nodes[node];
        pool_.push_back({token, node, parent.path_prob * prob, parent.depth + 1, parent.word});
    }

    // Selects the best candidates to be expanded in the next forward pass. One node of the budget
    // is reserved for a leaf, since children of the last node would not fit.
    void pick(const GrowShape& shape) {
        ++task.num_passes;
        num_done = int64_t(nodes.size());
        const int64_t room = std::min(shape.beam, task.budget - 1 - num_done);
        for (int64_t i = 0; i < room; ++i) {
            const int64_t at = best_candidate(shape.max_depth);
            if (at < 0 || pool_[at].path_prob < shape.min_probability) return;
            nodes.push_back(pool_[at]);
            nodes.back().word |= uint64_t(1) << (nodes.size() - 1);
            pool_.erase(pool_.begin() + at);
        }
    }

    // Writes the result: the expanded nodes, and the best candidates up to the budget.
    void finish() {
        while (int64_t(nodes.size()) < task.budget) {
            const int64_t at = best_candidate(INT64_MAX);
            if (at < 0) break;
            nodes.push_back(pool_[at]);
            pool_.erase(pool_.begin() + at);
        }
        task.num_nodes = int64_t(nodes.size());
        for (int64_t i = 0; i < task.num_nodes; ++i) {
            task.tokens[i] = nodes[i].token;
            task.parents[i] = nodes[i].parent;
            task.path_probs[i] = nodes[i].path_prob;
        }
    }

    Growing& task;
    const float* entering;
    std::vector<Node> nodes;
    int64_t num_done = 0;  // nodes that have been expanded

   private:
    int64_t best_candidate(int64_t max_depth) const {
        int64_t best = -1;
        for (int64_t i = 0; i < int64_t(pool_.size()); ++i)
            if (pool_[i].depth < max_depth &&
                (best < 0 || pool_[i].path_prob > pool_[best].path_prob))
                best = i;
        return best;
    }

    int64_t hidden_size_;
    std::vector<Node> pool_;  // frontier; `word` is the parent's
    std::vector<float> rows_;
};

// The rows of a forward pass, segment after segment.
struct Batch {
    std::vector<int32_t> cu_rows{0}, context_lens, lanes;
    std::vector<uint64_t> ancestors;
    std::vector<int64_t> ids, positions, slots, lengths;
    std::vector<const int32_t*> lane_of;
    std::vector<float> rows;

    void add_row(int64_t id, int64_t position, int64_t slot, uint64_t word, const float* row,
                 int64_t hidden_size) {
        ids.push_back(id);
        positions.push_back(position);
        slots.push_back(slot);
        ancestors.push_back(word);
        rows.insert(rows.end(), row, row + hidden_size);
    }

    // Makes the rows since the last call a segment, which uses `length` slots of the slot list.
    void end_segment(const int32_t* lane, int64_t context_len, int64_t length) {
        cu_rows.push_back(int32_t(ids.size()));
        context_lens.push_back(int32_t(context_len));
        lane_of.push_back(lane);
        lengths.push_back(length);
    }

    // A slot list is a block table with a block size of 1.
    Segments segments() {
        const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
        lanes.assign(lengths.size() * longest, 0);
        for (size_t i = 0; i < lengths.size(); ++i)
            std::copy_n(lane_of[i], lengths[i], lanes.begin() + int64_t(i) * longest);
        return {cu_rows.data(),          context_lens.data(), ancestors.data(), lanes.data(),
                int64_t(lengths.size()), longest,             1};
    }
};

class Grower {
   public:
    Grower(const DraftHead& head, const GrowShape& shape, const DraftCache& cache, int num_threads)
        : head_(head),
          d_(*head.decoder),
          shape_(shape),
          cache_(cache),
          num_threads_(num_threads) {}

    void run(Growing* tasks, int64_t num_trees) {
        std::vector<Tree> trees;
        trees.reserve(num_trees);
        const std::vector<float> entering = fused(tasks, num_trees);
        for (int64_t i = 0, first = 0; i < num_trees; first += tasks[i++].num_waiting + 1)
            trees.emplace_back(tasks[i], entering.data() + first * d_.hidden_size, d_.hidden_size);
        std::vector<Tree*> growing;
        for (Tree& tree : trees) growing.push_back(&tree);
        for (bool first = true; !growing.empty(); first = false) {
            look(growing, first);
            for (Tree* tree : growing) tree->pick(shape_);
            growing.erase(std::remove_if(growing.begin(), growing.end(),
                                         [](Tree* tree) { return !tree->growing(); }),
                          growing.end());
        }
        for (Tree& tree : trees) tree.finish();
    }

   private:
    struct Fresh {
        Tree* tree;
        int64_t node;
    };

    // The fused rows of all trees, one tree after the other.
    std::vector<float> fused(const Growing* tasks, int64_t num_trees) const {
        const int64_t width = head_.fc.weight.num_inputs;
        std::vector<float> taps;
        for (int64_t i = 0; i < num_trees; ++i)
            taps.insert(taps.end(), tasks[i].taps, tasks[i].taps + (tasks[i].num_waiting + 1) * width);
        const auto num_rows = int64_t(taps.size()) / width;
        std::vector<float> rows(num_rows * d_.hidden_size);
        fuse(head_, taps.data(), num_rows, rows.data(), num_threads_);
        return rows;
    }

    // One expansion step: a forward pass over the fresh nodes, and in the first step also over the
    // pending draft inputs.
    void look(const std::vector<Tree*>& growing, bool first) {
        Batch batch;
        const int64_t size = d_.hidden_size;
        for (Tree* tree : growing)
            if (first) add_waiting(batch, *tree);
        std::vector<int64_t> wanted;
        std::vector<Fresh> fresh;
        for (Tree* tree : growing) {
            const Growing& task = tree->task;
            for (int64_t i = tree->num_done; i < int64_t(tree->nodes.size()); ++i) {
                const Node& node = tree->nodes[i];
                wanted.push_back(int64_t(batch.ids.size()));
                fresh.push_back({tree, i});
                batch.add_row(node.token, task.position + node.depth,
                              task.lane[task.num_context + i], node.word, tree->row(node), size);
            }
            batch.end_segment(task.lane, task.num_context,
                              task.num_context + int64_t(tree->nodes.size()));
        }
        const auto num_rows = int64_t(batch.ids.size()), num_fresh = int64_t(fresh.size());
        const Pass pass{batch.segments(), num_rows,       batch.ids.data(),  batch.positions.data(),
                        batch.slots.data(), batch.rows.data(), cache_.kv,    cache_.num_slots,
                        cache_.wide,      nullptr,        0,                 nullptr};
        stride_ = d_.head.weight.num_outputs;
        logits_.resize(num_fresh * stride_);
        residual_.resize(num_rows * size);
        const Head head{num_fresh, wanted.data(), head_.vocab_size, logits_.data(), 0, nullptr};
        decode(d_, pass, head, residual_.data(), num_threads_);
        if (head_.norm_output)
            for (int64_t row : wanted) {
                float* out = residual_.data() + row * size;
                rms_norm(out, d_.norm, size, d_.eps, out);
            }
        int64_t done = 0;
        for (Tree* tree : growing) {  // the rows of a tree follow one another
            tree->keep_rows(residual_.data() + wanted[done] * size);
            done += tree->num_fresh();
        }
        rank(fresh);
    }

    void add_waiting(Batch& batch, const Tree& tree) const {
        const Growing& task = tree.task;
        const int64_t before = task.num_context - task.num_waiting;
        for (int64_t top = 0; top < task.num_waiting; top += kMaxSegmentRows) {
            const int64_t count = std::min(kMaxSegmentRows, task.num_waiting - top);
            for (int64_t i = 0; i < count; ++i)
                batch.add_row(task.waiting[top + i], task.position - task.num_waiting + top + i,
                              task.lane[before + top + i],
                              ~uint64_t(0) >> (kMaxSegmentRows - 1 - i),
                              tree.entering + (top + i) * d_.hidden_size, d_.hidden_size);
            batch.end_segment(task.lane, before + top, before + top + count);
        }
    }

    void rank(const std::vector<Fresh>& fresh) {
        std::vector<Draw> draws;
        for (const Fresh& one : fresh) {
            const Growing& task = one.tree->task;
            const int64_t position = task.draw_position + one.tree->nodes[one.node].depth;
            draws.push_back({task.temperature, task.top_p, task.min_p, task.top_k,
                             {task.seed, uint64_t(position)}});
        }
        const DraftVocabulary vocabulary{head_.token_ids, head_.vocab_size, head_.logit_scale};
        const std::vector<Candidates> found = find_candidates(
            vocabulary, logits_.data(), stride_, draws, shape_.branching, num_threads_);
        for (size_t row = 0; row < fresh.size(); ++row)
            for (int64_t i = 0; i < found[row].count; ++i)
                fresh[row].tree->add(fresh[row].node, found[row].tokens[i], found[row].shares[i]);
    }

    const DraftHead& head_;
    const Decoder& d_;
    const GrowShape& shape_;
    const DraftCache& cache_;
    int num_threads_;
    int64_t stride_ = 0;
    std::vector<float> logits_, residual_;
};

}  // namespace

void fuse(const DraftHead& head, const float* taps, int64_t num_rows, float* rows,
          int num_threads) {
    const Weight& weight = head.fc.weight;
    const int64_t num_inputs = weight.num_inputs, num_panels = weight.num_outputs / kPanel;
    const RowBuffer buffer(num_rows, num_inputs);
    run_team(2, num_threads, [&](Team& team) {
        team.share(num_rows, [&](int64_t row) {
            const float* x = taps + row * num_inputs;
            thread_local std::vector<float> y;
            y.resize(num_inputs);
            const int64_t size = head.num_norms ? num_inputs / head.num_norms : 0;
            for (int64_t i = 0; i < head.num_norms; ++i)
                rms_norm(x + i * size, head.tap_norms + i * size, size, head.decoder->eps,
                         y.data() + i * size);
            quantize_row(head.num_norms ? y.data() : x, buffer.rows(), row);
        });
        team.share((num_panels + kPanels - 1) / kPanels, [&](int64_t unit) {
            const int64_t first = unit * kPanels;
            const int64_t last = std::min(first + kPanels, num_panels);
            float* y = rows + first * kPanel;
            linear_panels(weight, buffer.rows(), num_rows, first, last, y, weight.num_outputs);
            if (!head.fc.bias) return;
            for (int64_t row = 0; row < num_rows; ++row)
                for (int64_t c = 0; c < (last - first) * kPanel; ++c)
                    y[row * weight.num_outputs + c] += head.fc.bias[first * kPanel + c];
        });
    });
}

void grow(const DraftHead& head, const GrowShape& shape, const DraftCache& cache, Growing* trees,
          int64_t num_trees, int num_threads) {
    Grower(head, shape, cache, num_threads).run(trees, num_trees);
}

}  // namespace specserve
