// One pass of a decoder-only transformer whose weights are packed: rows in, K, V and logits out.
#pragma once

#include <cstdint>

#include "attention.h"
#include "linear.h"

namespace specserve {

// Everything here is filled by decoder.py, field by field.
struct Linear {
    Weight weight;
    const float* bias;  // [num_outputs] or null
};

struct Layer {
    const float* attention_norm;  // [hidden_size]
    const float* mlp_norm;        // [hidden_size]
    const float* q_norm;          // [head_dim], null: none, and so is k_norm
    const float* k_norm;
    Linear q, k, v, o, gate, up, down;
    int64_t window;  // 0: none
};

struct Decoder {
    int64_t num_layers;
    int64_t hidden_size;        // a multiple of 32
    int64_t intermediate_size;  // a multiple of 32
    int64_t num_heads;
    int64_t num_kv_heads;  // the query heads of one have a multiple of 32 values together
    int64_t head_dim;
    double eps;
    const float* cos;  // [num_positions][head_dim / 2]
    const float* sin;
    const Layer* layers;
    const float* norm;  // [hidden_size]
    Weight embed;       // [vocab_size][hidden_size]
    Linear head;        // outputs up to a whole panel
    // Of a draft head, null otherwise: the first layer attends from the token's embedding and the
    // pass's row side by side, each behind a norm of its own, this one the row's.
    const float* row_norm;    // [hidden_size]
    int64_t normed_residual;  // the stream goes on from the row after that norm
};

struct Pass {
    Segments segments;
    int64_t num_rows;
    const int64_t* input_ids;  // [num_rows]
    const int64_t* positions;  // [num_rows]
    const int64_t* slots;      // [num_rows], -1: K and V are not kept
    const float* rows;         // [num_rows][hidden_size], of a draft head alone
    void* kv;                  // [num_layers][2][num_slots][num_kv_heads][head_dim]
    int64_t num_slots;
    int64_t wide;  // K and V are float, else bfloat16
    const int64_t* taps;  // [num_taps] layers whose input is wanted
    int64_t num_taps;
    float* tapped;  // [num_rows][num_taps][hidden_size]
};

struct Head {
    int64_t num_rows;
    const int64_t* rows;  // [num_rows] of the residual stream
    int64_t vocab_size;
    float* logits;    // [num_rows][outputs of the head]
    int64_t num_top;  // at most kMaxTop
    int64_t* top;     // [num_rows][num_top] best first, the lowest id first among equals;
                      // -1: the row has a logit that is not a number
};

constexpr int64_t kMaxTop = 64;

// `residual` [pass.num_rows][hidden_size] is where the stream is left; as it leaves the last layer, in the
// rows of `head`, and in all where that is tapped.
void decode(const Decoder& decoder, const Pass& pass, const Head& head, float* residual,
            int num_threads);

// The final norm and the head alone, over rows of `residual`.
void decode_head(const Decoder& decoder, const Head& head, const float* residual, int num_threads);

}  // namespace specserve
