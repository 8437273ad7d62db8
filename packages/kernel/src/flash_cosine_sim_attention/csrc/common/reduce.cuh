// Sums and maxima over aligned groups of lanes of a warp; every lane of the group gets the result.
#pragma once

namespace fcsa {

template <int kLanes>
__device__ __forceinline__ float lane_sum(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <int kLanes>
__device__ __forceinline__ float lane_max(float x) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

}  // namespace fcsa
