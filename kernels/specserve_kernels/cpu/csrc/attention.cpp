// Online softmax (Milakov and Gimelshein 2018) over chunks at absolute multiples of kChunk
// positions of a row's path, in ascending order. Rows of a unit share the work on K and V: a product
// of a query and a key is summed over the dimensions in order, whatever column the key stands in.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "lanes.h"

namespace specserve {
namespace {

constexpr int kChunk = 64;
constexpr int kMaxColumns = kChunk + kMaxSegmentRows;  // the context's last chunk, and a tree
constexpr int kMaxQueries = 4;                         // that go through a chunk together
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// K and V of some slots as floats, K with a column for each slot.
class Columns {
   public:
    template <typename Element>
    void load(const Element* keys, const Element* values, int64_t stride, int64_t dim,
              const int64_t* slots, int count) {
        dim_ = dim;
        const int width = (count + kLanes - 1) / kLanes * kLanes;
        for (int from = 0; from < width; from += kLanes)
            for (int64_t d = 0; d < dim; d += kLanes) {
                Floats block[kLanes];
                for (int i = 0; i < kLanes; ++i)  // beyond the last slot: the last again
                    block[i] = specserve::load(
                        keys + slots[std::min(from + i, count - 1)] * stride + d);
                transpose(block);
                for (int i = 0; i < kLanes; ++i)
                    store(keys_ + (d + i) * kMaxColumns + from, block[i]);
            }
        for (int i = 0; i < count; ++i)
            for (int64_t d = 0; d < dim; d += kLanes)
                store(values_ + i * dim + d, specserve::load(values + slots[i] * stride + d));
    }

    // Of each query and the columns from .. from + kChunk - 1, those that were loaded.
    template <int kQueries>
    void scores(const float* q, int from, int to, float (*result)[kMaxColumns]) const {
        for (; from < to; from += 4 * kLanes) {
            Floats sums[kQueries][4];
            SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, 4) sums[g][i] = zero_floats();
            for (int64_t d = 0; d < dim_; ++d) {
                const float* key = keys_ + d * kMaxColumns + from;
                SPECSERVE_EACH(g, kQueries) {
                    const Floats query = broadcast(q[g * dim_ + d]);
                    SPECSERVE_EACH(i, 4)
                        sums[g][i] = mul_add(query, specserve::load(key + i * kLanes), sums[g][i]);
                }
            }
            SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, 4)
                store(result[g] + from + i * kLanes, sums[g][i]);
        }
    }

    // out += the weighted values of the columns in `columns`, in order.
    template <int kQueries>
    void add(const float (*weights)[kChunk], const int16_t* columns, int first, int last,
             float* const* out) const {
        for (int64_t d = 0; d < dim_; d += 4 * kLanes) {
            if (dim_ - d >= 4 * kLanes)
                add_part<kQueries, 4>(weights, columns, first, last, out, d);
            else
                for (int64_t e = d; e < dim_; e += kLanes)
                    add_part<kQueries, 1>(weights, columns, first, last, out, e);
        }
    }

   private:
    template <int kQueries, int kVectors>
    void add_part(const float (*weights)[kChunk], const int16_t* columns, int first, int last,
                  float* const* out, int64_t d) const {
        Floats sums[kQueries][kVectors];
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
            sums[g][i] = specserve::load(out[g] + d + i * kLanes);
        for (int at = first; at < last; ++at) {
            const float* value = values_ + columns[at] * dim_ + d;
            SPECSERVE_EACH(g, kQueries) {
                const Floats weight = broadcast(weights[g][at]);
                SPECSERVE_EACH(i, kVectors)
                    sums[g][i] = mul_add(weight, specserve::load(value + i * kLanes), sums[g][i]);
            }
        }
        SPECSERVE_EACH(g, kQueries) SPECSERVE_EACH(i, kVectors)
            store(out[g] + d + i * kLanes, sums[g][i]);
    }

    int64_t dim_ = 0;
    alignas(64) float keys_[kMaxHeadDim * kMaxColumns];  // [dim][kMaxColumns]
    alignas(64) float values_[kMaxColumns * kMaxHeadDim];  // [columns][dim]
};

