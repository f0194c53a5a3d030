// Attention of some rows of a segment for one KV head, split by split. The rows share the work on K
// and V.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "attention.h"
#include "kv_tiles.h"
#include "lanes.h"

namespace specserve {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kHidden = -std::numeric_limits<float>::infinity();
static_assert(kSplit % kChunk == 0);

struct Query {  // softmax state of one query: maximum score and sum of weights
    float top = kHidden;
    float sum = 0;
};

// Softmax weights of `count` scores, and of those after them up to a multiple of kLanes.
template <typename Element>
Query weigh(const float* scores, int64_t count, FactorOf<Element>* weights) {
    Floats most = load(scores);
    for (int64_t at = kLanes; at < count; at += kLanes) most = max(most, load(scores + at));
    const float top = lane_max(most);
    const Floats minus_top = broadcast(-top);
    Floats sum = zero_floats();
    for (int64_t at = 0; at < count; at += kLanes) {
        const Floats weight = exp2(add(load(scores + at), minus_top));
        store_factors_of<Element>(weight, weights + at);
        sum = add(sum, weight);
    }
    return {top, lane_sum(sum)};
}

// One row of a unit.
struct Row {
    Row() = default;
    Row(const Segments& segments, const AttentionShape& shape, int64_t segment, int64_t row)
        : nodes(segments.ancestors[row]),
          end(segments.context_lens[segment] + __builtin_popcountll(nodes)),
          begin(shape.window ? std::max<int64_t>(end - shape.window, 0) : 0) {}

    bool sees(int64_t first, int64_t last) const { return begin < last && end > first; }

    uint64_t nodes = 0;  // that it sees, itself included
    int64_t end = 0;     // number of positions along its path
    int64_t begin = 0;   // first position inside the window
};

// Calls f(n, first) for tiles of n consecutive items; n is a compile-time constant, at most
// kQueriesTogether.
template <typename F>
inline void in_tiles(int64_t count, const F& f) {
    for (int64_t first = 0; first < count; first += kQueriesTogether)
        switch (std::min<int64_t>(count - first, kQueriesTogether)) {
            case 1: f(std::integral_constant<int, 1>(), first); break;
            case 2: f(std::integral_constant<int, 2>(), first); break;
            case 3: f(std::integral_constant<int, 3>(), first); break;
            case 4: f(std::integral_constant<int, 4>(), first); break;
            case 5: f(std::integral_constant<int, 5>(), first); break;
            default: f(std::integral_constant<int, kQueriesTogether>(), first);
        }
}

// Working memory of a thread, reused for all its units; too large for the stack.
template <typename Element>
struct Scratch {
    static constexpr int kMaxQueries = kMaxUnitRows * kMaxHeads;

    static Scratch& of_thread() {
        thread_local const std::unique_ptr<Scratch> scratch(new Scratch);
        return *scratch;
    }

    Columns<Element> columns;
    Values<Element> values;
    alignas(64) FactorOf<Element> queries[kMaxQueries * kMaxHeadDim];  // [query][head_dim]
    alignas(64) float scores[kMaxQueries * kSplit];                    // [query][position]
    alignas(64) FactorOf<Element> weights[kMaxQueries * kSplit];
    alignas(64) float by_column[kMaxQueries * kMaxColumns];            // scores of the tail
    alignas(64) float out[kMaxQueries * kMaxHeadDim];                  // [query][head_dim]
    Query sums[kMaxQueries];
};

// Computes the rows of a unit split by split. Its queries are ordered [rows][group_size].
template <typename Element>
class Unit {
   public:
    Unit(const AttentionInputs<Element>& inputs, const UnitRows& rows)
        : shape_(inputs.shape),
          keys_(inputs.k + rows.kv_head * shape_.head_dim),
          values_(inputs.v + rows.kv_head * shape_.head_dim),
          stride_(shape_.num_kv_heads * shape_.head_dim),
          num_rows_(int(rows.last - rows.first)),
          table_(inputs.segments.block_tables + rows.segment * inputs.segments.max_blocks),
          block_size_(inputs.segments.block_size),
          context_(inputs.segments.context_lens[rows.segment]),
          tail_(context_ / kChunk * kChunk) {
        const int64_t size = shape_.group_size * shape_.head_dim;
        for (int64_t at = 0; at < num_rows_; ++at) {
            const int64_t row = inputs.segments.cu_rows[rows.segment] + rows.first + at;
            rows_[at] = Row(inputs.segments, shape_, rows.segment, row);
            seen_ |= rows_[at].nodes;
            const float* q = inputs.q + row * inputs.stride + rows.kv_head * size;
            for (int64_t i = 0; i < size; i += kLanes)
                store_factors_of<Element>(load(q + i), scratch_.queries + at * size + i);
        }
    }

