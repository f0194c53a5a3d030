// The operations of `lanes.h` that need instructions of AVX2 with FMA and F16C.
#pragma once

#include <immintrin.h>

namespace specserve {

#define SPECSERVE_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
constexpr int kQueriesTogether = 4, kVectorsTogether = 2;  // tiles whose sums fit the registers

struct Nibbles {  // sums of products with at most 32 nibbles, two 16-bit sums per output
    __m256i v;
};

inline Floats broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Floats load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Floats mul_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
inline float lane_sum(Floats x) {
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float lane_max(Floats x) {
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(x.v), _mm256_extractf128_ps(x.v, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
template <typename Reduce>
inline int32_t reduced(__m256i x, const Reduce& reduce) {
    const __m128i b = reduce(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    const __m128i c = reduce(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(reduce(c, _mm_shuffle_epi32(c, 0xb1)));
}
inline int32_t lane_sum(Ints x) {
    return reduced(__m256i(x.v), [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
}
inline int32_t lane_max(Ints x) {
    return reduced(__m256i(x.v), [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
}
inline Ints to_nearest(Floats x) {  // ties to even
    return {IntVector(_mm256_cvtps_epi32(x.v))};
}
inline void store_bytes(int8_t* p, Ints x) {
    const __m256i y = __m256i(x.v);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}

inline BitVector load_low_halves(const bfloat16* p) {
    return BitVector(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_low_halves(bfloat16* p, BitVector bits) {
    const __m256i x = __m256i(bits);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(_mm256_castsi256_si128(x),
                                                                     _mm256_extracti128_si256(x, 1)));
}
inline Floats second_of_pairs(Floats x) {
    return {_mm256_and_ps(x.v, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000u))))};
}
// Lane i: a[i] in the low half, b[i] in the high half.
inline Floats pairs_of(const bfloat16* a, const bfloat16* b) {
    return from_bits(load_low_halves(a) | load_low_halves(b) << 16);
}
// Transposes: lane i of columns[c] becomes float c of the four at from(i).
template <typename From>
inline void columns_of(const From& from, Floats (&columns)[4]) {
    __m256 rows[4];  // 128-bit part j of rows[i]: the four floats at from(4 j + i)
    for (int i = 0; i < 4; ++i)
        rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from(i))),
                                       _mm_loadu_ps(from(4 + i)), 1);
    const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(rows[0], rows[1]));
    const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(rows[0], rows[1]));
    const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(rows[2], rows[3]));
    const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(rows[2], rows[3]));
    columns[0] = {_mm256_castpd_ps(_mm256_unpacklo_pd(a, c))};
    columns[1] = {_mm256_castpd_ps(_mm256_unpackhi_pd(a, c))};
    columns[2] = {_mm256_castpd_ps(_mm256_unpacklo_pd(b, d))};
    columns[3] = {_mm256_castpd_ps(_mm256_unpackhi_pd(b, d))};
}

inline Floats exp2(Floats x) {
    // The clamps preserve NaN: max and min return the second operand if either is NaN.
    const __m256 y =
        _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-126.0f), x.v));
    const __m256 nearest = _mm256_round_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const BitVector exponent = BitVector(_mm256_cvtps_epi32(nearest)) + 127;
    return mul(exp2_part({y - nearest}), from_bits(exponent << 23));
}

inline Nibbles zero_nibbles() { return {_mm256_setzero_si256()}; }
inline Nibbles dot_nibbles(Nibbles sum, Bytes w, int32_t x4) {
    // Each half sums 16 products of at most 15 * 127, which 16 bits can hold.
    const __m256i products = _mm256_maddubs_epi16(__m256i(w.v), _mm256_set1_epi32(x4));
    return {_mm256_add_epi16(sum.v, products)};
}
// Makes the compiler add to `sum` now. Otherwise it computes all products first, more than there
// are registers for, and adds them up afterwards.
template <typename Sum>
inline void force_order(Sum& sum) {
    asm volatile("" : "+x"(sum.v));
}
inline Ints widen(Nibbles sum) {
    return {IntVector(_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1)))};
}

// Signed weights: their sign is applied to x, because the instruction multiplies unsigned by signed
// bytes. The sum of two products is at most 2 * 128 * 127, which 16 bits can hold.
inline Bytes as_signed(Bytes x) { return x; }
inline Ints initial_signed_sum(int32_t) { return zero_ints(); }
inline Ints dot_signed(Ints sum, Bytes w, int32_t x4) {
    const __m256i weights = __m256i(w.v), x = _mm256_sign_epi8(_mm256_set1_epi32(x4), weights);
    return add(sum, widen({_mm256_maddubs_epi16(_mm256_abs_epi8(weights), x)}));
}

}  // namespace specserve