struct Query {  // what online softmax keeps of one
    float top = kHidden;
    float sum = 0;
};

// Turns scores into weights, in place, and makes room for them in `out`.
void weigh(Query& query, float (&values)[kChunk], float* out, int64_t dim) {
    Floats most = load(values);
    for (int at = kLanes; at < kChunk; at += kLanes) most = max(most, load(values + at));
    const float top = std::max(query.top, lane_max(most));
    const Floats minus_top = broadcast(-top);
    Floats sum = zero_floats();
    for (int at = 0; at < kChunk; at += kLanes) {
        const Floats weights = exp2(add(load(values + at), minus_top));
        store(values + at, weights);
        sum = add(sum, weights);
    }
    float rescale[kLanes];
    store(rescale, exp2(broadcast(query.top - top)));
    query.sum = query.sum * rescale[0] + lane_sum(sum);
    if (rescale[0] != 1.0f)
        for (int64_t d = 0; d < dim; d += kLanes)
            store(out + d, mul(load(out + d), broadcast(rescale[0])));
    query.top = top;
}

// One row of a unit.
struct Row {
    uint64_t nodes;     // those it sees, itself included
    int64_t begin, end;  // positions along its path
};

// The rows of a unit on their way through the chunks.
template <typename Element>
class Unit {
   public:
    Unit(const Segments& segments, const AttentionShape& shape, const float* q, int64_t stride,
         const Element* k, const Element* v, int64_t segment, int64_t first_row, int64_t last_row)
        : shape_(shape),
          keys_(k),
          values_(v),
          stride_(shape.num_kv_heads * shape.head_dim),
          size_(shape.group_size * shape.head_dim),
          table_(segments.block_tables + segment * segments.max_blocks),
          block_size_(segments.block_size),
          context_(segments.context_lens[segment]),
          scaled_((last_row - first_row) * size_),
          out_((last_row - first_row) * size_, 0.0f),
          queries_((last_row - first_row) * shape.group_size) {
        for (int64_t at = first_row; at < last_row; ++at) {
            const int64_t row = segments.cu_rows[segment] + at;
            const uint64_t nodes = segments.ancestors[row];
            const int64_t end = context_ + __builtin_popcountll(nodes);
            rows_.push_back({nodes, shape.window ? std::max<int64_t>(end - shape.window, 0) : 0, end});
            const float* from = q + row * stride;
            for (int64_t i = 0; i < size_; ++i)
                scaled_[(at - first_row) * size_ + i] = from[i] * (shape.scale * kLog2E);
        }
    }

    void run(float* out, int64_t out_stride) {
        int64_t begin = context_;
        for (const Row& row : rows_) begin = std::min(begin, row.begin);
        const int64_t tail = context_ / kChunk * kChunk;
        for (int64_t base = begin / kChunk * kChunk; base < tail; base += kChunk) whole_chunk(base);
        tail_chunks(tail);
        for (size_t row = 0; row < rows_.size(); ++row)
            for (int64_t i = 0; i < size_; ++i) {
                const int64_t query = row * shape_.group_size + i / shape_.head_dim;
                out[row * out_stride + i] = out_[row * size_ + i] / queries_[query].sum;
            }
    }

   private:
    int64_t slot(int64_t place) const {
        return int64_t(table_[place / block_size_]) * block_size_ + place % block_size_;
    }

    // A chunk of the context, which has the same slots for all rows.
    void whole_chunk(int64_t base) {
        int64_t slots[kChunk];
        int16_t columns[kChunk];
        for (int i = 0; i < kChunk; ++i) {
            slots[i] = slot(base + i);
            columns[i] = int16_t(i);
        }
        columns_().load(keys_, values_, stride_, shape_.head_dim, slots, kChunk);
        for (size_t row = 0; row < rows_.size(); ++row)
            if (rows_[row].begin < base + kChunk)
                chunk(row, columns, int(std::max<int64_t>(rows_[row].begin - base, 0)), kChunk,
                      kChunk);
    }