    int num_rows() const { return num_rows_; }
    const Row& row(int64_t index) const { return rows_[index]; }
    const Query& query(int64_t index) const { return scratch_.sums[index]; }
    const float* out(int64_t index) const { return scratch_.out + index * shape_.head_dim; }

    // Computes `query` and `out` of all rows for the split that begins at position `first`.
    void run(int64_t first) {
        const int64_t last = first + kSplit, num_queries = num_rows_ * shape_.group_size;
        first_ = first;
        offsets_of(first, std::min(context_ - first, kSplit), offsets_);
        std::fill_n(scratch_.scores, num_queries * kSplit, kHidden);
        std::fill_n(scratch_.out, num_queries * shape_.head_dim, 0.0f);
        for (int64_t base = first; base < std::min(last, tail_); base += kChunk) chunk_scores(base);
        if (tail_ < last) tail_scores();
        for (int64_t query = 0; query < num_queries; ++query) {
            const Row& row = rows_[query / shape_.group_size];
            scratch_.sums[query] = Query();
            if (row.sees(first, last))
                scratch_.sums[query] = weigh<Element>(scratch_.scores + query * kSplit,
                                                      std::min(row.end - first, kSplit),
                                                      scratch_.weights + query * kSplit);
        }
        for (int64_t base = first; base < last; base += kChunk)
            if (base < tail_)
                chunk_values(base);
            else
                tail_values(base);
    }

   private:
    // The offsets of consecutive context positions in K and V, in elements.
    void offsets_of(int64_t position, int64_t count, int64_t* offsets) const {
        int64_t block = position / block_size_, offset = position % block_size_;
        for (; count > 0; ++block, offset = 0) {
            const int64_t num = std::min(block_size_ - offset, count);
            const int64_t place = (int64_t(table_[block]) * block_size_ + offset) * stride_;
            for (int64_t i = 0; i < num; ++i) offsets[i] = place + i * stride_;
            offsets += num;
            count -= num;
        }
    }

    // Calls f(count, query, first) for tiles of `count` consecutive queries that see the context
    // chunk at `base`, from its position `first` on. Rows that see the whole chunk share tiles.
    template <typename F>
    void in_chunk(int64_t base, const F& f) const {
        for (int row = 0; row < num_rows_;) {
            int next = row + 1;
            if (rows_[row].begin <= base)
                while (next < num_rows_ && rows_[next].begin <= base) ++next;
            if (rows_[row].sees(base, base + kChunk))
                in_tiles((next - row) * shape_.group_size, [&](auto count, int64_t at) {
                    f(count, row * shape_.group_size + at,
                      int(std::max<int64_t>(rows_[row].begin - base, 0)));
                });
            row = next;
        }
    }

    bool seen(int64_t base) const {
        return std::any_of(rows_, rows_ + num_rows_,
                           [&](const Row& row) { return row.sees(base, base + kChunk); });
    }

    // Scores of a whole chunk of the context, which has the same slots for all rows.
    void chunk_scores(int64_t base) {
        if (!seen(base)) return;
        scratch_.columns.load(keys_, shape_.head_dim, offsets_ + base - first_, kChunk);
        in_chunk(base, [&](auto count, int64_t query, int first) {
            float* scores = scratch_.scores + query * kSplit + base - first_;
            score<count>(query, kChunk, scores, kSplit);
            for (int g = 0; g < count; ++g) std::fill_n(scores + g * kSplit, first, kHidden);
        });
    }

    void chunk_values(int64_t base) {
        if (!seen(base)) return;
        const Element* values[kChunk];
        for (int i = 0; i < kChunk; ++i) values[i] = values_ + offsets_[base - first_ + i];
        scratch_.values.load(values, shape_.head_dim, 0, kChunk);
        in_chunk(base, [&](auto count, int64_t query, int first) {
            add<count>(query, base, first, kChunk);
        });
    }

