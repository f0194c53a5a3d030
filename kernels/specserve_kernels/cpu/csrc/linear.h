// y = x W^T for quantized weights. The bits of a row of y do not depend on the other rows.
#pragma once

#include <cstdint>

#include "quantize.h"

namespace specserve {

constexpr int kPanel = 16;

// A panel is kPanel outputs. It is stored as tiles of 32 inputs each (see quantized_weight.py):
//   int4: half scale[16], half minimum[16], nibbles[4][16][4]; byte [c][n][i] has output n's inputs
//         8c + i (low nibble) and 8c + 4 + i (high nibble)
//   int8: half scale[16], int8 [8][16][4]; byte [c][n][i] is output n's input 4c + i
enum class Format : int32_t { kInt4 = 4, kInt8 = 8 };

constexpr int64_t tile_bytes(Format format) { return format == Format::kInt4 ? 320 : 544; }

struct Weight {
    const uint8_t* panels;  // [num_outputs / 16][num_inputs / 32] tiles
    Format format;
    int64_t num_inputs;   // a multiple of 32
    int64_t num_outputs;  // a multiple of 16
};

// Computes the outputs of panels first_panel .. last_panel - 1 for all rows. y points to the first
// panel's outputs of the first row; rows of y are `stride` floats apart.
void linear_panels(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t first_panel,
                   int64_t last_panel, float* y, int64_t stride);

// Threads share a product in units of kPanels panels, computed for kRowBlock rows at a time.
constexpr int64_t kPanels = 2;
constexpr int64_t kColumns = kPanels * kPanel;
constexpr int64_t kRowBlock = 5 * kRowsTogether;
static_assert(kColumns == kGroup);  // so a unit's outputs can be quantized as one group

// Dequantizes the weights of one output for the inputs of one group.
void dequantize_group(const Weight& weight, int64_t output, int64_t group, float (&values)[kGroup]);

}  // namespace specserve
