#include "float_panels.h"

#include <algorithm>

#include "lanes.h"
#include "row_count.h"

namespace specserve {
namespace {

// Vectors of a unit's outputs that are computed together: as many as there are registers for, with
// the sums of all rows, the weights, and one input.
template <int kRows>
constexpr int kTogether = (kRows + 1) * kPanels * kParts < kRegisters ? kPanels * kParts
                          : (kRows + 1) * kParts < kRegisters         ? kParts
                                                                      : 1;

template <Format kFormat>
inline Floats load_weights(const uint8_t* tile, int64_t at) {
    if constexpr (kFormat == Format::kFloat32)
        return load(reinterpret_cast<const float*>(tile) + at);
    else if constexpr (kFormat == Format::kBfloat16)
        return load(reinterpret_cast<const bfloat16*>(tile) + at);
    else
        return load_half(reinterpret_cast<const uint16_t*>(tile) + at);
}

// Computes kVectors vectors of a unit's outputs, from vector `first` on, for the first kRows rows of
// a block. `panel` is the first of the unit.
template <Format kFormat, int kRows, int kVectors>
__attribute__((noinline)) void vectors(const uint8_t* panel, int first, const Rows& x, float* y) {
    constexpr int kPerLine = kGroup * 64 / tile_bytes(kFormat);  // inputs per cache line
    const int64_t panel_bytes = x.num_groups * tile_bytes(kFormat);
    Floats sums[kRows][kVectors];
    for (auto& row : sums)
        for (Floats& sum : row) sum = zero_floats();
    for (int64_t group = 0; group < x.num_groups; ++group) {
        const uint8_t* tiles[kVectors];
        SPECSERVE_EACH(i, kVectors)
            tiles[i] = panel + (first + i) / kParts * panel_bytes + group * tile_bytes(kFormat);
        const float* values = x.floats_at(0, group);
        for (int line = 0; line < kGroup; line += kPerLine) {
            for (int i = 0; i < kVectors; i += kParts)
                __builtin_prefetch(tiles[i] + kAhead + line * (64 / kPerLine));
            SPECSERVE_EACH(k, kPerLine) {
                const int c = line + k;
                Floats weights[kVectors];
                SPECSERVE_EACH(i, kVectors)
                    weights[i] = load_weights<kFormat>(tiles[i],
                                                       c * kPanel + (first + i) % kParts * kLanes);
                SPECSERVE_EACH(r, kRows) {
                    const Floats value = broadcast(values[r * kGroup + c]);
                    SPECSERVE_EACH(i, kVectors) sums[r][i] = mul_add(weights[i], value, sums[r][i]);
                }
            }
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int i = 0; i < kVectors; ++i)
            store(y + r * kColumns + (first + i) * kLanes, sums[r][i]);
}

template <Format kFormat>
void unit_of(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t unit, float* y) {
    const int64_t first = unit * kPanels, num_panels = weight.num_outputs / kPanel;
    const int num_vectors = int(std::min(kPanels, num_panels - first)) * kParts;
    const uint8_t* panel = weight.panels + first * rows.num_groups * tile_bytes(kFormat);
    for (int64_t row = 0; row < num_rows; row += kRowsTogether)
        with_row_count(num_rows - row, [&](auto count) {
            constexpr int kRows = decltype(count)::value, kMost = kTogether<kRows>;
            float* to = y + row * kColumns;
            int vector = 0;
            for (; vector + kMost <= num_vectors; vector += kMost)
                vectors<kFormat, kRows, kMost>(panel, vector, rows.from(row), to);
            for (; vector < num_vectors; ++vector)
                vectors<kFormat, kRows, 1>(panel, vector, rows.from(row), to);
        });
}

}  // namespace

void multiply_float_unit(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t unit,
                         float* y) {
    switch (weight.format) {
        case Format::kBfloat16: return unit_of<Format::kBfloat16>(weight, rows, num_rows, unit, y);
        case Format::kFloat16: return unit_of<Format::kFloat16>(weight, rows, num_rows, unit, y);
        default: return unit_of<Format::kFloat32>(weight, rows, num_rows, unit, y);
    }
}

void unpack_floats(Format format, const uint8_t* tile, int64_t at, float (&values)[kGroup]) {
    const int64_t in_vector = at % kLanes;
    for (int64_t c = 0; c < kGroup; ++c) {
        const int64_t first = c * kPanel + at - in_vector;
        float lanes[kLanes];
        switch (format) {
            case Format::kBfloat16: store(lanes, load_weights<Format::kBfloat16>(tile, first)); break;
            case Format::kFloat16: store(lanes, load_weights<Format::kFloat16>(tile, first)); break;
            default: store(lanes, load_weights<Format::kFloat32>(tile, first));
        }
        values[c] = lanes[in_vector];
    }
}

}  // namespace specserve
