// The l2 norm over each of `groups` contiguous chunks of the head dim:
//
//   rnorm = 1 / max(|x|_group, 1e-12)        unit = x * rnorm
//
// as torch.nn.functional.normalize in float32. One launch reads x once and writes the factors, the unit vectors, or both.
// Prologue of the fused kernels, and the whole of l2norm_tensors.
#pragma once

#include "../common/launch.cuh"
#include "../common/reduce.cuh"
#include "../common/tile_index.cuh"
#include "../common/vectorized.cuh"
#include "split.cuh"

namespace fcsa {

struct L2NormParams {
  const void* x;  // (b0, b1, heads, rows, d)
  Strides x_strides;
  int32_t b0, b1, heads, rows, head_dim, groups;
  float* rnorm;  // (b0, b1, heads, rows, groups) contiguous, or nullptr
  void* unit;    // (b0, b1, heads, rows, d) contiguous, or nullptr; with SplitHalf (..., 2 d) halves, times kUnitScale
  bool exact = false;     // one group: unit is x times the power of two in rnorm instead, without rounding (see below)
  bool normalize = true;  // false: x is of unit norm already and goes into the copy as it is; rnorm is not written
  uint32_t* cleared = nullptr;  // one word that the launch sets to 0
};

inline L2NormParams q_norm_params(const Problem& p, float* rnorm, void* unit) {
  return {p.q, p.q_strides, p.b0, p.b1, p.heads, p.num_queries, p.head_dim, p.groups, rnorm, unit};
}

inline L2NormParams k_norm_params(const Problem& p, float* rnorm, void* unit) {
  return {p.k, p.k_strides, p.b0, p.b1, p.kv_heads, p.num_keys, p.head_dim, p.groups, rnorm, unit};
}

__device__ __forceinline__ float reciprocal_norm(float sum_of_squares) {
  return 1.0f / fmaxf(sqrtf(sum_of_squares), 1e-12f);
}

// rnorm = power_of_two * remainder, with the remainder in [1, 2). A row times the power of two has a length in (1/2, 1] and
// all its bits, which a rounded unit vector has not; the remainder is left to be multiplied as a float.
__device__ __forceinline__ float power_of_two(float rnorm) { return __uint_as_float(__float_as_uint(rnorm) & 0x7f800000u); }
__device__ __forceinline__ float remainder_of(float rnorm) {
  return __uint_as_float((__float_as_uint(rnorm) & 0x007fffffu) | 0x3f800000u);
}

namespace norm {

constexpr int kThreads = 128;
constexpr int kRowsPerThread = 4;  // four 16-byte loads in flight a thread keep device memory busy

// One row lies in kLanesPerRow lanes, eight columns each.
template <int kLanesPerRow>
constexpr int kRowsPerBlock = kThreads / kLanesPerRow * kRowsPerThread;

// The factors of this lane's eight columns where chunks may begin and end anywhere: through shared memory, in a fixed
// order of summation. squares: one row of kLanesPerRow * 8 floats; only the lanes of that row touch it.
template <int kLanesPerRow>
__device__ __forceinline__ void grouped_rnorm(float (&factor)[8], const float (&x)[8], float* squares, float* rnorm,
                                              int head_dim, int groups, int lane_in_row) {
  const int chunk = head_dim / groups;
#pragma unroll
  for (int c = 0; c < 8; ++c) squares[lane_in_row * 8 + c] = x[c] * x[c];
  __syncwarp();
  float sums[8];  // at most kLanesPerRow * 8 groups
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const int group = step * kLanesPerRow + lane_in_row;
    sums[step] = 0.0f;
    if (group < groups) {
      for (int c = 0; c < chunk; ++c) sums[step] += squares[group * chunk + c];
    }
  }
  __syncwarp();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const int group = step * kLanesPerRow + lane_in_row;
    if (group < groups) {
      squares[group] = reciprocal_norm(sums[step]);
      if (rnorm != nullptr) rnorm[group] = squares[group];
    }
  }
  __syncwarp();
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const int column = lane_in_row * 8 + c;
    factor[c] = column < head_dim ? squares[column / chunk] : 0.0f;
  }
  __syncwarp();
}

