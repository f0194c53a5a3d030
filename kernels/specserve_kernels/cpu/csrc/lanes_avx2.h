// `lanes.h` for AVX2 with FMA and F16C.
#pragma once

#include <cstdint>

#include <immintrin.h>

#include "bfloat16.h"

namespace specserve {

#define SPECSERVE_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
constexpr int kLanes = 8;
constexpr int kQueriesTogether = 4, kVectorsTogether = 2;  // tiles whose sums fit the registers

struct Ints {
    __m256i v;
};
struct Floats {
    __m256 v;
};
struct Bytes {  // kLanes outputs x 4 weights
    __m256i v;
};
struct Nibbles {  // sums of products with at most 32 nibbles, two 16-bit sums per output
    __m256i v;
};

inline Floats exp2_part(Floats x);  // 2^x for |x| <= 0.5

inline Ints zero_ints() { return {_mm256_setzero_si256()}; }
inline Floats zero_floats() { return {_mm256_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm256_set1_ps(x)}; }
inline Floats load_half(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Floats mul_add(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Floats load(const bfloat16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))};
}
inline Floats pairs_of(const bfloat16* a, const bfloat16* b) {  // lane i: low half a[i], high b[i]
    const auto wide = [](const bfloat16* p) {
        return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    };
    return {_mm256_castsi256_ps(_mm256_or_si256(wide(a), _mm256_slli_epi32(wide(b), 16)))};
}
inline Floats first_of_pairs(Floats x) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x.v), 16))};
}
inline Floats second_of_pairs(Floats x) {
    return {_mm256_and_ps(x.v, _mm256_castsi256_ps(_mm256_set1_epi32(int(0xffff0000u))))};
}
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.v); }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm256_div_ps(a.v, b.v)}; }
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
inline Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
inline Ints max(Ints a, Ints b) { return {_mm256_max_epi32(a.v, b.v)}; }
template <typename Reduce>
inline int32_t reduced(Ints x, const Reduce& reduce) {
    const __m128i b = reduce(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    const __m128i c = reduce(b, _mm_shuffle_epi32(b, 0x4e));
    return _mm_cvtsi128_si32(reduce(c, _mm_shuffle_epi32(c, 0xb1)));
}
inline int32_t lane_sum(Ints x) {
    return reduced(x, [](__m128i a, __m128i b) { return _mm_add_epi32(a, b); });
}
inline int32_t lane_max(Ints x) {
    return reduced(x, [](__m128i a, __m128i b) { return _mm_max_epi32(a, b); });
}
inline Ints magnitude_bits(Floats x) {  // ordered like |x|, with NaN above everything
    return {_mm256_and_si256(_mm256_castps_si256(x.v), _mm256_set1_epi32(0x7fffffff))};
}
inline Ints to_nearest(Floats x) { return {_mm256_cvtps_epi32(x.v)}; }  // ties to even
inline void store_bytes(int8_t* p, Ints x) {
    const __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(x.v), _mm256_extracti128_si256(x.v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(words, words));
}
inline void store(bfloat16* p, Floats x) {  // rounded to nearest, ties to even
    const __m256i bits = _mm256_castps_si256(x.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_srli_epi32(
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
    const __m128i words =
        _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), words);
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
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(nearest), _mm256_set1_epi32(127));
    return mul(exp2_part({_mm256_sub_ps(y, nearest)}),
               {_mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23))});
}

inline Bytes load_bytes(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline Bytes low_nibbles(Bytes x) { return {_mm256_and_si256(x.v, _mm256_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes x) { return low_nibbles({_mm256_srli_epi16(x.v, 4)}); }
inline Nibbles zero_nibbles() { return {_mm256_setzero_si256()}; }
inline Nibbles dot_nibbles(Nibbles sum, Bytes w, int32_t x4) {
    // Each half sums 16 products of at most 15 * 127, which 16 bits can hold.
    return {_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(w.v, _mm256_set1_epi32(x4)))};
}
// Makes the compiler add to `sum` now. Otherwise it computes all products first, more than there
// are registers for, and adds them up afterwards.
template <typename Sum>
inline void force_order(Sum& sum) {
    asm volatile("" : "+x"(sum.v));
}
inline Ints widen(Nibbles sum) { return {_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1))}; }

// Signed weights: their sign is applied to x, because the instruction multiplies unsigned by signed
// bytes. The sum of two products is at most 2 * 128 * 127, which 16 bits can hold.
inline Bytes as_signed(Bytes x) { return x; }
inline Ints initial_signed_sum(int32_t) { return zero_ints(); }
inline Ints dot_signed(Ints sum, Bytes w, int32_t x4) {
    const __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(x4), w.v);
    return add(sum, widen({_mm256_maddubs_epi16(_mm256_abs_epi8(w.v), x)}));
}

}  // namespace specserve
