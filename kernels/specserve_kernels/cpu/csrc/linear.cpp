#include "linear.h"

#include <algorithm>
#include <cstring>

#include "api.h"
#include "float_panels.h"
#include "row_count.h"
#include "team.h"

namespace specserve {
namespace {

inline int32_t four(const int8_t* p) {
    int32_t x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline Floats halves(const uint8_t* p, int part) {
    return load_half(reinterpret_cast<const uint16_t*>(p) + part * kLanes);
}

// Parts of a panel that are computed together: all of them if the registers suffice.
template <int kRows>
constexpr int kPartsTogether = kRows <= 4 ? kParts : 1;

template <int kRows>
inline void int4_tile(const uint8_t* tile, const GroupOfRows& x, Floats (&y)[kRows][kParts]) {
    constexpr int kTogether = kPartsTogether<kRows>;
    for (int first = 0; first < kParts; first += kTogether) {
        Nibbles sums[kRows][kTogether];
        SPECSERVE_EACH(r, kRows) SPECSERVE_EACH(i, kTogether) sums[r][i] = zero_nibbles();
        SPECSERVE_EACH(c, 4) {
            Bytes low[kTogether], high[kTogether];
            SPECSERVE_EACH(i, kTogether) {
                const Bytes both = load_bytes(tile + 64 + 64 * c + (first + i) * 4 * kLanes);
                low[i] = low_nibbles(both), high[i] = high_nibbles(both);
            }
            const int8_t* values = hide_pointer(x.values);
            SPECSERVE_EACH(r, kRows) SPECSERVE_EACH(i, kTogether) {
                const int8_t* at = values + r * kGroup + 8 * c;
                sums[r][i] = dot_nibbles(sums[r][i], low[i], four(at));
                sums[r][i] = dot_nibbles(sums[r][i], high[i], four(at + 4));
                force_order(sums[r][i]);
            }
        }
        SPECSERVE_EACH(i, kTogether) {
            const Floats scale = halves(tile, first + i), minimum = halves(tile + 32, first + i);
            SPECSERVE_EACH(r, kRows) {
                Floats& sum = y[r][first + i];
                sum = mul_add(to_floats(widen(sums[r][i])), mul(scale, broadcast(x.scales[r])), sum);
                sum = mul_add(minimum, broadcast(x.offsets[r]), sum);
            }
        }
    }
}

template <int kRows>
inline void int8_tile(const uint8_t* tile, const GroupOfRows& x, Floats (&y)[kRows][kParts]) {
    constexpr int kTogether = kPartsTogether<kRows>;
    for (int first = 0; first < kParts; first += kTogether) {
        Ints sums[kRows][kTogether];
        SPECSERVE_EACH(r, kRows) SPECSERVE_EACH(i, kTogether)
            sums[r][i] = initial_signed_sum(x.sums[r]);
        SPECSERVE_EACH(c, 8) {
            const int8_t* values = hide_pointer(x.values);
            SPECSERVE_EACH(i, kTogether) {
                const Bytes weights =
                    as_signed(load_bytes(tile + 32 + 64 * c + (first + i) * 4 * kLanes));
                SPECSERVE_EACH(r, kRows) {
                    sums[r][i] = dot_signed(sums[r][i], weights, four(values + r * kGroup + 4 * c));
                    force_order(sums[r][i]);
                }
            }
        }
        SPECSERVE_EACH(i, kTogether) {
            const Floats scale = halves(tile, first + i);
            SPECSERVE_EACH(r, kRows) {
                Floats& sum = y[r][first + i];
                sum = mul_add(to_floats(sums[r][i]), mul(scale, broadcast(x.scales[r])), sum);
            }
        }
    }
}

// Multiplies one panel with the first kRows rows of a block.
template <Format kFormat, int kRows>
__attribute__((noinline)) void panel_rows(const uint8_t* panel, const Rows& x, float* y) {
    Floats sums[kRows][kParts];
    for (auto& row : sums)
        for (Floats& sum : row) sum = zero_floats();
    for (int64_t group = 0; group < x.num_groups; ++group) {
        const uint8_t* tile = panel + group * tile_bytes(kFormat);
        for (int64_t line = 0; line < tile_bytes(kFormat); line += 64)
            __builtin_prefetch(tile + kAhead + line);
        if constexpr (kFormat == Format::kInt4)
            int4_tile<kRows>(tile, x.at(0, group), sums);
        else
            int8_tile<kRows>(tile, x.at(0, group), sums);
    }
    for (int r = 0; r < kRows; ++r)
        for (int part = 0; part < kParts; ++part)
            store(y + r * kColumns + part * kLanes, sums[r][part]);
}

template <Format kFormat>
void unit_of(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t unit, float* y) {
    const int64_t panel_bytes = rows.num_groups * tile_bytes(kFormat), first = unit * kPanels;
    const int64_t last = std::min(first + kPanels, weight.num_outputs / kPanel);
    for (int64_t panel = first; panel < last; ++panel, y += kPanel)
        for (int64_t row = 0; row < num_rows; row += kRowsTogether)
            with_row_count(num_rows - row, [&](auto count) {
                panel_rows<kFormat, decltype(count)::value>(weight.panels + panel * panel_bytes,
                                                            rows.from(row), y + row * kColumns);
            });
}

}  // namespace

void multiply_unit(const Weight& weight, const Rows& rows, int64_t num_rows, int64_t unit, float* y) {
    switch (weight.format) {
        case Format::kInt4: return unit_of<Format::kInt4>(weight, rows, num_rows, unit, y);
        case Format::kInt8: return unit_of<Format::kInt8>(weight, rows, num_rows, unit, y);
        default: return multiply_float_unit(weight, rows, num_rows, unit, y);
    }
}

void multiply(const Linear& linear, const float* x, int64_t num_rows, float* y, int num_threads) {
    const int64_t num_inputs = linear.weight.num_inputs, num_outputs = linear.weight.num_outputs;
    const RowBuffer rows(num_rows, num_inputs, is_quantized(linear.weight.format));
    run_team(2, num_threads, [&](Team& team) {
        team.share(num_rows, [&](int64_t row) {
            store_row(x + row * num_inputs, rows.rows(), row);
        });
        team.share(num_units(linear), [&](int64_t unit) {
            multiply_unit(linear, rows.rows(), num_rows, unit,
                          [&](int64_t row, int64_t column, Floats out) {
                              store(y + row * num_outputs + column, out);
                          });
        });
    });
}

void unpack_group(const Weight& weight, int64_t output, int64_t group,
                      float (&values)[kGroup]) {
    const int64_t tiles = output / kPanel * (weight.num_inputs / kGroup) + group;
    const uint8_t* tile = weight.panels + tiles * tile_bytes(weight.format);
    const int64_t at = output % kPanel;
    if (!is_quantized(weight.format)) return unpack_floats(weight.format, tile, at, values);
    auto half = [&](const uint8_t* halves_of_panel) {
        float floats[kLanes];
        store(floats, halves(halves_of_panel, int(at / kLanes)));
        return floats[at % kLanes];
    };
    const float scale = half(tile);
    if (weight.format == Format::kInt8) {
        for (int i = 0; i < kGroup; ++i) {
            const uint8_t byte = tile[32 + (i / 4 * kPanel + at) * 4 + i % 4];
            values[i] = float(int8_t(byte)) * scale;
        }
        return;
    }
    const float minimum = half(tile + 32);
    for (int i = 0; i < kGroup; ++i) {
        const uint8_t byte = tile[64 + (i / 8 * kPanel + at) * 4 + i % 4];
        const int nibble = i % 8 < 4 ? byte & 15 : byte >> 4;
        values[i] = float(nibble) * scale + minimum;
    }
}

// y [num_rows][num_outputs] = x W^T; x [num_rows][num_inputs].
SPECSERVE_API void specserve_linear(const uint8_t* panels, int32_t format, int64_t num_inputs,
                                    int64_t num_outputs, const float* x, int64_t num_rows, float* y,
                                    int32_t num_threads) {
    const Weight weight{panels, Format(format), num_inputs, num_outputs};
    multiply({weight, nullptr}, x, num_rows, y, num_threads);
}

}  // namespace specserve
