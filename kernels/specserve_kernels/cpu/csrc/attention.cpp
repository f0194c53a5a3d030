// Online softmax (Milakov and Gimelshein 2018) over chunks at absolute multiples of kChunk
// positions, in ascending order; within a chunk positions are taken by sixteen.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "lanes.h"

namespace specserve {
namespace {

constexpr int kChunk = 64;
constexpr int kMaxVectors = kMaxHeadDim / kLanes;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// Where the positions of one row's path lie.
class Path {
   public:
    Path(const Segments& segments, int64_t segment, int64_t row)
        : table_(segments.block_tables + segment * segments.max_blocks),
          block_size_(segments.block_size),
          context_(segments.context_lens[segment]) {
        uint64_t word = segments.ancestors[segments.cu_rows[segment] + row];
        for (; word; word &= word - 1) nodes_[num_nodes_++] = int16_t(__builtin_ctzll(word));
    }

    int64_t num_positions() const { return context_ + num_nodes_; }

    int64_t slot(int64_t position) const {
        const int64_t place =
            position < context_ ? position : context_ + nodes_[position - context_];
        return int64_t(table_[place / block_size_]) * block_size_ + place % block_size_;
    }

   private:
    const int32_t* table_;
    int64_t block_size_;
    int64_t context_;
    int num_nodes_ = 0;
    int16_t nodes_[kMaxSegmentRows];
};

struct Chunk {  // positions first .. last - 1 of those the chunk has room for
    int first, last;
    int64_t slots[kChunk];
};

struct Head {  // what online softmax keeps of one query
    float top = kHidden;
    float sum = 0;
    float out[kMaxHeadDim] = {};
};

template <typename Element>
void scores(const float* q, const Element* keys, int64_t stride, int64_t num_vectors,
            const Chunk& chunk, float (&result)[kChunk]) {
    for (int block = 0; block < kChunk; block += kLanes) {
        if (block + kLanes <= chunk.first || block >= chunk.last) {
            store(result + block, broadcast(kHidden));
            continue;
        }
        Floats products[kLanes];
        SPECSERVE_EACH(i, kLanes) {
            products[i] = zero_floats();
            const int at = block + i;
            if (at < chunk.first || at >= chunk.last) continue;
            const Element* key = keys + chunk.slots[at] * stride;
            for (int64_t d = 0; d < num_vectors; ++d)
                products[i] = mul_add(load(q + d * kLanes), load(key + d * kLanes), products[i]);
        }
        store(result + block, lane_sums(products));
        for (int at = block; at < block + kLanes; ++at)
            if (at < chunk.first || at >= chunk.last) result[at] = kHidden;
    }
}

// Turns scores into weights, in place, and makes room for them in `head`.
void weigh(Head& head, int64_t num_vectors, float (&values)[kChunk]) {
    Floats most = load(values);
    for (int block = kLanes; block < kChunk; block += kLanes) most = max(most, load(values + block));
    const float top = std::max(head.top, lane_max(most));
    const Floats minus_top = broadcast(-top);
    Floats sum = zero_floats();
    for (int block = 0; block < kChunk; block += kLanes) {
        const Floats weights = exp2(add(load(values + block), minus_top));
        store(values + block, weights);
        sum = add(sum, weights);
    }
    float rescale[kLanes];
    store(rescale, exp2(broadcast(head.top - top)));
    head.sum = head.sum * rescale[0] + lane_sum(sum);
    for (int64_t d = 0; d < num_vectors; ++d)
        store(head.out + d * kLanes, mul(load(head.out + d * kLanes), broadcast(rescale[0])));
    head.top = top;
}

template <typename Element, int kVectors>
void accumulate(Head& head, const float* weights, const Element* values, int64_t stride,
                const Chunk& chunk, int64_t from) {
    Floats sums[kVectors];
    SPECSERVE_EACH(d, kVectors) sums[d] = load(head.out + from + d * kLanes);
    for (int i = chunk.first; i < chunk.last; ++i) {
        const Floats weight = broadcast(weights[i]);
        const Element* value = values + chunk.slots[i] * stride + from;
        SPECSERVE_EACH(d, kVectors) sums[d] = mul_add(weight, load(value + d * kLanes), sums[d]);
    }
    SPECSERVE_EACH(d, kVectors) store(head.out + from + d * kLanes, sums[d]);
}

template <typename Element>
void add_chunk(const AttentionShape& shape, const float* q, const Element* keys,
               const Element* values, const Chunk& chunk, Head* heads) {
    const int64_t stride = shape.num_kv_heads * shape.head_dim;
    const int64_t num_vectors = shape.head_dim / kLanes;
    for (int64_t g = 0; g < shape.group_size; ++g) {
        alignas(64) float weights[kChunk];
        scores(q + g * shape.head_dim, keys, stride, num_vectors, chunk, weights);
        weigh(heads[g], num_vectors, weights);
        int64_t d = 0;
        for (; d + 4 <= num_vectors; d += 4)
            accumulate<Element, 4>(heads[g], weights, values, stride, chunk, d * kLanes);
        for (; d < num_vectors; ++d)
            accumulate<Element, 1>(heads[g], weights, values, stride, chunk, d * kLanes);
    }
}

template <typename Element>
void attend_row(const AttentionShape& shape, const Path& path, const float* q, const Element* keys,
                const Element* values, float* scaled, Head* heads, float* out) {
    const int64_t size = shape.group_size * shape.head_dim, end = path.num_positions();
    for (int64_t i = 0; i < size; ++i) scaled[i] = q[i] * (shape.scale * kLog2E);
    std::fill(heads, heads + shape.group_size, Head());
    const int64_t begin = shape.window ? std::max<int64_t>(end - shape.window, 0) : 0;
    for (int64_t base = begin / kChunk * kChunk; base < end; base += kChunk) {
        Chunk chunk;
        chunk.first = int(std::max<int64_t>(begin - base, 0));
        chunk.last = int(std::min<int64_t>(end - base, kChunk));
        for (int i = chunk.first; i < chunk.last; ++i) chunk.slots[i] = path.slot(base + i);
        add_chunk(shape, scaled, keys, values, chunk, heads);
    }
    for (int64_t g = 0; g < shape.group_size; ++g)
        for (int64_t d = 0; d < shape.head_dim; ++d)
            out[g * shape.head_dim + d] = heads[g].out[d] / heads[g].sum;
}

}  // namespace

template <typename Element>
void attend(const Segments& segments, const AttentionShape& shape, const float* q, int64_t stride,
            const Element* k, const Element* v, int64_t segment, int64_t kv_head,
            int64_t first_row, int64_t last_row, float* out, int64_t out_stride) {
    const int64_t head_offset = kv_head * shape.head_dim;
    float scaled[kMaxHeads * kMaxHeadDim];
    Head heads[kMaxHeads];
    for (int64_t row = first_row; row < last_row; ++row)
        attend_row(shape, Path(segments, segment, row),
                   q + (segments.cu_rows[segment] + row) * stride, k + head_offset,
                   v + head_offset, scaled, heads, out + (row - first_row) * out_stride);
}

template void attend<float>(const Segments&, const AttentionShape&, const float*, int64_t,
                            const float*, const float*, int64_t, int64_t, int64_t, int64_t, float*,
                            int64_t);
template void attend<bfloat16>(const Segments&, const AttentionShape&, const float*, int64_t,
                               const bfloat16*, const bfloat16*, int64_t, int64_t, int64_t,
                               int64_t, float*, int64_t);

}  // namespace specserve
