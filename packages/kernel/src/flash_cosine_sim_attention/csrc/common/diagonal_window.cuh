// A bias that depends on key - query alone, in the fragments of scores: what one thread reads of its diagonals.
//
// Within a thread's fragments, elements one n8 tile to the right lie on the same diagonal as those one row tile of 8
// up: of 8 kM x 8 kN numbers per quad row only kM + kN - 1 pairs differ. So a chunk of 32 queries x 64 keys a warp costs
// 22 loads a thread, which the first-level cache serves, where a dense bias costs 64.
#pragma once

#include "softmax.cuh"
#include "tile_index.cuh"

namespace fcsa {

// The diagonals of this (b0, b1, head), such that [key - query] is the bias of a pair: from -(num_queries - 1) to
// num_keys - 1. The host sets p.bias and the strides -1 and 1 accordingly, so that readers of a dense bias work too.
__device__ __forceinline__ const float* bias_diagonals(const Problem& p, const TileIndex& index) {
  return static_cast<const float*>(p.bias) + index.b0 * p.bias_b0 + index.b1 * p.bias_b1 + index.head * p.bias_head;
}

// kCount pairs of neighbouring diagonals, 8 apart; in the base of the logits.
template <int kCount>
struct DiagonalWindow {
  float values[kCount][2];

  // first: key - query of values[0][0]. Beyond the last query or key 0: those pairs are hidden, or not stored.
  __device__ __forceinline__ void load(const Problem& p, const float* diagonals, int first) {
    const int begin = 1 - p.num_queries, end = p.num_keys;
    if (first >= begin && first + 8 * kCount - 6 <= end) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        values[i][0] = diagonals[first + 8 * i] * kLog2e;
        values[i][1] = diagonals[first + 8 * i + 1] * kLog2e;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int at = first + 8 * i + c;
          values[i][c] = at >= begin && at < end ? diagonals[at] * kLog2e : 0.0f;
        }
      }
    }
  }
};

}  // namespace fcsa
