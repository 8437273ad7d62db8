// 2^x on two units. The exponential unit gives 16 results a clock and multiprocessor; at head dim 64 that takes as long as
// both matrix products, so a share of the exponentials is computed on the FMA units, which have time to spare.
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

namespace fcsa::sm90 {

__device__ __forceinline__ float exp2_approx(float x) {  // relative error 2^-22; 2^-inf = 0
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 2^(a * b + c) for results in the normal range, which the bound of the logits guarantees: nothing is clamped.
// Cody-Waite: adding 1.5 * 2^23 rounds to the nearest integer n and leaves n in the low bits; the fraction f in
// [-1/2, 1/2] goes into a minimax polynomial, n into the exponent. Largest relative error: 2^-13.7 with degree 3, below the
// rounding of P to bfloat16 (2^-9); 2^-18.5 with degree 4 for half (2^-12).
template <class P>
__device__ __forceinline__ float exp2_polynomial(float a, float b, float c) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  const float x = fmaf(a, b, c);
  const float rounded = x + kMagic;
  const float f = x - (rounded - kMagic);
  float y;
  if constexpr (std::is_same_v<P, __half>) {
    y = fmaf(f, 0.009570101276040077f, 0.05591786280274391f);
    y = fmaf(f, y, 0.240247443318367f);
    y = fmaf(f, y, 0.6931217908859253f);
    y = fmaf(f, y, 0.9999992847442627f);
  } else {
    y = fmaf(f, 0.0551716648042202f, 0.2426111400127411f);
    y = fmaf(f, y, 0.6932609677314758f);
    y = fmaf(f, y, 0.9999280571937561f);
  }
  return __int_as_float(__float_as_int(y) + (__float_as_int(rounded) << 23));
}

}  // namespace fcsa::sm90
