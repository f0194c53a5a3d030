#include "linear.h"

#include <algorithm>
#include <cstring>

#include "lanes.h"

namespace specserve {
namespace {

constexpr int kRowBlock = 8;      // rows whose sums stay in registers
constexpr int kRowsInCache = 64;  // rows that go through all panels of a chunk together
constexpr int64_t kAhead = 4096;  // bytes; the hardware alone stops at every page

inline int32_t four(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

template <int kRows>
inline void int4_tile(const uint8_t* tile, const Rows& x, int64_t size, int64_t group,
                      Floats (&y)[kRows]) {
    const Floats scale = load_half(reinterpret_cast<const uint16_t*>(tile));
    const Floats minimum = load_half(reinterpret_cast<const uint16_t*>(tile + 32));
    Ints sums[kRows];
    for (Ints& sum : sums) sum = zero_ints();
    SPECSERVE_EACH(c, 4) {
        const Bytes both = load_bytes(tile + 64 + 64 * c);
        const Bytes low = low_nibbles(both), high = high_nibbles(both);
        SPECSERVE_EACH(r, kRows) {
            const int8_t* at = x.values + r * size + group * kGroup + 8 * c;
            sums[r] = dot_nibbles(sums[r], low, four(at));
            sums[r] = dot_nibbles(sums[r], high, four(at + 4));
        }
    }
    SPECSERVE_EACH(r, kRows) {
        const int64_t at = r * (size / kGroup) + group;
        y[r] = mul_add(to_floats(sums[r]), mul(scale, broadcast(x.scales[at])), y[r]);
        y[r] = mul_add(minimum, broadcast(x.offsets[at]), y[r]);
    }
}

template <int kRows>
inline void int8_tile(const uint8_t* tile, const Rows& x, int64_t size, int64_t group,
                      Floats (&y)[kRows]) {
    const Floats scale = load_half(reinterpret_cast<const uint16_t*>(tile));
    Ints sums[kRows];
    SPECSERVE_EACH(r, kRows) sums[r] = start_signed(x.sums[r * (size / kGroup) + group]);
    SPECSERVE_EACH(c, 8) {
        const Bytes weights = as_signed(load_bytes(tile + 32 + 64 * c));
        SPECSERVE_EACH(r, kRows)
            sums[r] = dot_signed(sums[r], weights,
                                 four(x.values + r * size + group * kGroup + 4 * c));
    }
    SPECSERVE_EACH(r, kRows) {
        const float x_scale = x.scales[r * (size / kGroup) + group];
        y[r] = mul_add(to_floats(sums[r]), mul(scale, broadcast(x_scale)), y[r]);
    }
}

template <Format kFormat, int kRows>
void panel_rows(const uint8_t* panel, int64_t size, const Rows& x, float* y, int64_t stride) {
    Floats sums[kRows];
    for (Floats& sum : sums) sum = zero_floats();
    for (int64_t group = 0; group < size / kGroup; ++group) {
        const uint8_t* tile = panel + group * tile_bytes(kFormat);
        for (int64_t line = 0; line < tile_bytes(kFormat); line += 64)
            __builtin_prefetch(tile + kAhead + line);
        if constexpr (kFormat == Format::kInt4)
            int4_tile<kRows>(tile, x, size, group, sums);
        else
            int8_tile<kRows>(tile, x, size, group, sums);
    }
    for (int r = 0; r < kRows; ++r) store(y + r * stride, sums[r]);
}

template <Format kFormat>
void panel_block(const uint8_t* panel, int64_t size, const Rows& x, int64_t num_rows, float* y,
                 int64_t stride) {
    switch (num_rows) {
        case 1: return panel_rows<kFormat, 1>(panel, size, x, y, stride);
        case 2: return panel_rows<kFormat, 2>(panel, size, x, y, stride);
        case 3: return panel_rows<kFormat, 3>(panel, size, x, y, stride);
        case 4: return panel_rows<kFormat, 4>(panel, size, x, y, stride);
        case 5: return panel_rows<kFormat, 5>(panel, size, x, y, stride);
        case 6: return panel_rows<kFormat, 6>(panel, size, x, y, stride);
        case 7: return panel_rows<kFormat, 7>(panel, size, x, y, stride);
        default: return panel_rows<kFormat, kRowBlock>(panel, size, x, y, stride);
    }
}

template <Format kFormat>
void panels_of(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t first_panel,
               int64_t last_panel, float* y, int64_t stride) {
    const int64_t size = weight.num_inputs;
    const int64_t panel_bytes = size / kGroup * tile_bytes(kFormat);
    for (int64_t top = 0; top < num_rows; top += kRowsInCache) {
        const int64_t bottom = std::min<int64_t>(top + kRowsInCache, num_rows);
        for (int64_t panel = first_panel; panel < last_panel; ++panel) {
            const uint8_t* weights = weight.panels + panel * panel_bytes;
            for (int64_t row = top; row < bottom; row += kRowBlock)
                panel_block<kFormat>(weights, size, from_row(rows, row, size),
                                     std::min<int64_t>(kRowBlock, bottom - row),
                                     y + row * stride + (panel - first_panel) * kLanes, stride);
        }
    }
}

}  // namespace

void linear_panels(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t first_panel,
                   int64_t last_panel, float* y, int64_t stride) {
    if (weight.format == Format::kInt4)
        panels_of<Format::kInt4>(weight, rows, num_rows, first_panel, last_panel, y, stride);
    else
        panels_of<Format::kInt8>(weight, rows, num_rows, first_panel, last_panel, y, stride);
}

void unpack_group(const Weight& weight, int64_t output, int64_t group, float (&values)[kGroup]) {
    const int64_t tiles = output / kLanes * (weight.num_inputs / kGroup) + group;
    const uint8_t* tile = weight.panels + tiles * tile_bytes(weight.format);
    const int64_t lane = output % kLanes;
    float scales[kLanes], minimums[kLanes] = {};
    store(scales, load_half(reinterpret_cast<const uint16_t*>(tile)));
    if (weight.format == Format::kInt8) {
        for (int i = 0; i < kGroup; ++i) {
            const uint8_t byte = tile[32 + (i / 4 * kLanes + lane) * 4 + i % 4];
            values[i] = float(int8_t(byte)) * scales[lane];
        }
        return;
    }
    store(minimums, load_half(reinterpret_cast<const uint16_t*>(tile + 32)));
    for (int i = 0; i < kGroup; ++i) {
        const uint8_t byte = tile[64 + (i / 8 * kLanes + lane) * 4 + i % 4];
        const int nibble = i % 8 < 4 ? byte & 15 : byte >> 4;
        values[i] = float(nibble) * scales[lane] + minimums[lane];
    }
}

}  // namespace specserve
