// A softmax over each split, and online softmax (Milakov and Gimelshein 2018) over the splits, which
// lie at absolute multiples of positions along a row's path, in ascending order (Dao et al. 2023,
// Flash-Decoding). Rows of a unit share the work on K and V: a product of a query and a key is summed
// over the dimensions in order, whatever column the key stands in.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <type_traits>

#include "lanes.h"

namespace specserve {
namespace {

constexpr int kChunk = 64;
constexpr int kMaxColumns = kChunk + kMaxSegmentRows;  // the context's last chunk, and a tree
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kHidden = -std::numeric_limits<float>::infinity();
static_assert(kSplit % kChunk == 0);

// As many vectors of columns or dimensions as go with so many queries: enough sums to be busy with,
// and registers for all.
template <int kQueries>
constexpr int kVectorsFor = kQueries * 2 * kVectorsTogether <= 8
                                ? std::min(2 * kVectorsTogether, kChunk / kLanes)
                                : kVectorsTogether;

// Loads: prefetches in such numbers are dropped.
template <typename Element>
inline void touch(const Element* x, int64_t size) {
    const auto* bytes = reinterpret_cast<const volatile char*>(x);
    for (int64_t at = 0; at < size * int64_t(sizeof *x); at += 64) (void)bytes[at];
}

// What a lane holds of K and V, and what that is multiplied with.
template <typename Element>
constexpr int kPacked = sizeof(float) / sizeof(Element);
template <typename Element>
using FactorOf = std::conditional_t<kPacked<Element> == 1, float, Factor>;

template <typename Element>
inline Floats dot(Floats sum, Floats lanes, const FactorOf<Element>* factors) {
    if constexpr (kPacked<Element> == 1)
        return mul_add(lanes, broadcast(*factors), sum);
    else
        return dot_pairs(sum, lanes, factors);
}

template <typename Element>
inline void keep_factors(Floats x, FactorOf<Element>* to) {
    if constexpr (kPacked<Element> == 1)
        store(to, x);
    else
        store_factors(to, x);
}

// K at some places: a column for each place, a lane of it for as many dimensions as fit.
template <typename Element>
class Columns {
   public:
    void load(const Element* keys, int64_t dim, const int64_t* places, int count) {
        dim_ = dim;
        for (int from = 0; from < count; from += kLanes) {
            const Element* rows[kLanes];
            for (int i = 0; i < kLanes; ++i)  // beyond the last place: the last again
                rows[i] = keys + places[std::min(from + i, count - 1)];
            for (int64_t d = 0; d < dim; d += 4 * kPacked<Element>) {
                Floats columns[4];
                columns_of([&](int i) { return reinterpret_cast<const float*>(rows[i] + d); }, columns);
                for (int i = 0; i < 4; ++i)
                    store(keys_ + (d / kPacked<Element> + i) * kMaxColumns + from, columns[i]);
            }
        }
    }

    // Of consecutive queries and the columns from 0 to `count` - 1, and of some beyond, which may be
    // filled with anything; a query's scores after `stride` floats the next one's.
    template <int kQueries>
    void scores(const FactorOf<Element>* q, float scale, int count, float* result,
                int64_t stride) const {
        constexpr int kVectors = kVectorsFor<kQueries>;
        int from = 0;
        for (; from + kVectors * kLanes <= count; from += kVectors * kLanes)
            scores_at<kQueries, kVectors>(q, scale, from, result, stride);
        for (; from < count; from += kLanes) scores_at<kQueries, 1>(q, scale, from, result, stride);
    }

   private:
    template <int kQueries, int kVectors>
    void scores_at(const FactorOf<Element>* q, float scale, int from, float* result,
                   int64_t stride) const {
        Floats sums[kQueries][kVectors];
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors) sums[g][i] = zero_floats();
        for (int64_t d = 0; d < dim_; d += kPacked<Element>) {
            const float* key = keys_ + d / kPacked<Element> * kMaxColumns + from;
            Floats keys[kVectors];
            SPECSERVE_EACH(i, kVectors) keys[i] = specserve::load(key + i * kLanes);
            SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
                sums[g][i] = dot<Element>(sums[g][i], keys[i], q + g * dim_ + d);
        }
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
            store(result + g * stride + from + i * kLanes, mul(sums[g][i], broadcast(scale)));
    }