    // Scores of the tail: the context after its last whole chunk, and the tree, in which every row
    // has its own path.
    void tail_scores() {
        const int num_columns = rest() + 64 - __builtin_clzll(seen_);
        if (!has_tail_) {
            offsets_of(tail_, num_columns, tail_offsets_);
            scratch_.columns.load(keys_, shape_.head_dim, tail_offsets_, num_columns);
            in_tiles(num_rows_ * shape_.group_size, [&](auto count, int64_t query) {
                score<count>(query, num_columns, scratch_.by_column + query * kMaxColumns,
                             kMaxColumns);
            });
            has_tail_ = true;
        }
        for (int row = 0; row < num_rows_; ++row) {
            const int64_t from = std::max({tail_, first_, rows_[row].begin});
            const int64_t to = std::min(rows_[row].end, first_ + kSplit);
            if (from >= to) continue;
            int path[kMaxColumns];
            path_of(rows_[row], path);
            const int64_t fork = std::clamp(context_, from, to);  // all rows share the path up to here
            for (int64_t g = 0; g < shape_.group_size; ++g) {
                const int64_t query = row * shape_.group_size + g;
                const float* by_column = scratch_.by_column + query * kMaxColumns;
                float* scores = scratch_.scores + query * kSplit;
                std::copy(by_column + from - tail_, by_column + fork - tail_, scores + from - first_);
                for (int64_t at = fork; at < to; ++at)
                    scores[at - first_] = by_column[path[at - tail_]];
            }
        }
    }

    // Weighted values of a chunk of the tail.
    void tail_values(int64_t base) {
        const Element* values[kChunk];
        // The context's values in the first chunk are the same for all rows, except an odd last
        // one, which shares its lane with a node (bfloat16).
        const int shared = base == tail_ ? rest() / kPerLane<Element> * kPerLane<Element> : 0;
        for (int i = 0; i < shared; ++i) values[i] = values_ + tail_offsets_[i];
        scratch_.values.load(values, shape_.head_dim, 0, shared);
        for (int row = 0; row < num_rows_; ++row) {
            if (!rows_[row].sees(base, base + kChunk)) continue;
            int path[kMaxColumns];
            path_of(rows_[row], path);
            const int last = int(std::min<int64_t>(rows_[row].end - base, kChunk));
            for (int i = shared; i < last; ++i)
                values[i] = values_ + tail_offsets_[path[base - tail_ + i]];
            scratch_.values.load(values, shape_.head_dim, shared, last);
            in_tiles(shape_.group_size, [&](auto count, int64_t at) {
                add<count>(row * shape_.group_size + at, base,
                           int(std::max<int64_t>(rows_[row].begin - base, 0)), last);
            });
        }
    }

    // The columns of the tail that a row sees, in the order of positions.
    void path_of(const Row& row, int* path) const {
        path = std::generate_n(path, rest(), [i = 0]() mutable { return i++; });
        for (uint64_t word = row.nodes; word; word &= word - 1)
            *path++ = rest() + __builtin_ctzll(word);
    }

    int rest() const { return int(context_ - tail_); }

    template <int kQueries>
    void score(int64_t query, int count, float* scores, int64_t stride) const {
        scratch_.columns.template scores<kQueries>(scratch_.queries + query * shape_.head_dim,
                                                   shape_.scale * kLog2E, count, scores, stride);
    }

    // Adds positions first .. last - 1 of a chunk, times their weights, to the queries' output.
    template <int kQueries>
    void add(int64_t query, int64_t base, int first, int last) {
        scratch_.values.template add<kQueries>(scratch_.weights + query * kSplit + base - first_,
                                               first, last, scratch_.out + query * shape_.head_dim);
    }

    Scratch<Element>& scratch_ = Scratch<Element>::of_thread();
    const AttentionShape& shape_;
    const Element* keys_;
    const Element* values_;
    int64_t stride_;  // elements between slots
    int num_rows_;
    Row rows_[kMaxUnitRows];
    uint64_t seen_ = 0;  // nodes that any row sees
    const int32_t* table_;
    int64_t block_size_;
    int64_t context_;
    int64_t tail_;  // first position of the tail
    bool has_tail_ = false;  // `columns` holds the tail, `by_column` its scores
    int64_t tail_offsets_[kMaxColumns];
    int64_t first_ = 0;       // position of the split
    int64_t offsets_[kSplit];  // offsets of the context positions from there
};

}  // namespace specserve
