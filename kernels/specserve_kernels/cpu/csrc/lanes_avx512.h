// The operations of `lanes.h` that need instructions of AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

namespace specserve {

#define SPECSERVE_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
constexpr int kQueriesTogether = 6, kVectorsTogether = 4;  // tiles whose sums fit the registers

using Nibbles = Ints;  // sums of products with at most 32 nibbles

inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Floats mul_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float lane_sum(Floats x) { return _mm512_reduce_add_ps(x.v); }
inline float lane_max(Floats x) { return _mm512_reduce_max_ps(x.v); }
inline int32_t lane_sum(Ints x) { return _mm512_reduce_add_epi32(__m512i(x.v)); }
inline int32_t lane_max(Ints x) { return _mm512_reduce_max_epi32(__m512i(x.v)); }
inline Ints to_nearest(Floats x) {  // ties to even
    return {IntVector(_mm512_cvtps_epi32(x.v))};
}
inline void store_bytes(int8_t* p, Ints x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(__m512i(x.v)));
}
inline BitVector load_low_halves(const bfloat16* p) {
    return BitVector(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline void store_low_halves(bfloat16* p, BitVector bits) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(__m512i(bits)));
}
inline Floats second_of_pairs(Floats x) { return from_bits(bits_of(x) & 0xffff0000u); }
// Lane i: a[i] in the low half, b[i] in the high half.
inline Floats pairs_of(const bfloat16* a, const bfloat16* b) {
    const auto wide = [](const bfloat16* p) {
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    alignas(64) static constexpr uint16_t kInTurn[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    return {_mm512_castsi512_ps(
        _mm512_permutex2var_epi16(wide(a), _mm512_load_si512(kInTurn), wide(b)))};
}

// Transposes: lane i of columns[c] becomes float c of the four at from(i).
template <typename From>
inline void columns_of(const From& from, Floats (&columns)[4]) {
    const auto four = [&](int i) { return _mm_loadu_ps(from(i)); };
    __m512 rows[4];  // 128-bit part j of rows[i]: the four floats at from(4 j + i)
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_castps128_ps512(four(i));
        rows[i] = _mm512_insertf32x4(rows[i], four(4 + i), 1);
        rows[i] = _mm512_insertf32x4(rows[i], four(8 + i), 2);
        rows[i] = _mm512_insertf32x4(rows[i], four(12 + i), 3);
    }
    const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(rows[0], rows[1]));
    const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(rows[0], rows[1]));
    const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(rows[2], rows[3]));
    const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(rows[2], rows[3]));
    columns[0] = {_mm512_castpd_ps(_mm512_unpacklo_pd(a, c))};
    columns[1] = {_mm512_castpd_ps(_mm512_unpackhi_pd(a, c))};
    columns[2] = {_mm512_castpd_ps(_mm512_unpacklo_pd(b, d))};
    columns[3] = {_mm512_castpd_ps(_mm512_unpackhi_pd(b, d))};
}

inline Floats exp2(Floats x) {
    // The clamp preserves NaN: max returns the second operand if either is NaN.
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-150.0f), x.v);
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT);
    return {_mm512_scalef_ps(exp2_part({y - whole}).v, whole)};
}

inline Nibbles zero_nibbles() { return zero_ints(); }
inline Nibbles dot_nibbles(Nibbles sum, Bytes w, int32_t x4) {
    const __m512i x = _mm512_set1_epi32(x4);
    return {IntVector(_mm512_dpbusd_epi32(__m512i(sum.v), __m512i(w.v), x))};
}
inline void force_order(Nibbles&) {}
inline Ints widen(Nibbles sum) { return sum; }

// Signed weights: the instruction multiplies unsigned by signed bytes, so 128 is added to each
// weight and the sum starts at -128 times the sum of x.
inline Bytes as_signed(Bytes x) { return {x.v ^ 128}; }
inline Ints initial_signed_sum(int32_t x_sum) { return {IntVector{} - 128 * x_sum}; }
inline Ints dot_signed(Ints sum, Bytes w, int32_t x4) { return dot_nibbles(sum, w, x4); }

}  // namespace specserve
