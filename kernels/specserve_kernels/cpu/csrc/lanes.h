// SIMD vectors of kLanes numbers and their operations. Only this file and the file of each
// instruction set use vector intrinsics; the other sources are compiled once per instruction set
// (see setup.py).
//
// Integer results are the same in all builds; float results may differ in the last bit.
#pragma once

#include <cstdint>
#include <cstring>

#include "bfloat16.h"
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

#if defined(__AVX2__)
inline Floats exp2_part(Floats x) {  // Taylor: the first omitted term is below 1.2e-7
    Floats sum = broadcast(1.5403530e-4f);
    for (float coefficient : {1.3333558e-3f, 9.6181291e-3f, 5.5504109e-2f, 2.4022651e-1f,
                              6.9314718e-1f, 1.0f})
        sum = mul_add(sum, x, broadcast(coefficient));
    return sum;
}
#endif

}  // namespace specserve
