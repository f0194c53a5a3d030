// Numbers side by side in a register, kLanes of them, and what a kernel may do with them. The only
// file that names instructions: the same sources are compiled once per instruction set (see
// pyproject.toml).
//
// All three give the same integers; floats may differ between them in the last bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace specserve {

struct bfloat16 {
    uint16_t bits;
};

// The same address, of which the compiler knows nothing: left alone, it loads early what is used
// again later, and has no registers to keep it in.
template <typename T>
inline const T* afresh(const T* p) {
    asm volatile("" : "+r"(p));
    return p;
}

#if defined(__AVX512VNNI__)

#define SPECSERVE_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
constexpr int kLanes = 16;
constexpr int kQueriesTogether = 6, kVectorsTogether = 4;  // sums that fit the registers

struct Ints {
    __m512i v;
};
struct Floats {
    __m512 v;
};
struct Bytes {  // kLanes outputs x 4 weights
    __m512i v;
};
using Nibbles = Ints;  // sums of products with at most 32 nibbles

inline Floats exp2_part(Floats x);  // 2^x for |x| <= 0.5

inline Ints zero_ints() { return {_mm512_setzero_si512()}; }
inline Floats zero_floats() { return {_mm512_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Floats to_floats(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats mul_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats load(const bfloat16* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16))};
}
inline Floats pairs_of(const bfloat16* a, const bfloat16* b) {  // lane i: a[i], and above it b[i]
    const auto wide = [](const bfloat16* p) {
        return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    };
    alignas(64) static constexpr uint16_t kInTurn[32] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    return {_mm512_castsi512_ps(
        _mm512_permutex2var_epi16(wide(a), _mm512_load_si512(kInTurn), wide(b)))};
}
inline Floats first_of_pairs(Floats x) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x.v), 16))};
}
inline Floats second_of_pairs(Floats x) {
    const __m512i upper = _mm512_set1_epi32(int(0xffff0000u));
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x.v), upper))};
}
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline float lane_sum(Floats x) { return _mm512_reduce_add_ps(x.v); }
inline float lane_max(Floats x) { return _mm512_reduce_max_ps(x.v); }
inline int32_t lane_sum(Ints x) { return _mm512_reduce_add_epi32(x.v); }
inline int32_t lane_max(Ints x) { return _mm512_reduce_max_epi32(x.v); }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints max(Ints a, Ints b) { return {_mm512_max_epi32(a.v, b.v)}; }
inline Ints magnitude_bits(Floats x) {  // ordered like |x|, with NaN above everything
    return {_mm512_and_si512(_mm512_castps_si512(x.v), _mm512_set1_epi32(0x7fffffff))};
}
inline Ints to_nearest(Floats x) { return {_mm512_cvtps_epi32(x.v)}; }  // ties to even
inline void store_bytes(int8_t* p, Ints x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v));
}
inline void store(bfloat16* p, Floats x) {  // rounded to nearest, ties to even
    const __m512i bits = _mm512_castps_si512(x.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(kept));
}

// columns[c] lane i: number c of the four at from(i).
template <typename From>
inline void columns_of(const From& from, Floats (&columns)[4]) {
    const auto four = [&](int i) { return _mm_loadu_ps(from(i)); };
    __m512 rows[4];  // row 4 j + i stands in 128 bits j of number i
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
    // The clamp lets NaN through: max gives its second operand if either is NaN.
    const __m512 y = _mm512_max_ps(_mm512_set1_ps(-150.0f), x.v);
    const __m512 whole = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT);
    const Floats part = exp2_part({_mm512_sub_ps(y, whole)});
    return {_mm512_scalef_ps(part.v, whole)};
}

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes x) {
    return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
inline Nibbles zero_nibbles() { return zero_ints(); }
inline Nibbles dot_nibbles(Nibbles sum, Bytes w, int32_t x4) {
    return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(x4))};
}
inline void settle(Nibbles&) {}
inline Ints whole(Nibbles sum) { return sum; }