    int64_t dim_ = 0;
    alignas(64) float keys_[kMaxHeadDim * kMaxColumns];  // [dim / kPacked][kMaxColumns]
};

// V of a chunk: a row for as many positions as fit a lane.
template <typename Element>
class Values {
   public:
    // The places first .. last - 1 of a chunk; `first` is where a row begins.
    void load(const Element* const* values, int64_t dim, int first, int last) {
        dim_ = dim;
        for (int at = first; at < last; at += kPacked<Element>) {
            float* row = rows_ + at / kPacked<Element> * dim;
            const Element* next = values[std::min(at + 1, last - 1)];  // beyond: weighs nothing
            for (int64_t d = 0; d < dim; d += kLanes)
                if constexpr (kPacked<Element> == 1)
                    store(row + d, specserve::load(values[at] + d));
                else
                    store(row + d, pairs_of(values[at] + d, next + d));
        }
    }

    // out [kQueries][dim] += the values at first .. last - 1, in order, by weights [kQueries][kSplit].
    template <int kQueries>
    void add(const FactorOf<Element>* weights, int first, int last, float* out) const {
        constexpr int kVectors = kVectorsFor<kQueries>;
        constexpr int64_t kStep = kVectors * kLanes;
        int64_t d = 0;
        for (; d + kStep <= dim_; d += kStep) add_at<kQueries, kVectors>(weights, first, last, out, d);
        for (; d < dim_; d += kLanes) add_at<kQueries, 1>(weights, first, last, out, d);
    }

   private:
    template <int kQueries, int kVectors>
    void add_at(const FactorOf<Element>* weights, int first, int last, float* out,
                int64_t d) const {
        out += d;
        Floats sums[kQueries][kVectors];
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
            sums[g][i] = specserve::load(out + g * dim_ + i * kLanes);
        for (int at = first / kPacked<Element> * kPacked<Element>; at < last; at += kPacked<Element>) {
            const float* row = rows_ + at / kPacked<Element> * dim_ + d;
            Floats value[kVectors];
            SPECSERVE_EACH(i, kVectors) value[i] = specserve::load(row + i * kLanes);
            SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
                sums[g][i] = dot<Element>(sums[g][i], value[i], weights + g * kSplit + at);
        }
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
            store(out + g * dim_ + i * kLanes, sums[g][i]);
    }

    int64_t dim_ = 0;
    alignas(64) float rows_[kChunk / kPacked<Element> * kMaxHeadDim];
};

struct Query {  // what softmax keeps of one
    float top = kHidden;
    float sum = 0;
};

// The weights of `count` scores, and of those up to a whole number of lanes.
template <typename Element>
Query weigh(const float* scores, int64_t count, FactorOf<Element>* weights) {
    Floats most = load(scores);
    for (int64_t at = kLanes; at < count; at += kLanes) most = max(most, load(scores + at));
    const float top = lane_max(most);
    const Floats minus_top = broadcast(-top);
    Floats sum = zero_floats();
    for (int64_t at = 0; at < count; at += kLanes) {
        const Floats weight = exp2(add(load(scores + at), minus_top));
        keep_factors<Element>(weight, weights + at);
        sum = add(sum, weight);
    }
    return {top, lane_sum(sum)};
}

// Takes in what lies further along.
void merge(Query& query, float* out, const Query& next, const float* next_out, int64_t dim) {
    if (query.top == kHidden) {
        query = next;
        std::copy_n(next_out, dim, out);
        return;
    }
    const float top = std::max(query.top, next.top);
    float ours[kLanes], theirs[kLanes];
    store(ours, exp2(broadcast(query.top - top)));
    store(theirs, exp2(broadcast(next.top - top)));
    for (int64_t d = 0; d < dim; d += kLanes)
        store(out + d, mul_add(load(next_out + d), broadcast(theirs[0]),
                               mul(load(out + d), broadcast(ours[0]))));
    query.sum = query.sum * ours[0] + next.sum * theirs[0];
    query.top = top;
}

// One row of a unit.
struct Row {
    Row() = default;
    Row(const Segments& segments, const AttentionShape& shape, int64_t segment, int64_t row)
        : nodes(segments.ancestors[row]),
          end(segments.context_lens[segment] + __builtin_popcountll(nodes)),
          begin(shape.window ? std::max<int64_t>(end - shape.window, 0) : 0) {}

    bool sees(int64_t first, int64_t last) const { return begin < last && end > first; }

