// SIMD vectors of kLanes numbers and their operations. What vector types of the compiler express is
// here; the file of each instruction set beside this one has the rest. Only these files use vector
// intrinsics; the other sources are compiled once per instruction set (see setup.py).
//
// Integer results are the same in all builds; float results may differ in the last bit.
#pragma once

#include <cstdint>
#include <cstring>

namespace specserve {

#if defined(__AVX512VNNI__)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 16;
constexpr int kRegisters = 16;
#endif

struct bfloat16 {  // its bits; one of the two storage types of K and V
    uint16_t bits;
};

typedef float FloatVector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVector __attribute__((vector_size(4 * kLanes)));
typedef uint8_t ByteVector __attribute__((vector_size(4 * kLanes)));
// The same at any address.
typedef FloatVector FloatsAt __attribute__((aligned(1), may_alias));
typedef ByteVector BytesAt __attribute__((aligned(1), may_alias));

struct Ints {
    IntVector v;
};
struct Floats {
    FloatVector v;
};
struct Bytes {  // kLanes outputs x 4 weights
    ByteVector v;
};

inline BitVector load_low_halves(const bfloat16* p);  // the high halves of the lanes are 0
inline void store_low_halves(bfloat16* p, BitVector bits);
inline Floats exp2_part(Floats x);  // 2^x for |x| <= 0.5

inline BitVector bits_of(Floats x) { return BitVector(x.v); }
inline Floats from_bits(BitVector bits) { return {FloatVector(bits)}; }

inline Ints zero_ints() { return {IntVector{}}; }
inline Floats zero_floats() { return {FloatVector{}}; }
inline Floats to_floats(Ints x) { return {__builtin_convertvector(x.v, FloatVector)}; }
inline Floats load(const float* p) { return {*reinterpret_cast<const FloatsAt*>(p)}; }
inline Floats load(const bfloat16* p) { return from_bits(load_low_halves(p) << 16); }
inline void store(float* p, Floats x) { *reinterpret_cast<FloatsAt*>(p) = x.v; }
inline void store(bfloat16* p, Floats x) {  // rounded to nearest, ties to even
    const BitVector bits = bits_of(x), rounded = (bits + (bits >> 16 & 1) + 0x7fff) >> 16;
    store_low_halves(p, x.v == x.v ? rounded : BitVector{} + 0x7fc0);
}
inline Floats add(Floats a, Floats b) { return {a.v + b.v}; }
inline Floats sub(Floats a, Floats b) { return {a.v - b.v}; }
inline Floats mul(Floats a, Floats b) { return {a.v * b.v}; }
inline Floats div(Floats a, Floats b) { return {a.v / b.v}; }
inline Ints add(Ints a, Ints b) { return {a.v + b.v}; }
inline Ints max(Ints a, Ints b) { return {a.v > b.v ? a.v : b.v}; }
inline Ints magnitude_bits(Floats x) {  // ordered like |x|, with NaN above everything
    return {IntVector(bits_of(x) & 0x7fffffff)};
}
inline Floats first_of_pairs(Floats x) { return from_bits(bits_of(x) << 16); }  // of `pairs_of`

inline Bytes load_bytes(const uint8_t* p) { return {*reinterpret_cast<const BytesAt*>(p)}; }
inline Bytes low_nibbles(Bytes x) { return {x.v & 15}; }
inline Bytes high_nibbles(Bytes x) { return {x.v >> 4}; }

}  // namespace specserve

#if defined(__AVX512VNNI__)
#include "lanes_avx512.h"
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

namespace specserve {

// Returns p, but hides from the compiler that it is the same address. Otherwise the compiler loads
// values early that are used several times, and has no registers to keep them in.
template <typename T>
inline const T* hide_pointer(const T* p) {
    asm volatile("" : "+r"(p));
    return p;
}

// Dot products over pairs of bfloat16, one pair per lane: adds the product of every lane's pair
// with the same pair of factors `two` to the lane's sum. The factors are rounded to bfloat16 too.
#if defined(__AVX512BF16__)
using Factor = bfloat16;
inline Floats dot_pairs(Floats sum, Floats lanes, const Factor* two) {
    float both;
    std::memcpy(&both, two, sizeof both);
    return {_mm512_dpbf16_ps(sum.v, __m512bh(lanes.v), __m512bh(broadcast(both).v))};
}
inline void store_factors(Factor* p, Floats x) {  // both instructions treat denormals as zero
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

inline Floats exp2_part(Floats x) {  // Taylor: the first omitted term is below 1.2e-7
    Floats sum = broadcast(1.5403530e-4f);
    for (float coefficient : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                              6.9314718e-1f, 1.0f})
        sum = mul_add(sum, x, broadcast(coefficient));
    return sum;
}

}  // namespace specserve
