#include "draft_head.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "lanes.h"
#include "norm.h"
#include "sampler.h"
#include "team.h"

namespace specserve {
namespace {

constexpr int64_t kPiece = 1024;     // logits of a row, for one thread
constexpr int64_t kNucleus = 64;     // candidates, and what top-k, top-p and min-p look among
constexpr int64_t kPanelsInUnit = 2;
constexpr float kLog2e = 1.4426950408889634f;

float largest(const float* x, int64_t count) {
    Floats most = broadcast(x[0]);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) most = max(most, load(x + i));
    float result = lane_max(most);
    for (; i < count; ++i) result = std::max(result, x[i]);
    return result;
}

// y = 2^((x - most) * scale); returns their sum.
float exponents(const float* x, int64_t count, float most, float scale, float* y) {
    const Floats from = broadcast(most), by = broadcast(scale);
    Floats sum = zero_floats();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Floats value = exp2(mul(sub(load(x + i), from), by));
        store(y + i, value);
        sum = add(sum, value);
    }
    float result = lane_sum(sum);
    for (; i < count; ++i) result += y[i] = std::exp2((x[i] - most) * scale);
    return result;
}

// x /= y; returns the sum.
float quotients(float* x, const float* y, int64_t count) {
    Floats sum = zero_floats();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Floats value = div(load(x + i), load(y + i));
        store(x + i, value);
        sum = add(sum, value);
    }
    float result = lane_sum(sum);
    for (; i < count; ++i) result += x[i] /= y[i];
    return result;
}

// The places of the `wanted` largest values, the largest first, the first among equals.
int64_t best_of(const float* values, int64_t count, int64_t wanted, int64_t* best) {
    int64_t found = 0;
    auto offer = [&](int64_t i) {
        if (found == wanted && !(values[i] > values[best[found - 1]])) return;
        int64_t at = found < wanted ? found++ : found - 1;
        for (; at > 0 && values[i] > values[best[at - 1]]; --at) best[at] = best[at - 1];
        best[at] = i;
    };
    constexpr int64_t kBlock = 64;
    for (int64_t first = 0; first < count; first += kBlock) {
        const int64_t last = std::min(first + kBlock, count);
        if (found == wanted && !(largest(values + first, last - first) > values[best[found - 1]]))
            continue;
        for (int64_t i = first; i < last; ++i) offer(i);
    }
    return found;
}

struct Node {
    int64_t token;
    int64_t parent;  // among the evaluated nodes, -1 for the root
    double score;
    int64_t depth;
    uint64_t word;  // ancestors among the evaluated nodes
};

// One tree while it grows: evaluated nodes in cache order, and the candidates they brought.
class Tree {
   public:
    // `entering` [num_waiting + 1][hidden_size]: rows of the waiting pairs and the root's.
    Tree(Growing& task, const float* entering, int64_t hidden_size)
        : task(task), entering(entering), hidden_size_(hidden_size) {
        nodes.push_back({task.root, -1, 1.0, 0, 1});
    }

    int64_t num_fresh() const { return int64_t(nodes.size()) - num_done; }
    bool growing() const { return num_fresh() > 0; }

    // What a node goes on from.
    const float* row(const Node& node) const {
        return node.parent < 0 ? entering + task.num_waiting * hidden_size_
                               : rows_.data() + node.parent * hidden_size_;
    }

    // The fresh nodes have been looked at; `rows` came out for them.
    void keep_rows(const float* rows) {
        rows_.insert(rows_.end(), rows, rows + num_fresh() * hidden_size_);
    }

    void add(int64_t node, int64_t token, double share) {
        if (share <= 0.0) return;
        const Node& parent = nodes[node];
        pool_.push_back({token, node, parent.score * share, parent.depth + 1, parent.word});
    }

    // The best candidates become the nodes of the next pass. One node of the budget is left for a
    // leaf: looking at all would be looking in vain.
    void pick(const GrowShape& shape) {
        ++task.num_passes;
        num_done = int64_t(nodes.size());
        const int64_t room = std::min(shape.beam, task.budget - 1 - num_done);
        for (int64_t i = 0; i < room; ++i) {
            const int64_t at = best_candidate(shape.max_depth);
            if (at < 0 || pool_[at].score < shape.min_score) return;
            nodes.push_back(pool_[at]);
            nodes.back().word |= uint64_t(1) << (nodes.size() - 1);
            pool_.erase(pool_.begin() + at);
        }
    }

    // The evaluated nodes, and the best of the others.
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
            task.scores[i] = nodes[i].score;
        }
    }

    Growing& task;
    const float* entering;
    std::vector<Node> nodes;
    int64_t num_done = 0;  // nodes whose K, V and candidates are there

   private:
    int64_t best_candidate(int64_t max_depth) const {
        int64_t best = -1;
        for (int64_t i = 0; i < int64_t(pool_.size()); ++i)
            if (pool_[i].depth < max_depth && (best < 0 || pool_[i].score > pool_[best].score))
                best = i;
        return best;
    }

    int64_t hidden_size_;
    std::vector<Node> pool_;  // `word` is the parent's
    std::vector<float> rows_;
};