template <class Element, class Unit, int kLanesPerRow>
__global__ void __launch_bounds__(kThreads) l2norm_forward_kernel(const L2NormParams p) {
  __shared__ float squares[kThreads * 8];
  let_next_kernel_start();
  constexpr int kRowsPerStep = kThreads / kLanesPerRow;
  const int num_tiles = ceil_div(p.rows, kRowsPerBlock<kLanesPerRow>);
  const TileIndex index = TileIndex::from_block(blockIdx.x, num_tiles, p.heads, p.b1);
  const int lane_in_row = threadIdx.x % kLanesPerRow, row_in_step = threadIdx.x / kLanesPerRow;
  const bool in_row = lane_in_row * 8 < p.head_dim;
  if (p.cleared != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.cleared = 0;
  const Element* x = static_cast<const Element*>(p.x) + index.offset(p.x_strides) + lane_in_row * 8;
  const int64_t first_row = index.first_row(p.b1, p.heads, p.rows);
  const int row0 = index.tile * kRowsPerBlock<kLanesPerRow> + row_in_step;

  float values[kRowsPerThread][8];
#pragma unroll
  for (int step = 0; step < kRowsPerThread; ++step) {
    const int row = row0 + step * kRowsPerStep;
#pragma unroll
    for (int c = 0; c < 8; ++c) values[step][c] = 0.0f;
    if (in_row && row < p.rows) load8(values[step], x + row * p.x_strides.row);
  }

#pragma unroll
  for (int step = 0; step < kRowsPerThread; ++step) {
    const int row = row0 + step * kRowsPerStep;
    const bool valid = row < p.rows;
    float* rnorm = p.rnorm == nullptr || !valid || !p.normalize ? nullptr : p.rnorm + (first_row + row) * p.groups;
    float factor[8];
    if (!p.normalize) {
#pragma unroll
      for (int c = 0; c < 8; ++c) factor[c] = 1.0f;
    } else if (p.groups == 1) {
      float sum = 0.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c) sum += values[step][c] * values[step][c];
      const float row_factor = reciprocal_norm(lane_sum<kLanesPerRow>(sum));
#pragma unroll
      for (int c = 0; c < 8; ++c) factor[c] = p.exact ? power_of_two(row_factor) : row_factor;
      if (rnorm != nullptr && lane_in_row == 0) *rnorm = row_factor;
    } else {
      float* row_squares = squares + row_in_step * kLanesPerRow * 8;
      grouped_rnorm<kLanesPerRow>(factor, values[step], row_squares, rnorm, p.head_dim, p.groups, lane_in_row);
    }
    if (p.unit == nullptr || !in_row || !valid) continue;
#pragma unroll
    for (int c = 0; c < 8; ++c) values[step][c] *= std::is_same_v<Unit, SplitHalf> ? factor[c] * kUnitScale : factor[c];
    if constexpr (std::is_same_v<Unit, SplitHalf>) {
      __half* split_row = static_cast<__half*>(p.unit) + (first_row + row) * 2 * p.head_dim;
      store_split8(split_row, lane_in_row * 8, p.head_dim, values[step]);
    } else {
      store8(static_cast<Unit*>(p.unit) + (first_row + row) * p.head_dim + lane_in_row * 8, values[step]);
    }
  }
}

// The factors alone, of 16-bit rows and one group: what a forward asks for. As few instructions as it takes to keep device
// memory busy: 16 bytes of each of kRows neighbouring rows in flight, and one square root a lane, of the row whose number
// is the lane's.
template <class Element, int kLanesPerRow>
struct FactorRows {
  static constexpr int kRows = kLanesPerRow < 8 ? kLanesPerRow : 8;
  static constexpr int kRowsPerBlock = kThreads / kLanesPerRow * kRows;
};

