// The C functions that Python calls by ctypes. Arguments are addresses and sizes; the Python
// modules of this package check them before the call.
#include <omp.h>

#include <algorithm>

#include "attention.h"
#include "decoder.h"
#include "draft_head.h"
#include "lanes.h"
#include "linear.h"
#include "sampler.h"

using specserve::AttentionShape;
using specserve::Format;
using specserve::RowBuffer;
using specserve::Segments;
using specserve::Weight;

namespace {

constexpr int64_t kPanelsInChunk = 4;  // panels that a thread takes at a time

template <typename Element>
void attention(const Segments& segments, const AttentionShape& shape, const float* q,
               const void* k_cache, const void* v_cache, float* out, int num_threads) {
    const auto* k = static_cast<const Element*>(k_cache);
    const auto* v = static_cast<const Element*>(v_cache);
    constexpr int64_t kUnits = specserve::kMaxSegmentRows / specserve::kMaxUnitRows;
    const int64_t num_units = segments.num_segments * kUnits * shape.num_kv_heads;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t unit = 0; unit < num_units; ++unit) {
        const int64_t kv_head = unit % shape.num_kv_heads;
        const int64_t segment = unit / shape.num_kv_heads / kUnits;
        const int64_t first = unit / shape.num_kv_heads % kUnits * specserve::kMaxUnitRows;
        const int64_t num_rows = segments.cu_rows[segment + 1] - segments.cu_rows[segment];
        if (first >= num_rows) continue;
        const int64_t size = shape.group_size * shape.head_dim, stride = shape.num_kv_heads * size;
        const int64_t row = segments.cu_rows[segment] + first;
        specserve::attend(segments, shape, q + kv_head * size, stride, k, v, segment, kv_head, first,
                          std::min(first + specserve::kMaxUnitRows, num_rows),
                          out + row * stride + kv_head * size, stride);
    }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// x [num_rows][size] floats -> the fields of `Rows`, but in plain row order: values
// [num_rows][size], scales and sums [num_rows][size / 32].
void specserve_quantize(const float* x, int64_t num_rows, int64_t size, int8_t* values,
                        float* scales, int32_t* sums) {
    const RowBuffer buffer(num_rows, size);
    const int64_t num_groups = size / specserve::kGroup;
    for (int64_t row = 0; row < num_rows; ++row) {
        specserve::quantize_row(x + row * size, buffer.rows(), row);
        for (int64_t group = 0; group < num_groups; ++group) {
            const int64_t at = row % specserve::kRowsTogether, to = row * num_groups + group;
            const auto from = buffer.rows().at(row / specserve::kRowsTogether, group);
            std::copy_n(from.values + at * specserve::kGroup, specserve::kGroup,
                        values + to * specserve::kGroup);
            scales[to] = from.scales[at];
            sums[to] = from.sums[at];
        }
    }
}

// y [num_rows][num_outputs] = x W^T; x [num_rows][num_inputs] floats.
void specserve_linear(const uint8_t* panels, int32_t format, int64_t num_inputs,
                      int64_t num_outputs, const float* x, int64_t num_rows, float* y,
                      int32_t num_threads) {
    const Weight weight{panels, Format(format), num_inputs, num_outputs};
    const RowBuffer buffer(num_rows, num_inputs);
    const int64_t num_panels = num_outputs / specserve::kPanel;
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp for schedule(dynamic, 8)
        for (int64_t row = 0; row < num_rows; ++row)
            specserve::quantize_row(x + row * num_inputs, buffer.rows(), row);
#pragma omp for schedule(dynamic, 1)
        for (int64_t first = 0; first < num_panels; first += kPanelsInChunk)
            specserve::linear_panels(weight, buffer.rows(), num_rows, first,
                                     std::min(first + kPanelsInChunk, num_panels),
                                     y + first * specserve::kPanel, num_outputs);
    }
}