    // The rest of the context and the tree, through which every row has a path of its own.
    void tail_chunks(int64_t tail) {
        uint64_t seen = 0;
        for (const Row& row : rows_) seen |= row.nodes;
        const int num_nodes = 64 - __builtin_clzll(seen), rest = int(context_ - tail);
        int64_t slots[kMaxColumns];
        for (int i = 0; i < rest + num_nodes; ++i) slots[i] = slot(tail + i);
        columns_().load(keys_, values_, stride_, shape_.head_dim, slots, rest + num_nodes);
        for (size_t row = 0; row < rows_.size(); ++row) {
            int16_t path[kMaxColumns];
            for (int i = 0; i < rest; ++i) path[i] = int16_t(i);
            int length = rest;
            for (uint64_t word = rows_[row].nodes; word; word &= word - 1)
                path[length++] = int16_t(rest + __builtin_ctzll(word));
            for (int from = 0; from < length; from += kChunk) {
                const int64_t first = std::max<int64_t>(rows_[row].begin - tail - from, 0);
                if (first >= kChunk) continue;
                chunk(row, path + from, int(first), std::min(length - from, kChunk),
                      rest + num_nodes);
            }
        }
    }

    // Positions first .. last - 1 of a chunk, which stand in these of `num_columns` columns.
    void chunk(size_t row, const int16_t* columns, int first, int last, int num_columns) {
        for (int64_t g = 0; g < shape_.group_size; g += kMaxQueries) switch (
                std::min<int64_t>(shape_.group_size - g, kMaxQueries)) {
                case 1: queries<1>(row, g, columns, first, last, num_columns); break;
                case 2: queries<2>(row, g, columns, first, last, num_columns); break;
                case 3: queries<3>(row, g, columns, first, last, num_columns); break;
                default: queries<4>(row, g, columns, first, last, num_columns);
            }
    }

    template <int kQueries>
    void queries(size_t row, int64_t group, const int16_t* columns, int first, int last,
                 int num_columns) {
        alignas(64) float by_column[kQueries][kMaxColumns], weights[kQueries][kChunk];
        float* out[kQueries];
        const int64_t query = row * shape_.group_size + group;
        const int from = columns[first] / kChunk * kChunk;
        columns_().template scores<kQueries>(scaled_.data() + query * shape_.head_dim, from,
                                             std::min(columns[last - 1] + 1, num_columns),
                                             by_column);
        for (int g = 0; g < kQueries; ++g) {
            std::fill(weights[g], weights[g] + kChunk, kHidden);
            for (int at = first; at < last; ++at) weights[g][at] = by_column[g][columns[at]];
            out[g] = out_.data() + (query + g) * shape_.head_dim;
            weigh(queries_[query + g], weights[g], out[g], shape_.head_dim);
        }
        columns_().template add<kQueries>(weights, columns, first, last, out);
    }

    static Columns& columns_() {  // too large for the stack of a thread
        thread_local const std::unique_ptr<Columns> columns(new Columns);
        return *columns;
    }

    const AttentionShape& shape_;
    const Element* keys_;
    const Element* values_;
    int64_t stride_;  // between slots
    int64_t size_;    // of a row's queries
    const int32_t* table_;
    int64_t block_size_;
    int64_t context_;
    std::vector<Row> rows_;
    std::vector<float> scaled_, out_;  // [rows][group_size][head_dim]
    std::vector<Query> queries_;       // [rows][group_size]
};

}  // namespace

template <typename Element>
void attend(const Segments& segments, const AttentionShape& shape, const float* q, int64_t stride,
            const Element* k, const Element* v, int64_t segment, int64_t kv_head,
            int64_t first_row, int64_t last_row, float* out, int64_t out_stride) {
    const int64_t head_offset = kv_head * shape.head_dim;
    Unit<Element>(segments, shape, q, stride, k + head_offset, v + head_offset, segment, first_row,
                  last_row)
        .run(out, out_stride);
}

template void attend<float>(const Segments&, const AttentionShape&, const float*, int64_t,
                            const float*, const float*, int64_t, int64_t, int64_t, int64_t, float*,
                            int64_t);
template void attend<bfloat16>(const Segments&, const AttentionShape&, const float*, int64_t,
                               const bfloat16*, const bfloat16*, int64_t, int64_t, int64_t,
                               int64_t, float*, int64_t);

}  // namespace specserve
