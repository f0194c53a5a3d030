// The activations of a forward pass, and functions of one of their rows. For decoder.cpp only, hence
// the unnamed namespace.
#pragma once

#include <cstring>
#include <memory>

#include "decoder.h"
#include "lanes.h"

namespace specserve {
namespace {

void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + kLanes <= half; i += kLanes) {
        const Floats first = load(x + i), second = load(x + half + i);
        const Floats c = load(cos + i), s = load(sin + i);
        store(x + i, sub(mul(first, c), mul(second, s)));
        store(x + half + i, add(mul(second, c), mul(first, s)));
    }
    for (; i < half; ++i) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cos[i] - second * sin[i];
        x[half + i] = second * cos[i] + first * sin[i];
    }
}

void store_kv(const float* x, int64_t size, float* to) { std::memcpy(to, x, size * sizeof *x); }

void store_kv(const float* x, int64_t size, bfloat16* to) {
    for (int64_t i = 0; i < size; i += kLanes) store(to + i, load(x + i));
}

void embed(const Weight& weight, int64_t token, float* x) {
    float columns[kGroup];
    for (int64_t group = 0; group < weight.num_inputs / kGroup; ++group) {
        unpack_group(weight, token, group, columns);
        std::memcpy(x + group * kGroup, columns, sizeof columns);
    }
}

// The activations of all rows between the phases.
struct Activations {
    Activations(const Decoder& d, int64_t num_rows)
        : heads_size((d.num_heads + 2 * d.num_kv_heads) * d.head_dim),
          quantized(is_quantized(d.layers[0].q.weight.format)),
          qkv_in(d.hidden_norm ? num_rows : 0, 2 * d.hidden_size, quantized),
          normed(num_rows, d.hidden_size, quantized),
          heads(new float[num_rows * heads_size]),
          attention_out(num_rows, d.num_heads * d.head_dim, quantized),
          gated(num_rows, d.intermediate_size, quantized) {}

    int64_t heads_size;
    bool quantized;    // as all weights of the layers
    RowBuffer qkv_in;  // input of q, k and v in the first layer of a draft head
    RowBuffer normed;
    std::unique_ptr<float[]> heads;  // [num_rows][heads_size]: q, k, v
    RowBuffer attention_out;
    RowBuffer gated;  // input of `down`
};

// Rows of the residual stream.
struct Residual {
    float* at(int64_t row) const { return x + row * size; }

    float* x;
    int64_t size;
    int64_t num_rows;
};

}  // namespace
}  // namespace specserve
