// Eight values at a time between memory and float registers: one 16-byte access for 16-bit elements, two for float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fcsa {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class Element>
__device__ __forceinline__ Element from_float(float x) {
  if constexpr (sizeof(Element) == 4) {
    return x;
  } else if constexpr (std::is_same_v<Element, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Two floats, rounded, in one 32-bit register; `low` at the lower address.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<Element, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<Element, __half>) {
    return __half22float2(reinterpret_cast<const __half2&>(pair));
  } else {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  }
}

// The larger of two values each, pair by pair.
template <class Element>
__device__ __forceinline__ uint32_t max_pair(uint32_t a, uint32_t b) {
  using Pair = std::conditional_t<std::is_same_v<Element, __half>, __half2, __nv_bfloat162>;
  const Pair larger = __hmax2(reinterpret_cast<const Pair&>(a), reinterpret_cast<const Pair&>(b));
  return reinterpret_cast<const uint32_t&>(larger);
}

template <class Element>
__device__ __forceinline__ void load8(float (&x)[8], const Element* source) {  // source on a 16-byte boundary
  if constexpr (sizeof(Element) == 4) {
    const float4 low = reinterpret_cast<const float4*>(source)[0], high = reinterpret_cast<const float4*>(source)[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w;
    x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
  } else {
    const uint4 raw = *reinterpret_cast<const uint4*>(source);
    const uint32_t pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = unpack<Element>(pairs[i]);
      x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
    }
  }
}

template <class Element>
__device__ __forceinline__ void store8(Element* target, const float (&x)[8]) {  // target on a 16-byte boundary
  if constexpr (sizeof(Element) == 4) {
    reinterpret_cast<float4*>(target)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4*>(target)[1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    *reinterpret_cast<uint4*>(target) = make_uint4(pack<Element>(x[0], x[1]), pack<Element>(x[2], x[3]),
                                                   pack<Element>(x[4], x[5]), pack<Element>(x[6], x[7]));
  }
}

}  // namespace fcsa
