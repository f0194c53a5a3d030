// y = x W^T + b for weights packed in panels. The bits of a row of y do not depend on the other rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lanes.h"
#include "rows.h"

namespace specserve {

constexpr int kPanel = 16;
constexpr int kParts = kPanel / kLanes;  // registers that hold a panel's outputs
// Prefetch distance in bytes (measured: benchmarks/LOG.md). Hardware prefetch stops at page ends.
constexpr int64_t kAhead = 4096;

// A panel is kPanel outputs. It is stored as tiles of 32 inputs each (see packed_weight.py):
//   int4: half scale[16], half minimum[16], nibbles[4][16][4]; byte [c][n][i] has output n's inputs
//         8c + i (low nibble) and 8c + 4 + i (high nibble)
//   int8: half scale[16], int8 [8][16][4]; byte [c][n][i] is output n's input 4c + i
//   floats: [32][16]; element [c][n] is output n's input c
enum class Format : int32_t { kInt4 = 4, kInt8 = 8, kBfloat16 = 16, kFloat16 = 17, kFloat32 = 32 };

constexpr bool is_quantized(Format format) { return format <= Format::kInt8; }

constexpr int64_t tile_bytes(Format format) {
    switch (format) {
        case Format::kInt4: return 320;
        case Format::kInt8: return 544;
        case Format::kFloat32: return 4 * kGroup * kPanel;
        default: return 2 * kGroup * kPanel;
    }
}

struct Weight {
    const uint8_t* panels;  // [num_outputs / 16][num_inputs / 32] tiles
    Format format;
    int64_t num_inputs;   // a multiple of 32
    int64_t num_outputs;  // a multiple of 16
};

struct Linear {
    Weight weight;
    const float* bias;  // [num_outputs] or null
};

// Threads share a product in units of kPanels panels, computed for kRowBlock rows at a time, which
// stay in the cache.
constexpr int64_t kPanels = 2;
constexpr int64_t kColumns = kPanels * kPanel;
constexpr int64_t kRowBlock = 5 * kRowsTogether;
static_assert(kColumns == kGroup);  // so a unit's outputs can be quantized as one group

inline int64_t num_units(const Linear& linear) {
    return (linear.weight.num_outputs + kColumns - 1) / kColumns;
}

// Computes a unit's outputs without the bias, [num_rows][kColumns], for at most kRowBlock rows. The
// last unit may have one panel only.
void multiply_unit(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t unit, float* y);

// Computes a unit's outputs for all rows; calls finish(row, column, out) for each vector of them.
template <typename Finish>
void multiply_unit(const Linear& linear, const Rows& rows, int64_t num_rows, int64_t unit,
                   const Finish& finish) {
    alignas(64) float y[kRowBlock * kColumns];
    const int64_t first = unit * kColumns;
    const int64_t width = std::min(kColumns, linear.weight.num_outputs - first);
    for (int64_t top = 0; top < num_rows; top += kRowBlock) {
        const int64_t count = std::min(kRowBlock, num_rows - top);
        multiply_unit(linear.weight, rows.from(top), count, unit, y);
        for (int64_t row = 0; row < count; ++row)
            for (int64_t c = 0; c < width; c += kLanes) {
                Floats out = load(y + row * kColumns + c);
                if (linear.bias) out = add(out, load(linear.bias + first + c));
                finish(top + row, first + c, out);
            }
    }
}

// x [num_rows][num_inputs] -> y [num_rows][num_outputs].
void multiply(const Linear& linear, const float* x, int64_t num_rows, float* y, int num_threads);

// The weights of one output for the inputs of one group.
void unpack_group(const Weight& weight, int64_t output, int64_t group, float (&values)[kGroup]);

}  // namespace specserve
