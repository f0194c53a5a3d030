// y = x W^T for packed weights: each row of y has the same bits whatever rows are beside it.
#pragma once

#include <cstdint>

#include "quantize.h"

namespace specserve {

constexpr int kPanel = 16;

// A panel is kPanel outputs; a tile is a panel's next 32 inputs, the unit both formats are stored in:
//   int4: half scale[16], half minimum[16], nibbles[4][16][4] (low: inputs 8c.., high: 8c + 4..)
//   int8: half scale[16], int8 [8][16][4]
enum class Format : int32_t { kInt4 = 4, kInt8 = 8 };

constexpr int64_t tile_bytes(Format format) { return format == Format::kInt4 ? 320 : 544; }

struct Weight {
    const uint8_t* panels;  // [num_outputs / 16][num_inputs / 32] tiles
    Format format;
    int64_t num_inputs;   // a multiple of 32
    int64_t num_outputs;  // a multiple of 16
};

// The outputs of panels first_panel .. last_panel - 1 for all rows, into y: one row after `stride`
// floats the next, the first panel's outputs first.
void linear_panels(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t first_panel,
                   int64_t last_panel, float* y, int64_t stride);

// How products are shared out: units of so many panels, for so many rows at a time.
constexpr int64_t kPanels = 2;
constexpr int64_t kColumns = kPanels * kPanel;
constexpr int64_t kRowBlock = 5 * kRowsTogether;
static_assert(kColumns == kGroup);  // what a unit gives can be quantised at once

// The weights of one output for the inputs of one group, as floats.
void unpack_group(const Weight& weight, int64_t output, int64_t group, float (&values)[kGroup]);

}  // namespace specserve
