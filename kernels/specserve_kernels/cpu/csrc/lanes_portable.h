// The operations of `lanes.h` that differ between instruction sets, for any machine.
#pragma once

#include <cmath>

namespace specserve {

#define SPECSERVE_EACH(i, n) for (int i = 0; i < (n); ++i)
constexpr int kQueriesTogether = 1, kVectorsTogether = 4;

using Nibbles = Ints;

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

inline Floats broadcast(float x) {
    return each<Floats>([&](int) { return x; });
}
inline Floats load_half(const uint16_t* p) {
    return each<Floats>([&](int i) { return half_to_float(p[i]); });
}
inline Floats mul_add(Floats a, Floats b, Floats c) { return {a.v * b.v + c.v}; }
inline Floats max(Floats a, Floats b) { return {a.v > b.v ? a.v : b.v}; }
inline float lane_sum(Floats x) {
    float sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += x.v[i];
    return sum;
}
inline int32_t lane_sum(Ints x) {
    int32_t sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += x.v[i];
    return sum;
}
template <typename Lanes>  // Floats or Ints
inline auto lane_max(Lanes x) {
    auto most = x.v[0];
    for (int i = 1; i < kLanes; ++i) most = most > x.v[i] ? most : x.v[i];
    return most;
}
inline Ints to_nearest(Floats x) {  // ties to even
    return each<Ints>([&](int i) { return int32_t(std::nearbyint(x.v[i])); });
}
inline void store_bytes(int8_t* p, Ints x) {
    for (int i = 0; i < kLanes; ++i) p[i] = int8_t(x.v[i]);
}
inline BitVector load_low_halves(const bfloat16* p) {
    BitVector bits;
    for (int i = 0; i < kLanes; ++i) bits[i] = p[i].bits;
    return bits;
}
inline void store_low_halves(bfloat16* p, BitVector bits) {
    for (int i = 0; i < kLanes; ++i) p[i].bits = uint16_t(bits[i]);
}
inline Floats second_of_pairs(Floats x) { return from_bits(bits_of(x) & 0xffff0000u); }
// Lane i: a[i] in the low half, b[i] in the high half.
inline Floats pairs_of(const bfloat16* a, const bfloat16* b) {
    return from_bits(load_low_halves(a) | load_low_halves(b) << 16);
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
inline Floats exp2(Floats x) {
    return each<Floats>([&](int i) { return std::exp2(x.v[i]); });
}

template <typename Weight>
inline Ints dot(Ints sum, const Bytes& w, int32_t x4) {
    int8_t x[4];
    std::memcpy(x, &x4, sizeof x);
    for (int i = 0; i < kLanes; ++i)
        for (int k = 0; k < 4; ++k) sum.v[i] += Weight(w.v[4 * i + k]) * x[k];
    return sum;
}
inline Nibbles zero_nibbles() { return zero_ints(); }
inline Nibbles dot_nibbles(Nibbles sum, Bytes w, int32_t x4) { return dot<uint8_t>(sum, w, x4); }
inline void force_order(Nibbles&) {}
inline Ints widen(Nibbles sum) { return sum; }
inline Bytes as_signed(Bytes x) { return x; }
inline Ints initial_signed_sum(int32_t) { return zero_ints(); }
inline Ints dot_signed(Ints sum, Bytes w, int32_t x4) { return dot<int8_t>(sum, w, x4); }

}  // namespace specserve