    uint64_t nodes = 0;  // those it sees, itself included
    int64_t end = 0;     // positions along its path
    int64_t begin = 0;
};

// Calls f(n, first), n a constant, for tiles of n consecutive things, n <= kQueriesTogether.
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

// What a thread works with, unit after unit; too large for its stack.
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

// The rows of a unit on their way through the splits. Its queries: [rows][group_size].
template <typename Element>
class Unit {
   public:
    Unit(const Segments& segments, const AttentionShape& shape, const float* q, int64_t stride,
         const Element* k, const Element* v, int64_t segment, int64_t first_row, int64_t last_row)
        : shape_(shape),
          keys_(k),
          values_(v),
          stride_(shape.num_kv_heads * shape.head_dim),
          num_rows_(int(last_row - first_row)),
          table_(segments.block_tables + segment * segments.max_blocks),
          block_size_(segments.block_size),
          context_(segments.context_lens[segment]),
          tail_(context_ / kChunk * kChunk) {
        const int64_t size = shape.group_size * shape.head_dim;
        for (int64_t at = 0; at < num_rows_; ++at) {
            const int64_t row = segments.cu_rows[segment] + first_row + at;
            rows_[at] = Row(segments, shape, segment, row);
            seen_ |= rows_[at].nodes;
            for (int64_t i = 0; i < size; i += kLanes)
                keep_factors<Element>(load(q + row * stride + i), near_.queries + at * size + i);
        }
    }

    int num_rows() const { return num_rows_; }
    const Row& row(int64_t index) const { return rows_[index]; }
    const Query& query(int64_t index) const { return near_.sums[index]; }
    const float* out(int64_t index) const { return near_.out + index * shape_.head_dim; }

    // Leaves in `query` and `out` what its rows see of the split that begins here.
    void run(int64_t first) {
        const int64_t last = first + kSplit, num_queries = num_rows_ * shape_.group_size;
        first_ = first;
        places_of(first, std::min(context_ - first, kSplit), places_);
        std::fill_n(near_.scores, num_queries * kSplit, kHidden);
        std::fill_n(near_.out, num_queries * shape_.head_dim, 0.0f);
        for (int64_t base = first; base < std::min(last, tail_); base += kChunk) chunk_scores(base);
        if (tail_ < last) tail_scores();
        for (int64_t query = 0; query < num_queries; ++query) {
            const Row& row = rows_[query / shape_.group_size];
            near_.sums[query] = Query();
            if (row.sees(first, last))
                near_.sums[query] = weigh<Element>(near_.scores + query * kSplit,
                                                   std::min(row.end - first, kSplit),
                                                   near_.weights + query * kSplit);
        }
        for (int64_t base = first; base < last; base += kChunk)
            if (base < tail_)
                chunk_values(base);
            else
                tail_values(base);
    }

   private:
    // Where in K and V consecutive positions are, in elements.
    void places_of(int64_t position, int64_t count, int64_t* places) const {
        int64_t block = position / block_size_, offset = position % block_size_;
        for (; count > 0; ++block, offset = 0) {
            const int64_t num = std::min(block_size_ - offset, count);
            const int64_t place = (int64_t(table_[block]) * block_size_ + offset) * stride_;
            for (int64_t i = 0; i < num; ++i) places[i] = place + i * stride_;
            places += num;
            count -= num;
        }
    }

    // Calls f(count, query, first) for `count` consecutive queries that see a chunk of the context,
    // from its position `first` on: rows that see all of it go together.
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

    // A chunk of the context, which has the same slots for all rows.
    void chunk_scores(int64_t base) {
        if (!seen(base)) return;
        near_.columns.load(keys_, shape_.head_dim, places_ + base - first_, kChunk);
        in_chunk(base, [&](auto count, int64_t query, int first) {
            float* scores = near_.scores + query * kSplit + base - first_;
            score<count>(query, kChunk, scores, kSplit);
            for (int g = 0; g < count; ++g) std::fill_n(scores + g * kSplit, first, kHidden);
        });
    }

    void chunk_values(int64_t base) {
        if (!seen(base)) return;
        const Element* values[kChunk];
        for (int i = 0; i < kChunk; ++i) values[i] = values_ + places_[base - first_ + i];
        near_.values.load(values, shape_.head_dim, 0, kChunk);
        in_chunk(base, [&](auto count, int64_t query, int first) {
            add<count>(query, base, first, kChunk);
        });
    }