// out [num_rows][heads][head_dim] floats, zeroed by the caller; kv_is_float: K and V are
// float, else bfloat16. See `Segments` in segments.py.
void specserve_attention(const int32_t* cu_rows, const int32_t* context_lens,
                         const uint64_t* ancestors, const int32_t* block_tables,
                         int64_t num_segments, int64_t max_blocks, int64_t block_size,
                         int64_t num_kv_heads, int64_t group_size, int64_t head_dim, float scale,
                         int64_t window, const float* q, const void* k_cache, const void* v_cache,
                         int32_t kv_is_float, float* out, int32_t num_threads) {
    const Segments segments{cu_rows,      context_lens, ancestors, block_tables,
                            num_segments, max_blocks,   block_size};
    const AttentionShape shape{num_kv_heads, group_size, head_dim, scale, window};
    if (kv_is_float)
        attention<float>(segments, shape, q, k_cache, v_cache, out, num_threads);
    else
        attention<specserve::bfloat16>(segments, shape, q, k_cache, v_cache, out, num_threads);
}

// noise [num_rows][num_tokens] of token_ids [num_rows][num_tokens].
void specserve_gumbel_noise(const int64_t* seeds, const int64_t* positions,
                            const int64_t* token_ids, int64_t num_rows, int64_t num_tokens,
                            float* noise, int32_t num_threads) {
    constexpr int64_t kPiece = 4096;  // tokens
    const int64_t num_pieces = (num_tokens + kPiece - 1) / kPiece;
#pragma omp parallel for num_threads(num_threads) if (num_rows * num_pieces > 1)
    for (int64_t piece = 0; piece < num_rows * num_pieces; ++piece) {
        const int64_t row = piece / num_pieces, first = piece % num_pieces * kPiece;
        const int64_t at = row * num_tokens + first;
        specserve::gumbel_noise({uint64_t(seeds[row]), uint64_t(positions[row])}, token_ids + at,
                                std::min(kPiece, num_tokens - first), noise + at);
    }
}

// tokens [num_rows]; logits [num_rows][vocab_size], rows `stride` floats apart; sampled [num_rows],
// 0: argmax without noise.
void specserve_gumbel_argmax(const float* logits, int64_t stride, const int64_t* seeds,
                             const int64_t* positions, const uint8_t* sampled, int64_t num_rows,
                             int64_t vocab_size, int64_t* tokens, int32_t num_threads) {
#pragma omp parallel for num_threads(num_threads) if (num_rows > 1) schedule(dynamic, 1)
    for (int64_t row = 0; row < num_rows; ++row) {
        const float* of_row = logits + row * stride;
        const specserve::Key key{uint64_t(seeds[row]), uint64_t(positions[row])};
        tokens[row] = sampled[row] ? specserve::gumbel_argmax(key, of_row, vocab_size)
                                 : std::max_element(of_row, of_row + vocab_size) - of_row;
    }
}

// One forward pass; see decoder.h, whose structs `decoder.py` mirrors.
void specserve_decode(const specserve::Decoder* decoder, const specserve::Pass* pass,
                      const specserve::Head* head, float* residual, int32_t num_threads) {
    specserve::decode(*decoder, *pass, *head, residual, num_threads);
}

void specserve_decode_head(const specserve::Decoder* decoder, const specserve::Head* head,
                           const float* residual, int32_t num_threads) {
    specserve::decode_head(*decoder, *head, residual, num_threads);
}

// See draft_head.h, whose structs `draft_head.py` mirrors.
void specserve_fuse(const specserve::DraftHead* head, const float* aux_hidden, int64_t num_rows,
                    float* fused, int32_t num_threads) {
    specserve::fuse(*head, aux_hidden, num_rows, fused, num_threads);
}

void specserve_expand(const specserve::DraftHead* head, const specserve::ExpansionLimits* limits,
                      const specserve::DraftCache* cache, specserve::ExpansionTask* tasks,
                      int64_t num_tasks, int32_t num_threads) {
    specserve::expand(*head, *limits, *cache, tasks, num_tasks, num_threads);
}

}  // extern "C"
#pragma GCC visibility pop
