// Paged tree attention. A row's bits depend on what it sees at which position only. With bfloat16 K
// and V the queries and the weights are rounded to that too: then a lane holds two products.
#pragma once

#include <cstdint>

namespace specserve {

// The contract of these is `Segments` in ops.py; the words say which nodes, so that nobody needs
// to know the first.
struct Segments {
    const int32_t* cu_rows;
    const int32_t* context_lens;
    const uint64_t* ancestors;
    const int32_t* block_tables;
    int64_t num_segments;
    int64_t max_blocks;
    int64_t block_size;
};

struct AttentionShape {
    int64_t num_kv_heads;
    int64_t group_size;  // at most kMaxHeads
    int64_t head_dim;  // a multiple of 16, at most kMaxHeadDim
    float scale;
    int64_t window;  // 0: none
};

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxSegmentRows = 64;
constexpr int64_t kMaxHeads = 32;     // query heads per KV head
constexpr int64_t kMaxUnitRows = 16;  // of a segment, for one thread at a time
constexpr int64_t kSplit = 128;       // positions, at absolute multiples, whose softmax is one sum

// Rows first_row .. last_row - 1 of a segment, kMaxUnitRows at most, for one KV head. q: this head's
// queries, a row of the pass after `stride` floats the next; K and V
// [num_slots][num_kv_heads][head_dim]; out: of these rows alone, [group_size][head_dim] each, a row
// after `out_stride` floats the next.
template <typename Element>
void attend(const Segments& segments, const AttentionShape& shape, const float* q, int64_t stride,
            const Element* k, const Element* v, int64_t segment, int64_t kv_head,
            int64_t first_row, int64_t last_row, float* out, int64_t out_stride);

// Part `part` of so many of asking for the K and V of every context, `size` elements a slot, to be
// brought near: while something else is computed.
template <typename Element>
void fetch_context(const Segments& segments, const Element* k, const Element* v, int64_t size,
                   int64_t part, int64_t num_parts);

// As many splits as the rows of a segment see, the first position's first.
int64_t num_splits(const Segments& segments, int64_t segment);

// What the rows of a pass see in each split alone.
struct Partials {
    float* at(int64_t row, int64_t head, int64_t split) const {
        return data + ((row * num_heads + head) * max_splits + split) * size;
    }

    float* data;         // [num_rows][num_heads][max_splits][size]
    int64_t num_heads;
    int64_t max_splits;
    int64_t size;        // head_dim, and two numbers: partial_size
};

constexpr int64_t partial_size(int64_t head_dim) { return head_dim + 16; }

// `attend` in pieces that several threads can share, with the same bits: one split of it, and, when
// all are there, one head of one row of the pass out of them, into out [head_dim].
template <typename Element>
void attend_split(const Segments& segments, const AttentionShape& shape, const float* q,
                  int64_t stride, const Element* k, const Element* v, int64_t segment,
                  int64_t kv_head, int64_t first_row, int64_t last_row, int64_t split,
                  const Partials& partials);
void merge_splits(const Segments& segments, const AttentionShape& shape, int64_t segment,
                  int64_t row, int64_t head, const Partials& partials, float* out);

}  // namespace specserve
