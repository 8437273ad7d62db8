// Norm factors of a tile of keys in shared memory, in the order in which the threads of a warpgroup read them.
#pragma once

namespace fcsa::sm90 {

// Where factor `key` of a tile lies: a thread of a consumer reads those of four columns, c, c + 1, c + 8, c + 9 at once.
__device__ __forceinline__ int factor_slot(int key) {
  return key / 16 * 16 + key % 8 / 2 * 4 + key % 16 / 8 * 2 + key % 2;
}

// The factors of the four columns of sixteen keys that a thread holds, [eight keys][column].
__device__ __forceinline__ void load_factors(float (&factor)[2][2], const float* of_sixteen_keys, int column) {
  const float4 factors = *reinterpret_cast<const float4*>(of_sixteen_keys + column * 2);
  factor[0][0] = factors.x, factor[0][1] = factors.y;
  factor[1][0] = factors.z, factor[1][1] = factors.w;
}

}  // namespace fcsa::sm90