// The rows of a pass, segment after segment.
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

    // A segment of the rows since the last one, with `length` slots in use.
    void end_segment(const int32_t* lane, int64_t context_len, int64_t length) {
        cu_rows.push_back(int32_t(ids.size()));
        context_lens.push_back(int32_t(context_len));
        lane_of.push_back(lane);
        lengths.push_back(length);
    }

    // Lanes are block tables of blocks of one slot.
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
          num_threads_(num_threads),
          branching_(std::min(shape.branching, head.vocab_size)) {}

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
    struct Found {  // candidates of a row, the best first
        int64_t count;
        int64_t tokens[kNucleus];
        float shares[kNucleus];
    };

    struct Fresh {
        Tree* tree;
        int64_t node;
    };

    // The rows of all trees, one after the other.
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

    // One pass over the fresh nodes, and in the first over what waits.
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
        const int64_t num_fresh = int64_t(fresh.size());
        const int64_t num_pieces = (head_.vocab_size + kPiece - 1) / kPiece;
        weights_.resize(num_fresh * head_.vocab_size);
        sums_.resize(num_fresh * num_pieces);
        found_.resize(num_fresh);
        run_team(2, num_threads_, [&](Team& team) {
            team.share(num_fresh * num_pieces, [&](int64_t unit) {
                weigh(fresh[unit / num_pieces], unit, num_pieces);
            });
            team.share(num_fresh, [&](int64_t row) { choose(fresh[row], row, num_pieces); });
        });
        for (int64_t row = 0; row < num_fresh; ++row)
            for (int64_t i = 0; i < found_[row].count; ++i)
                fresh[row].tree->add(fresh[row].node, found_[row].tokens[i], found_[row].shares[i]);
    }

    static bool is_filtered(const Growing& task) {
        return task.temperature > 0.0f && (task.top_k > 0 || task.top_p < 1.0f || task.min_p > 0.0f);
    }

    static Key key(const Fresh& fresh) {
        const Growing& task = fresh.tree->task;
        return {task.seed, uint64_t(task.draw_position + fresh.tree->nodes[fresh.node].depth)};
    }

    // exp(log q / T + g) of a piece of a row, times any constant, and their sum. Filtered rows get
    // their noise when it is known for which tokens.
    void weigh(const Fresh& fresh, int64_t unit, int64_t num_pieces) {
        const Growing& task = fresh.tree->task;
        const int64_t row = unit / num_pieces, first = unit % num_pieces * kPiece;
        const int64_t count = std::min(kPiece, head_.vocab_size - first);
        const float* logits = logits_.data() + row * stride_;
        float* weights = weights_.data() + row * head_.vocab_size + first;
        const float temperature = task.temperature > 0.0f ? task.temperature : 1.0f;
        float sum = exponents(logits + first, count, largest(logits, head_.vocab_size),
                              head_.logit_scale * kLog2e / temperature, weights);
        if (task.temperature > 0.0f && !is_filtered(task)) {
            float noise[kPiece];
            exponentials(key(fresh), head_.token_ids + first, count, noise);
            sum = quotients(weights, noise, count);
        }
        sums_[unit] = sum;
    }

    void choose(const Fresh& fresh, int64_t row, int64_t num_pieces) {
        const float* weights = weights_.data() + row * head_.vocab_size;
        float sum = 0.0f;
        for (int64_t i = 0; i < num_pieces; ++i) sum += sums_[row * num_pieces + i];
        Found& found = found_[row];
        found.count = 0;
        if (!std::isfinite(sum)) return;  // logits that are no numbers give no candidates
        if (is_filtered(fresh.tree->task)) return filter(fresh, weights, sum, found);
        int64_t places[kNucleus];
        found.count = best_of(weights, head_.vocab_size, branching_, places);
        for (int64_t i = 0; i < found.count; ++i) {
            found.tokens[i] = head_.token_ids[places[i]];
            found.shares[i] = weights[places[i]] / sum;
        }
    }

    // Those that top-k, then top-p, then min-p leave among the kNucleus best, by their noise.
    void filter(const Fresh& fresh, const float* weights, float sum, Found& found) const {
        const Growing& task = fresh.tree->task;
        const int64_t most = task.top_k > 0 ? std::min(task.top_k, kNucleus) : kNucleus;
        int64_t places[kNucleus] = {}, tokens[kNucleus] = {};
        float noisy[kNucleus], noise[kNucleus];
        const int64_t num_best =
            best_of(weights, head_.vocab_size, std::min(most, head_.vocab_size), places);
        if (task.top_k > 0 && task.top_k <= kNucleus) {
            sum = 0.0f;
            for (int64_t i = 0; i < num_best; ++i) sum += weights[places[i]];
        }
        float before = 0.0f;
        int64_t count = 0;
        for (; count < num_best; ++count) {
            const float weight = weights[places[count]];
            if (count && (before >= task.top_p * sum || weight < task.min_p * noisy[0])) break;
            tokens[count] = head_.token_ids[places[count]];
            noisy[count] = weight;
            before += weight;
        }
        exponentials(key(fresh), tokens, count, noise);
        const float total = quotients(noisy, noise, count);
        found.count = best_of(noisy, count, std::min(branching_, count), places);
        for (int64_t i = 0; i < found.count; ++i) {
            found.tokens[i] = tokens[places[i]];
            found.shares[i] = noisy[places[i]] / total;
        }
    }

    const DraftHead& head_;
    const Decoder& d_;
    const GrowShape& shape_;
    const DraftCache& cache_;
    int num_threads_;
    int64_t branching_;  // at most kNucleus
    int64_t stride_ = 0;
    std::vector<float> logits_, residual_, weights_, sums_;
    std::vector<Found> found_;
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
        team.share((num_panels + kPanelsInUnit - 1) / kPanelsInUnit, [&](int64_t unit) {
            const int64_t first = unit * kPanelsInUnit;
            const int64_t last = std::min(first + kPanelsInUnit, num_panels);
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
