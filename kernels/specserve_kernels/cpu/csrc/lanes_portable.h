// `lanes.h` for any machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "bfloat16.h"

namespace specserve {

#define SPECSERVE_EACH(i, n) for (int i = 0; i < (n); ++i)
constexpr int kLanes = 16;
constexpr int kQueriesTogether = 1, kVectorsTogether = 4;

struct Ints {
    int32_t v[kLanes];
};
struct Floats {
    float v[kLanes];
};
struct Bytes {
    uint8_t v[4 * kLanes];
};
using Nibbles = Ints;

inline bfloat16 round_to_bfloat16(float x) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {uint16_t(x != x ? 0x7fc0 : rounded)};
}

template <typename Result, typename F>
inline Result each(F f) {
    Result r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
    return r;
}

inline float half_to_float(uint16_t h) {
    const uint32_t exponent = (h >> 10) & 31, fraction = h & 1023;
    const float magnitude = exponent == 0    ? std::ldexp(float(fraction), -24)
                            : exponent < 31  ? std::ldexp(float(fraction | 1024), int(exponent) - 25)
                            : fraction == 0  ? INFINITY
                                             : NAN;
    return h & 0x8000 ? -magnitude : magnitude;
}

inline Ints zero_ints() { return {}; }
inline Floats zero_floats() { return {}; }
inline Floats broadcast(float x) {
    return each<Floats>([&](int) { return x; });
}
inline Floats load_half(const uint16_t* p) {
    return each<Floats>([&](int i) { return half_to_float(p[i]); });
}
inline Floats to_floats(const Ints& x) {
    return each<Floats>([&](int i) { return float(x.v[i]); });
}
inline Floats mul(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats mul_add(const Floats& a, const Floats& b, const Floats& c) {
    return each<Floats>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Floats load(const float* p) {
    return each<Floats>([&](int i) { return p[i]; });
}
inline Floats load(const bfloat16* p) {
    return each<Floats>([&](int i) {
        const uint32_t bits = uint32_t(p[i].bits) << 16;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    });
}
inline Floats pairs_of(const bfloat16* a, const bfloat16* b) {  // lane i: low half a[i], high b[i]
    return each<Floats>([&](int i) {
        const uint32_t bits = uint32_t(b[i].bits) << 16 | a[i].bits;
        float x;
        std::memcpy(&x, &bits, sizeof x);
        return x;
    });
}
template <typename F>
inline Floats each_bits(const Floats& x, F f) {
    uint32_t bits[kLanes];
    std::memcpy(bits, x.v, sizeof bits);
    for (uint32_t& value : bits) value = f(value);
    Floats r;
    std::memcpy(r.v, bits, sizeof bits);
    return r;
}
inline Floats first_of_pairs(const Floats& x) {
    return each_bits(x, [](uint32_t bits) { return bits << 16; });
}
inline Floats second_of_pairs(const Floats& x) {
    return each_bits(x, [](uint32_t bits) { return bits & 0xffff0000u; });
}
inline void store(float* p, const Floats& x) { std::memcpy(p, x.v, sizeof x.v); }
inline Floats add(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats sub(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats div(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] / b.v[i]; });
}
inline Floats max(const Floats& a, const Floats& b) {
    return each<Floats>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline float lane_sum(const Floats& x) {
    float sum = 0;
    for (float value : x.v) sum += value;
    return sum;
}
inline float lane_max(const Floats& x) {
    float most = x.v[0];
    for (float value : x.v) most = most > value ? most : value;
    return most;
}
inline int32_t lane_sum(const Ints& x) {
    int32_t sum = 0;
    for (int32_t value : x.v) sum += value;
    return sum;
}
inline int32_t lane_max(const Ints& x) {
    int32_t most = x.v[0];
    for (int32_t value : x.v) most = most > value ? most : value;
    return most;
}
inline Ints add(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.v[i] + b.v[i]; });
}
inline Ints max(const Ints& a, const Ints& b) {
    return each<Ints>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Ints magnitude_bits(const Floats& x) {  // ordered like |x|, with NaN above everything
    return each<Ints>([&](int i) {
        int32_t bits;
        std::memcpy(&bits, x.v + i, sizeof bits);
        return bits & 0x7fffffff;
    });
}
inline Ints to_nearest(const Floats& x) {  // ties to even
    return each<Ints>([&](int i) { return int32_t(std::nearbyint(x.v[i])); });
}
inline void store_bytes(int8_t* p, const Ints& x) {
    for (int i = 0; i < kLanes; ++i) p[i] = int8_t(x.v[i]);
}
inline void store(bfloat16* p, const Floats& x) {
    for (int i = 0; i < kLanes; ++i) p[i] = round_to_bfloat16(x.v[i]);
}
// Transposes: lane i of columns[c] becomes float c of the four at from(i).
template <typename From>
inline void columns_of(const From& from, Floats (&columns)[4]) {
    for (int i = 0; i < kLanes; ++i) {
        float four[4];
        std::memcpy(four, from(i), sizeof four);
        for (int c = 0; c < 4; ++c) columns[c].v[i] = four[c];
    }
}
inline Floats exp2(const Floats& x) {
    return each<Floats>([&](int i) { return std::exp2(x.v[i]); });
}

inline Bytes load_bytes(const uint8_t* p) {
    Bytes r;
    std::memcpy(r.v, p, sizeof r.v);
    return r;
}
inline Bytes low_nibbles(Bytes x) {
    for (uint8_t& b : x.v) b &= 15;
    return x;
}
inline Bytes high_nibbles(Bytes x) {
    for (uint8_t& b : x.v) b >>= 4;
    return x;
}
template <typename Weight>
inline Ints dot(Ints sum, const Bytes& w, int32_t x4) {
    int8_t x[4];
    std::memcpy(x, &x4, sizeof x);
    for (int i = 0; i < kLanes; ++i)
        for (int k = 0; k < 4; ++k) sum.v[i] += Weight(w.v[4 * i + k]) * x[k];
    return sum;
}
inline Nibbles zero_nibbles() { return {}; }
inline Nibbles dot_nibbles(const Nibbles& sum, const Bytes& w, int32_t x4) {
    return dot<uint8_t>(sum, w, x4);
}
inline void force_order(Nibbles&) {}
inline Ints widen(const Nibbles& sum) { return sum; }
inline Bytes as_signed(const Bytes& x) { return x; }
inline Ints initial_signed_sum(int32_t) { return {}; }
inline Ints dot_signed(const Ints& sum, const Bytes& w, int32_t x4) {
    return dot<int8_t>(sum, w, x4);
}

}  // namespace specserve
