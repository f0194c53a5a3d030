// What Python calls, by ctypes: plain C, addresses and sizes. Checked by the caller, `native.py`.
#include <omp.h>

#include <algorithm>

#include "linear.h"

using specserve::Format;
using specserve::Rows;
using specserve::Weight;

namespace {

constexpr int64_t kPanelsInChunk = 4;  // what a thread takes at a time

}  // namespace

extern "C" {

// x [num_rows][size] floats -> the four arrays of `Rows`.
void specserve_quantize(const float* x, int64_t num_rows, int64_t size, int8_t* values,
                        float* scales, float* offsets, int32_t* sums, int32_t num_threads) {
    const Rows rows{values, scales, offsets, sums};
#pragma omp parallel for num_threads(num_threads) if (num_rows > 16) schedule(dynamic, 8)
    for (int64_t row = 0; row < num_rows; ++row)
        specserve::quantize_row(x + row * size, size, rows, row);
}

// y [num_rows][num_outputs] = x W^T of quantised rows.
void specserve_linear(const uint8_t* panels, int32_t format, int64_t num_inputs,
                      int64_t num_outputs, int8_t* values, float* scales, float* offsets,
                      int32_t* sums, int64_t num_rows, float* y, int32_t num_threads) {
    const Weight weight{panels, Format(format), num_inputs, num_outputs};
    const Rows rows{values, scales, offsets, sums};
    const int64_t num_panels = num_outputs / 16;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic, 1)
    for (int64_t first = 0; first < num_panels; first += kPanelsInChunk)
        specserve::linear_panels(weight, rows, num_rows, first,
                                 std::min(first + kPanelsInChunk, num_panels), y);
}

}  // extern "C"
