// A forward pass of a decoder-only transformer: writes K, V and logits.
#pragma once

#include <cstdint>

#include "api.h"
#include "attention.h"
#include "linear.h"

namespace specserve {

// decoder.py fills all structs of this file, field by field.
struct Layer {
    const float* attention_norm;  // [hidden_size]
    const float* mlp_norm;        // [hidden_size]
    const float* q_norm;          // [head_dim] or null, as k_norm
    const float* k_norm;
    Linear q, k, v, o, gate, up, down;  // all of them quantized, or none in any layer
    int64_t window;  // sliding window in positions, 0: none
};

struct Decoder {
    int64_t num_layers;
    int64_t hidden_size;        // a multiple of 32
    int64_t intermediate_size;  // a multiple of 32
    int64_t num_heads;
    int64_t num_kv_heads;  // num_heads / num_kv_heads * head_dim is a multiple of 32
    int64_t head_dim;
    double eps;
    const float* cos;  // [num_positions][head_dim / 2]
    const float* sin;
    const Layer* layers;
    const float* norm;  // [hidden_size]
    Weight embed;       // [vocab_size][hidden_size]
    Linear head;        // num_outputs is rounded up to whole panels
    // For a draft head only, otherwise null. The input of its first layer's q, k and v is the
    // token's embedding, normalized by attention_norm, concatenated with its row of
    // `Pass::hidden_in`, normalized by hidden_norm.
    const float* hidden_norm;  // [hidden_size]
    int64_t normed_residual;   // 1: the residual stream starts as the normalized hidden_in
};

struct Cache {
    void* kv;  // [num_layers][2][num_slots][num_kv_heads][head_dim]
    int64_t num_slots;
    int64_t is_float;  // else bfloat16
};

struct Pass {
    Segments segments;
    int64_t num_rows;
    const int64_t* input_ids;  // [num_rows]
    const int64_t* positions;  // [num_rows]
    const int64_t* slots;      // [num_rows], -1: K and V are not written
    const float* hidden_in;    // [num_rows][hidden_size], for a draft head only
    Cache cache;
    const int64_t* aux_layers;  // layers whose input to copy; num_layers: the last output
    int64_t num_aux_layers;
    float* aux_hidden;  // [num_rows][num_aux_layers][hidden_size]
};

struct Head {
    int64_t num_rows;
    const int64_t* rows;  // [num_rows] row indices in the residual stream
    int64_t vocab_size;
    float* logits;    // [num_rows][outputs of the head]
    int64_t num_top;  // at most kMaxTop
    int64_t* top;     // [num_rows][num_top] best first, the lowest id first among equals;
                      // -1: the row has a logit that is not finite
};

constexpr int64_t kMaxTop = 64;

// `residual` [pass.num_rows][hidden_size] is the buffer of the residual stream. On return, the rows
// that `head` names hold the last layer's output; all rows do if aux_layers contains num_layers.
SPECSERVE_API void specserve_decode(const Decoder& decoder, const Pass& pass, const Head& head,
                                    float* residual, int32_t num_threads);

}  // namespace specserve