    // The rest of the context and the tree, through which every row has its own path.
    void tail_scores() {
        const int num_columns = rest() + 64 - __builtin_clzll(seen_);
        if (!has_tail_) {
            places_of(tail_, num_columns, tail_places_);
            near_.columns.load(keys_, shape_.head_dim, tail_places_, num_columns);
            in_tiles(num_rows_ * shape_.group_size, [&](auto count, int64_t query) {
                score<count>(query, num_columns, near_.by_column + query * kMaxColumns, kMaxColumns);
            });
            has_tail_ = true;
        }
        for (int row = 0; row < num_rows_; ++row) {
            const int64_t from = std::max({tail_, first_, rows_[row].begin});
            const int64_t to = std::min(rows_[row].end, first_ + kSplit);
            if (from >= to) continue;
            int path[kMaxColumns];
            path_of(rows_[row], path);
            const int64_t fork = std::clamp(context_, from, to);  // before it all rows' paths are one
            for (int64_t g = 0; g < shape_.group_size; ++g) {
                const int64_t query = row * shape_.group_size + g;
                const float* by_column = near_.by_column + query * kMaxColumns;
                float* scores = near_.scores + query * kSplit;
                std::copy(by_column + from - tail_, by_column + fork - tail_, scores + from - first_);
                for (int64_t at = fork; at < to; ++at)
                    scores[at - first_] = by_column[path[at - tail_]];
            }
        }
    }

    // A chunk of that.
    void tail_values(int64_t base) {
        const Element* values[kChunk];
        // In the first chunk the same for all rows, but for a last one alone in its lane.
        const int shared = base == tail_ ? rest() / kPacked<Element> * kPacked<Element> : 0;
        for (int i = 0; i < shared; ++i) values[i] = values_ + tail_places_[i];
        near_.values.load(values, shape_.head_dim, 0, shared);
        for (int row = 0; row < num_rows_; ++row) {
            if (!rows_[row].sees(base, base + kChunk)) continue;
            int path[kMaxColumns];
            path_of(rows_[row], path);
            const int last = int(std::min<int64_t>(rows_[row].end - base, kChunk));
            for (int i = shared; i < last; ++i)
                values[i] = values_ + tail_places_[path[base - tail_ + i]];
            near_.values.load(values, shape_.head_dim, shared, last);
            in_tiles(shape_.group_size, [&](auto count, int64_t at) {
                add<count>(row * shape_.group_size + at, base,
                           int(std::max<int64_t>(rows_[row].begin - base, 0)), last);
            });
        }
    }

    // The columns of the tail that a row sees.
    void path_of(const Row& row, int* path) const {
        path = std::generate_n(path, rest(), [i = 0]() mutable { return i++; });
        for (uint64_t word = row.nodes; word; word &= word - 1)
            *path++ = rest() + __builtin_ctzll(word);
    }

    int rest() const { return int(context_ - tail_); }

    template <int kQueries>
    void score(int64_t query, int count, float* scores, int64_t stride) const {
        near_.columns.template scores<kQueries>(near_.queries + query * shape_.head_dim,
                                                shape_.scale * kLog2E, count, scores, stride);
    }

    // Adds the weighted values of a chunk.
    template <int kQueries>
    void add(int64_t query, int64_t base, int first, int last) {
        near_.values.template add<kQueries>(near_.weights + query * kSplit + base - first_, first, last,
                                            near_.out + query * shape_.head_dim);
    }

    Scratch<Element>& near_ = Scratch<Element>::of_thread();
    const AttentionShape& shape_;
    const Element* keys_;
    const Element* values_;
    int64_t stride_;  // between slots
    int num_rows_;
    Row rows_[kMaxUnitRows];
    uint64_t seen_ = 0;  // nodes
    const int32_t* table_;
    int64_t block_size_;
    int64_t context_;
    int64_t tail_;
    bool has_tail_ = false;  // in the columns
    int64_t tail_places_[kMaxColumns];
    int64_t first_ = 0;       // position of the split
    int64_t places_[kSplit];  // of the context from there
};

}  // namespace

int64_t num_splits(const Segments& segments, int64_t segment) {
    int longest = 0;  // path; there may be more nodes in it than rows, if the first are in the cache
    for (int64_t row = segments.cu_rows[segment]; row < segments.cu_rows[segment + 1]; ++row)
        longest = std::max(longest, __builtin_popcountll(segments.ancestors[row]));
    return (segments.context_lens[segment] + longest + kSplit - 1) / kSplit;
}