// Signed weights: the instruction wants unsigned ones, so 128 is added to each weight and 128 * x
// taken from the sum it starts with.
inline Bytes as_signed(Bytes x) { return {_mm512_xor_si512(x.v, _mm512_set1_epi8(-128))}; }
inline Ints start_signed(int32_t x_sum) { return {_mm512_set1_epi32(-128 * x_sum)}; }
inline Ints dot_signed(Ints sum, Bytes w, int32_t x4) { return dot_nibbles(sum, w, x4); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define SPECSERVE_EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < (n); ++i)
constexpr int kLanes = 8;
constexpr int kQueriesTogether = 4, kVectorsTogether = 2;  // sums that fit the registers

struct Ints {
    __m256i v;
};
struct Floats {
    __m256 v;
};
struct Bytes {  // kLanes outputs x 4 weights
    __m256i v;
};
struct Nibbles {  // sums of products with at most 32 nibbles: two of 16 bits for each output
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
inline Floats pairs_of(const bfloat16* a, const bfloat16* b) {  // lane i: a[i], and above it b[i]
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

// columns[c] lane i: number c of the four at from(i).
template <typename From>
inline void columns_of(const From& from, Floats (&columns)[4]) {
    __m256 rows[4];  // row 4 j + i stands in 128 bits j of number i
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
    // The clamps let NaN through: max and min give their second operand if either is NaN.
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
    // 16 products of at most 15 * 127 in each half: 16 bits hold them.
    return {_mm256_add_epi16(sum.v, _mm256_maddubs_epi16(w.v, _mm256_set1_epi32(x4)))};
}
// Left alone, the compiler first makes all products, which no registers are left for, and then adds
// them up.
template <typename Sum>
inline void settle(Sum& sum) {
    asm volatile("" : "+x"(sum.v));
}
inline Ints whole(Nibbles sum) { return {_mm256_madd_epi16(sum.v, _mm256_set1_epi16(1))}; }

// Signed weights: the sign moves to x. A pair is at most 2 * 128 * 127, which 16 bits hold.
inline Bytes as_signed(Bytes x) { return x; }
inline Ints start_signed(int32_t) { return zero_ints(); }
inline Ints dot_signed(Ints sum, Bytes w, int32_t x4) {
    const __m256i x = _mm256_sign_epi8(_mm256_set1_epi32(x4), w.v);
    return add(sum, whole({_mm256_maddubs_epi16(_mm256_abs_epi8(w.v), x)}));
}

#else  // any machine

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
inline Floats pairs_of(const bfloat16* a, const bfloat16* b) {  // lane i: a[i], and above it b[i]
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
// columns[c] lane i: number c of the four at from(i).
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
inline void settle(Nibbles&) {}
inline Ints whole(const Nibbles& sum) { return sum; }
inline Bytes as_signed(const Bytes& x) { return x; }
inline Ints start_signed(int32_t) { return {}; }
inline Ints dot_signed(const Ints& sum, const Bytes& w, int32_t x4) {
    return dot<int8_t>(sum, w, x4);
}

#endif

// Sums over pairs of bfloat16, of which a lane holds one: sum += a pair in every lane times the same
// pair of factors, which are rounded to bfloat16 too.
#if defined(__AVX512BF16__)
using Factor = bfloat16;
inline Floats dot_pairs(Floats sum, Floats lanes, const Factor* two) {
    float both;
    std::memcpy(&both, two, sizeof both);
    return {_mm512_dpbf16_ps(sum.v, __m512bh(lanes.v), __m512bh(broadcast(both).v))};
}
inline void store_factors(Factor* p, Floats x) {  // what is denormal counts as zero here and there
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), __m256i(_mm512_cvtneps_pbh(x.v)));
}
#else
using Factor = float;
inline Floats dot_pairs(Floats sum, Floats lanes, const Factor* two) {
    return mul_add(first_of_pairs(lanes), broadcast(two[0]),
                   mul_add(second_of_pairs(lanes), broadcast(two[1]), sum));
}
inline void store_factors(Factor* p, Floats x) {
    bfloat16 rounded[kLanes];
    store(rounded, x);
    store(p, load(rounded));
}
#endif

#if defined(__AVX2__)
inline Floats exp2_part(Floats x) {  // Taylor: the first term left out is below 2e-8
    Floats sum = broadcast(1.5403530e-4f);
    for (float coefficient : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                              6.9314718e-1f, 1.0f})
        sum = mul_add(sum, x, broadcast(coefficient));
    return sum;
}
#endif

}  // namespace specserve