template <class Element, int kLanesPerRow>
__global__ void __launch_bounds__(kThreads) row_factors_kernel(const L2NormParams p) {
  using Shape = FactorRows<Element, kLanesPerRow>;
  let_next_kernel_start();
  if (p.cleared != nullptr && blockIdx.x == 0 && threadIdx.x == 0) *p.cleared = 0;
  const TileIndex index = TileIndex::from_block(blockIdx.x, ceil_div(p.rows, Shape::kRowsPerBlock), p.heads, p.b1);
  const int lane = threadIdx.x % kLanesPerRow;
  const int row0 = index.tile * Shape::kRowsPerBlock + threadIdx.x / kLanesPerRow * Shape::kRows;
  const Element* x = static_cast<const Element*>(p.x) + index.offset(p.x_strides) + row0 * p.x_strides.row + lane * 8;
  const int num_rows = lane * 8 < p.head_dim ? p.rows - row0 : 0;
  uint4 raw[Shape::kRows];
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
    raw[i] = i < num_rows ? *reinterpret_cast<const uint4*>(x + i * p.x_strides.row) : make_uint4(0, 0, 0, 0);
  }
  float own = 0.0f;
#pragma unroll
  for (int i = 0; i < Shape::kRows; ++i) {
    const uint32_t pairs[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
    float sum = 0.0f;
#pragma unroll
    for (uint32_t pair : pairs) {
      const float2 values = unpack<Element>(pair);
      sum = fmaf(values.x, values.x, fmaf(values.y, values.y, sum));
    }
    sum = lane_sum<kLanesPerRow>(sum);
    own = lane == i ? sum : own;
  }
  if (lane < Shape::kRows && row0 + lane < p.rows) {
    p.rnorm[index.first_row(p.b1, p.heads, p.rows) + row0 + lane] = reciprocal_norm(own);
  }
}

template <class Element, int kLanesPerRow>
cudaError_t launch_row_factors(const L2NormParams& p, cudaStream_t stream) {
  using Shape = FactorRows<Element, kLanesPerRow>;
  const int64_t blocks = static_cast<int64_t>(ceil_div(p.rows, Shape::kRowsPerBlock)) * p.heads * p.b1 * p.b0;
  return launch_blocks<row_factors_kernel<Element, kLanesPerRow>>(p, blocks, kThreads, 0, stream);
}

template <class Element, class Unit, int kLanesPerRow>
cudaError_t launch(const L2NormParams& p, cudaStream_t stream) {
  if constexpr (sizeof(Element) == 2) {
    if (p.unit == nullptr && p.groups == 1 && p.normalize) return launch_row_factors<Element, kLanesPerRow>(p, stream);
  }
  const int64_t blocks =
      static_cast<int64_t>(ceil_div(p.rows, kRowsPerBlock<kLanesPerRow>)) * p.heads * p.b1 * p.b0;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  l2norm_forward_kernel<Element, Unit, kLanesPerRow><<<static_cast<uint32_t>(blocks), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace norm

// head_dim: a multiple of 8 up to kMaxHeadDim. Unit: the type of p.unit, or SplitHalf. A caller whose head dim is known to
// lie close to its kMaxHeadDim compiles one kernel instead of four by naming that.
template <class Element, class Unit = Element, int kMaxHeadDim = 0>
cudaError_t launch_l2norm_forward(const L2NormParams& p, cudaStream_t stream) {
  constexpr int kMax = kMaxHeadDim == 0 ? 256 : kMaxHeadDim;
  static_assert(kMax <= 256);
  if (p.head_dim > kMax || p.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if constexpr (kMaxHeadDim == 0) {
    if (p.head_dim <= 32) return norm::launch<Element, Unit, 4>(p, stream);
    if (p.head_dim <= 64) return norm::launch<Element, Unit, 8>(p, stream);
    if (p.head_dim <= 128) return norm::launch<Element, Unit, 16>(p, stream);
    return norm::launch<Element, Unit, 32>(p, stream);
  }
  constexpr int kLanesPerRow = kMax <= 32 ? 4 : kMax <= 64 ? 8 : kMax <= 128 ? 16 : 32;
  return norm::launch<Element, Unit, kLanesPerRow>(p, stream);
}

}  // namespace fcsa