template <typename Element>
void fetch_context(const Segments& segments, const Element* k, const Element* v, int64_t size,
                   int64_t part, int64_t num_parts) {
    for (int64_t segment = 0; segment < segments.num_segments; ++segment) {
        const int32_t* table = segments.block_tables + segment * segments.max_blocks;
        const int64_t length = segments.context_lens[segment];
        const int64_t last = length * (part + 1) / num_parts;
        for (int64_t at = length * part / num_parts; at < last; ++at) {
            const int64_t block = at / segments.block_size;
            const int64_t slot = table[block] * segments.block_size + at - block * segments.block_size;
            touch(k + slot * size, size);
            touch(v + slot * size, size);
        }
    }
}

template <typename Element>
void attend(const Segments& segments, const AttentionShape& shape, const float* q, int64_t stride,
            const Element* k, const Element* v, int64_t segment, int64_t kv_head,
            int64_t first_row, int64_t last_row, float* out, int64_t out_stride) {
    const int64_t dim = shape.head_dim, group_size = shape.group_size;
    Unit<Element> unit(segments, shape, q, stride, k + kv_head * dim, v + kv_head * dim, segment,
                       first_row, last_row);
    Query totals[Scratch<Element>::kMaxQueries];
    for (int row = 0; row < unit.num_rows(); ++row)
        std::fill_n(out + row * out_stride, group_size * dim, 0.0f);
    for (int64_t split = 0; split < num_splits(segments, segment); ++split) {
        unit.run(split * kSplit);
        for (int row = 0; row < unit.num_rows(); ++row)
            if (unit.row(row).sees(split * kSplit, (split + 1) * kSplit))
                for (int64_t g = 0; g < group_size; ++g) {
                    const int64_t query = row * group_size + g;
                    merge(totals[query], out + row * out_stride + g * dim, unit.query(query),
                          unit.out(query), dim);
                }
    }
    for (int row = 0; row < unit.num_rows(); ++row)
        for (int64_t g = 0; g < group_size; ++g) {
            const Floats sum = broadcast(totals[row * group_size + g].sum);
            float* of_head = out + row * out_stride + g * dim;
            for (int64_t d = 0; d < dim; d += kLanes) store(of_head + d, div(load(of_head + d), sum));
        }
}

template <typename Element>
void attend_split(const Segments& segments, const AttentionShape& shape, const float* q,
                  int64_t stride, const Element* k, const Element* v, int64_t segment,
                  int64_t kv_head, int64_t first_row, int64_t last_row, int64_t split,
                  const Partials& partials) {
    const int64_t dim = shape.head_dim;
    Unit<Element> unit(segments, shape, q, stride, k + kv_head * dim, v + kv_head * dim, segment,
                       first_row, last_row);
    unit.run(split * kSplit);
    for (int64_t row = first_row; row < last_row; ++row)
        for (int64_t g = 0; g < shape.group_size; ++g) {
            const int64_t query = (row - first_row) * shape.group_size + g;
            float* part = partials.at(segments.cu_rows[segment] + row,
                                      kv_head * shape.group_size + g, split);
            std::copy_n(unit.out(query), dim, part);
            part[dim] = unit.query(query).top;
            part[dim + 1] = unit.query(query).sum;
        }
}

void merge_splits(const Segments& segments, const AttentionShape& shape, int64_t segment,
                  int64_t row, int64_t head, const Partials& partials, float* out) {
    const int64_t dim = shape.head_dim;
    const Row seen(segments, shape, segment, row);
    Query total;
    std::fill_n(out, dim, 0.0f);
    for (int64_t split = seen.begin / kSplit; split * kSplit < seen.end; ++split) {
        const float* part = partials.at(row, head, split);
        merge(total, out, Query{part[dim], part[dim + 1]}, part, dim);
    }
    for (int64_t d = 0; d < dim; ++d) out[d] /= total.sum;
}

#define SPECSERVE_ATTENTION_OF(Element)                                                           \
    template void fetch_context<Element>(const Segments&, const Element*, const Element*,         \
                                         int64_t, int64_t, int64_t);                              \
    template void attend<Element>(const Segments&, const AttentionShape&, const float*, int64_t,  \
                                  const Element*, const Element*, int64_t, int64_t, int64_t,      \
                                  int64_t, float*, int64_t);                                      \
    template void attend_split<Element>(const Segments&, const AttentionShape&, const float*,     \
                                        int64_t, const Element*, const Element*, int64_t, int64_t, \
                                        int64_t, int64_t, int64_t, const Partials&);
SPECSERVE_ATTENTION_OF(float)
SPECSERVE_ATTENTION_OF(bfloat16)

}  // namespace specserve
