// Sixteen outputs side by side, and what a kernel may do with them. The only file that names
// instructions: the same sources are compiled once per instruction set (see pyproject.toml).
//
// All three give the same integers; floats may differ between them in the last bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace specserve {

constexpr int kLanes = 16;

#if defined(__AVX512VNNI__)

#define SPECSERVE_EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); ++i)

struct Ints {
    __m512i v;
};
struct Floats {
    __m512 v;
};
struct Bytes {  // 16 outputs x 4 weights
    __m512i v;
};

inline Ints zero_ints() { return {_mm512_setzero_si512()}; }
inline Floats zero_floats() { return {_mm512_setzero_ps()}; }
inline Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load_half(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Floats to_floats(Ints x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats mul_add(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes low_nibbles(Bytes x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes x) {
    return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))};
}
inline Ints dot_nibbles(Ints sum, Bytes w, int32_t x4) {
    return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(x4))};
}

// Signed weights: the instruction wants unsigned ones, so 128 is added to each weight and 128 * x
// taken from the sum it starts with.
inline Bytes as_signed(Bytes x) { return {_mm512_xor_si512(x.v, _mm512_set1_epi8(-128))}; }
inline Ints start_signed(int32_t x_sum) { return {_mm512_set1_epi32(-128 * x_sum)}; }
inline Ints dot_signed(Ints sum, Bytes w, int32_t x4) { return dot_nibbles(sum, w, x4); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#define SPECSERVE_EACH(i, n) _Pragma("GCC unroll 8") for (int i = 0; i < (n); ++i)

struct Ints {
    __m256i lo, hi;
};
struct Floats {
    __m256 lo, hi;
};
struct Bytes {
    __m256i lo, hi;
};

inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Floats broadcast(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats zero_floats() { return broadcast(0.0f); }
inline Floats load_half(const uint16_t* p) {
    auto half = [](const uint16_t* q) {
        return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q)));
    };
    return {half(p), half(p + 8)};
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.lo), _mm256_cvtepi32_ps(x.hi)}; }
inline Floats mul(Floats a, Floats b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
inline Floats mul_add(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
inline void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
}

inline Bytes load_bytes(const uint8_t* p) {
    auto half = [](const uint8_t* q) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q));
    };
    return {half(p), half(p + 32)};
}
inline Bytes low_nibbles(Bytes x) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(x.lo, mask), _mm256_and_si256(x.hi, mask)};
}
inline Bytes high_nibbles(Bytes x) {
    return low_nibbles({_mm256_srli_epi16(x.lo, 4), _mm256_srli_epi16(x.hi, 4)});
}
inline Ints add_pairs(Ints sum, __m256i lo, __m256i hi) {  // of 16 bits each
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(sum.lo, _mm256_madd_epi16(lo, one)),
            _mm256_add_epi32(sum.hi, _mm256_madd_epi16(hi, one))};
}
inline Ints dot_nibbles(Ints sum, Bytes w, int32_t x4) {
    const __m256i x = _mm256_set1_epi32(x4);
    return add_pairs(sum, _mm256_maddubs_epi16(w.lo, x), _mm256_maddubs_epi16(w.hi, x));
}

// Signed weights: the sign moves to x. A pair is at most 2 * 128 * 127, which 16 bits hold.
inline Bytes as_signed(Bytes x) { return x; }
inline Ints start_signed(int32_t) { return zero_ints(); }
inline Ints dot_signed(Ints sum, Bytes w, int32_t x4) {
    const __m256i x = _mm256_set1_epi32(x4);
    auto pairs = [&](__m256i v) {
        return _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v));
    };
    return add_pairs(sum, pairs(w.lo), pairs(w.hi));
}

#else  // any machine

#define SPECSERVE_EACH(i, n) for (int i = 0; i < (n); ++i)

struct Ints {
    int32_t v[kLanes];
};
struct Floats {
    float v[kLanes];
};
struct Bytes {
    uint8_t v[4 * kLanes];
};

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
inline void store(float* p, const Floats& x) { std::memcpy(p, x.v, sizeof x.v); }

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
inline Ints dot_nibbles(const Ints& sum, const Bytes& w, int32_t x4) {
    return dot<uint8_t>(sum, w, x4);
}
inline Bytes as_signed(const Bytes& x) { return x; }
inline Ints start_signed(int32_t) { return {}; }
inline Ints dot_signed(const Ints& sum, const Bytes& w, int32_t x4) {
    return dot<int8_t>(sum, w, x4);
}

#endif

}  // namespace specserve
