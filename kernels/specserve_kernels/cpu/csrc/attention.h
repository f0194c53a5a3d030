// Paged tree attention. A row's bits depend only on what it sees at which position. If K and V are
// bfloat16, queries and softmax weights are rounded to bfloat16 too, so that a lane computes two
// products at once.
#pragma once

#include <algorithm>
#include <cstdint>

namespace specserve {

// See `Segments` in segments.py. `first_nodes` is left out, because the ancestor words already say which
// nodes a row sees.
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
    int64_t window;  // sliding window in positions, 0: none
};

constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kMaxSegmentRows = 64;
constexpr int64_t kMaxHeads = 32;     // query heads per KV head
constexpr int64_t kMaxUnitRows = 16;  // rows of a segment that a thread processes together
constexpr int64_t kSplit = 128;       // positions of a split, which begins at a multiple of this

// The queries, K and V of one layer. Element, the type of K and V, is float or bfloat16.
template <typename Element>
struct AttentionInputs {
    const Segments& segments;
    const AttentionShape& shape;
    const float* q;  // [num_rows][num_kv_heads][group_size][head_dim], rows `stride` floats apart
    int64_t stride;
    const Element* k;  // [num_slots][num_kv_heads][head_dim], as v
    const Element* v;
};

// Rows first .. last - 1 of a segment for one KV head: what a thread computes at a time.
struct UnitRows {
    int64_t segment, kv_head, first, last;
};

// Units of a forward pass; some of them have no rows.
inline int64_t num_units(const Segments& segments, int64_t num_kv_heads) {
    return segments.num_segments * (kMaxSegmentRows / kMaxUnitRows) * num_kv_heads;
}

inline UnitRows unit_rows(const Segments& segments, int64_t num_kv_heads, int64_t unit) {
    constexpr int64_t kPerSegment = kMaxSegmentRows / kMaxUnitRows;
    const int64_t part = unit / num_kv_heads, segment = part / kPerSegment;
    const int64_t num_rows = segments.cu_rows[segment + 1] - segments.cu_rows[segment];
    const int64_t first = part % kPerSegment * kMaxUnitRows;
    return {segment, unit % num_kv_heads, first, std::min(first + kMaxUnitRows, num_rows)};
}

// Attention of a unit. out: its rows only, [group_size][head_dim] each, `out_stride` floats apart.
template <typename Element>
void attend(const AttentionInputs<Element>& inputs, const UnitRows& rows, float* out,
            int64_t out_stride);

// Loads part `part` of `num_parts` of the K and V of all contexts, `size` elements per slot, into
// the CPU caches. Called while products are computed, before attention needs them.
template <typename Element>
void fetch_context(const Segments& segments, const Element* k, const Element* v, int64_t size,
                   int64_t part, int64_t num_parts);

// The number of splits from position 0 to the last position that a row of the segment sees.
int64_t num_splits(const Segments& segments, int64_t segment);

// Attention of the rows of a forward pass over single splits, before the splits are merged.
struct Partials {
    float* at(int64_t row, int64_t head, int64_t split) const {
        return data + ((row * num_heads + head) * max_splits + split) * size;
    }

    float* data;  // [num_rows][num_heads][max_splits][size]
    int64_t num_heads;
    int64_t max_splits;
    int64_t size;  // partial_size: output [head_dim], maximum, sum, padding
};

constexpr int64_t partial_size(int64_t head_dim) { return head_dim + 16; }

// `attend` in units that several threads can share, with the same bits. `attend_split` computes one
// split; when all are computed, `merge_splits` merges them for one row of the forward pass and one
// head into out [head_dim].
template <typename Element>
void attend_split(const AttentionInputs<Element>& inputs, const UnitRows& rows, int64_t split,
                  const Partials& partials);
void merge_splits(const Segments& segments, const AttentionShape& shape, int64_t segment,
                  int64_t row, int64_t head, const Partials& partials, float* out);

}  // namespace specserve
