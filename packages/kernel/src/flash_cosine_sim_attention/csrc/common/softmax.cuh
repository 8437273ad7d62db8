// The softmax of one warp's rows, in base 2: P_ij = exp2(x_ij - shift_i), with x_ij = s_ij * log2(e).
//
// A row of an mma.m16n8k16 accumulator lies in four neighbouring lanes ("quad"); each thread holds two rows of every
// 16-row tile, `half` 0 (row g) and 1 (row g + 8).
#pragma once

#include <cuda_fp16.h>

#include <type_traits>

#include "reduce.cuh"

namespace fcsa {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

enum class Softmax {
  kBounded,     // |s| <= B is known before the launch: one shift serves every row, nothing is ever rescaled
  kRunningMax,  // it is not (learned scale, bias, large scale): the shift follows the row maximum
};

// The shift m for |s| <= bound, natural units (docs/math.md, "Where one shift is exact").
// P in half: exp(s - m) <= e^11 = 59874 uses the top of the format's range, so the smallest P stays normal too.
// P in bfloat16 or float: exp(s - m) in [e^-80, e^60] for every bound up to 70, with room for the sum.
template <class P>
__device__ __forceinline__ float bounded_shift(float bound) {
  return std::is_same_v<P, __half> ? bound - 11.0f : fmaxf(0.0f, bound - 60.0f);
}

// How far above a row's shift its maximum may climb before the accumulators are rescaled, in powers of two. P then
// reaches 2^8, harmless in every format, and after the first tiles of a row the rescaling all but disappears.
constexpr float kRescaleThreshold = 8.0f;

// The state of kTiles * 16 rows, of which this thread sees two a tile. With the running maximum P is 2^kHeadroom where x
// is the maximum that the shift was taken from: P that is split into two halves uses their range.
template <Softmax kSoftmax, int kTiles, int kHeadroom = 0>
struct SoftmaxRows {
  float sum[kTiles][2];    // of this thread's columns only, until finish()
  float shift[kTiles][2];  // base 2; -inf: no visible key so far

  __device__ __forceinline__ void start(float initial_shift) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        sum[m][half] = 0.0f;
        shift[m][half] = kSoftmax == Softmax::kBounded ? initial_shift : -INFINITY;
      }
    }
  }

  // What to subtract: a row that has seen no key yet has nothing but x = -inf, and -inf - 0 gives P = 0.
  __device__ __forceinline__ float subtrahend(int m, int half) const {
    if constexpr (kSoftmax == Softmax::kBounded) return shift[m][half];
    return shift[m][half] == -INFINITY ? 0.0f : shift[m][half];
  }

  // Takes the maxima over new columns (already of the whole row); true where some row of the warp has to be rescaled,
  // with the factors of all rows in `factor`.
  __device__ __forceinline__ bool raise(const float (&maximum)[kTiles][2], float (&factor)[kTiles][2]) {
    bool any = false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) any |= maximum[m][half] > shift[m][half] + (kHeadroom + kRescaleThreshold);
    }
    if (!__any_sync(0xffffffffu, any)) return false;
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old_shift = shift[m][half], new_shift = maximum[m][half] - kHeadroom;
        const bool raised = new_shift > old_shift;
        factor[m][half] = raised ? exp2f(old_shift - new_shift) : 1.0f;
        shift[m][half] = raised ? new_shift : old_shift;
        sum[m][half] *= factor[m][half];
      }
    }
    return true;
  }

  // Sums over the quad; returns through the references what the epilogue needs.
  __device__ __forceinline__ void finish(int m, int half, float& reciprocal_sum, float& lse) const {
    const float total = lane_sum<4>(sum[m][half]);
    reciprocal_sum = total == 0.0f ? 0.0f : 1.0f / total;
    lse = total == 0.0f ? -INFINITY : shift[m][half] * kLn2 + logf(total);
  }
};

}  // namespace fcsa
