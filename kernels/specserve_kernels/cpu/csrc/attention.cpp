// A softmax within each split, and online softmax (Milakov and Gimelshein 2018) over the splits in
// ascending order (Dao et al. 2023, Flash-Decoding). Splits begin at absolute multiples of kSplit
// along a row's path.
#include "attention.h"

#include <algorithm>

#include "api.h"
#include "attention_unit.h"
#include "lanes.h"

namespace specserve {
namespace {

// Reads every cache line. The CPU would drop so many prefetches.
template <typename Element>
inline void touch(const Element* x, int64_t size) {
    const auto* bytes = reinterpret_cast<const volatile char*>(x);
    for (int64_t at = 0; at < size * int64_t(sizeof *x); at += 64) (void)bytes[at];
}

// Merges the next split into `query` and `out`.
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

}  // namespace

int64_t num_splits(const Segments& segments, int64_t segment) {
    int longest = 0;  // path, which includes nodes that are in the cache already and are no rows
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
void attend(const AttentionInputs<Element>& inputs, const UnitRows& rows, float* out,
            int64_t out_stride) {
    const int64_t dim = inputs.shape.head_dim, group_size = inputs.shape.group_size;
    Unit<Element> unit(inputs, rows);
    Query totals[Scratch<Element>::kMaxQueries];
    for (int row = 0; row < unit.num_rows(); ++row)
        std::fill_n(out + row * out_stride, group_size * dim, 0.0f);
    for (int64_t split = 0; split < num_splits(inputs.segments, rows.segment); ++split) {
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
void attend_split(const AttentionInputs<Element>& inputs, const UnitRows& rows, int64_t split,
                  const Partials& partials) {
    const int64_t dim = inputs.shape.head_dim, group_size = inputs.shape.group_size;
    Unit<Element> unit(inputs, rows);
    unit.run(split * kSplit);
    for (int row = 0; row < unit.num_rows(); ++row)
        for (int64_t g = 0; g < group_size; ++g) {
            const int64_t query = row * group_size + g;
            float* part = partials.at(inputs.segments.cu_rows[rows.segment] + rows.first + row,
                                      rows.kv_head * group_size + g, split);
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

#define SPECSERVE_ATTENTION_OF(Element)                                                        \
    template void fetch_context(const Segments&, const Element*, const Element*, int64_t, int64_t, \
                                int64_t);                                                      \
    template void attend(const AttentionInputs<Element>&, const UnitRows&, float*, int64_t);   \
    template void attend_split(const AttentionInputs<Element>&, const UnitRows&, int64_t,      \
                               const Partials&);
SPECSERVE_ATTENTION_OF(float)
SPECSERVE_ATTENTION_OF(bfloat16)

namespace {

template <typename Element>
void attention(const Segments& segments, const AttentionShape& shape, const float* q, const void* k,
               const void* v, float* out, int num_threads) {
    const int64_t size = shape.group_size * shape.head_dim, stride = shape.num_kv_heads * size;
    const AttentionInputs<Element> inputs{segments,
                                          shape,
                                          q,
                                          stride,
                                          static_cast<const Element*>(k),
                                          static_cast<const Element*>(v)};
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t unit = 0; unit < num_units(segments, shape.num_kv_heads); ++unit) {
        const UnitRows rows = unit_rows(segments, shape.num_kv_heads, unit);
        const int64_t row = segments.cu_rows[rows.segment] + rows.first;
        if (rows.first < rows.last)
            attend(inputs, rows, out + row * stride + rows.kv_head * size, stride);
    }
}

}  // namespace

// out [num_rows][heads][head_dim], zeroed by the caller; kv_is_float: K and V are float, else
// bfloat16.
SPECSERVE_API void specserve_attention(const Segments& segments, const AttentionShape& shape,
                                       const float* q, const void* k, const void* v,
                                       int32_t kv_is_float, float* out, int32_t num_threads) {
    if (kv_is_float)
        attention<float>(segments, shape, q, k, v, out, num_threads);
    else
        attention<bfloat16>(segments, shape, q, k, v, out, num_threads);
}

}  // namespace specserve
