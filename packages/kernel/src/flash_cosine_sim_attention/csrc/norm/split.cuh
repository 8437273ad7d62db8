// float32 on the tensor cores: x = hi + lo with two halves, 22 bits, and three products
//
//   x y ~ hi_x hi_y + hi_x lo_y + lo_x hi_y
//
// A split row of d values is [hi (d) | lo (d)], 2 d halves: as many bytes as the row had. Powers of two bring the values
// to where the residuals keep all their bits too: unit vectors are multiplied by kUnitScale, other tensors by what their
// largest value allows, per (b0, b1, head).
#pragma once

#include "../common/reduce.cuh"
#include "../common/tile_index.cuh"
#include "../common/vectorized.cuh"

namespace fcsa {

struct SplitHalf {};  // names this form where a kernel takes the type of a copy as a template argument

// Names float32 tensors whose products may be as coarse as TF32's: hi alone, which has the same 11 bits.
struct Tf32 {};

constexpr float kUnitScale = 1024.0f;

// The power of two that brings a largest magnitude to [2^14, 2^15), below half's 65504 with room for a rounding.
__device__ __forceinline__ float split_scale(float largest) {
  const int exponent = largest > 0.0f && largest < INFINITY ? ilogbf(largest) : 14;
  return exp2f(static_cast<float>(min(14 - exponent, 126)));
}

// One row's columns [column, column + 8), already scaled. row: the split row's first half; head_dim: d.
__device__ __forceinline__ void store_split8(__half* row, int column, int head_dim, const float (&x)[8]) {
  float low[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) low[c] = x[c] - __half2float(__float2half_rn(x[c]));
  store8(row + column, x);
  store8(row + head_dim + column, low);
}

struct SplitParams {
  const float* x;  // (b0, b1, heads, rows, d)
  Strides x_strides;
  int32_t b0, b1, heads, rows, head_dim;
  const uint8_t* mask;  // (b0, b1, rows): rows that are hidden have no say in the scale; nullptr: none
  int64_t mask_b0, mask_b1, mask_row;
  float* largest;  // (b0, b1, heads) contiguous: max |x|
  __half* split;   // (b0, b1, heads, rows, 2 d) contiguous; hi alone: (b0, b1, heads, rows, d)
};

inline SplitParams v_split_params(const Problem& p, float* largest, void* split) {
  return {static_cast<const float*>(p.v),
          p.v_strides,
          p.b0,
          p.b1,
          p.kv_heads,
          p.num_keys,
          p.head_dim,
          p.mask,
          p.mask_b0,
          p.mask_b1,
          p.mask_key,
          largest,
          static_cast<__half*>(split)};
}

namespace norm {

constexpr int kSplitThreads = 256;
constexpr int kSplitRows = 64;  // of a block

template <int kThreads>  // a template, so that every translation unit may hold it
__global__ void __launch_bounds__(kThreads) largest_kernel(const SplitParams p) {
  const TileIndex index = TileIndex::from_block(blockIdx.x, ceil_div(p.rows, kSplitRows), p.heads, p.b1);
  const float* x = p.x + index.offset(p.x_strides);
  const uint8_t* mask = p.mask == nullptr ? nullptr : p.mask + index.b0 * p.mask_b0 + index.b1 * p.mask_b1;
  const int chunks = p.head_dim / 8;
  float largest = 0.0f;
  for (int i = threadIdx.x; i < kSplitRows * chunks; i += kThreads) {
    const int64_t row = index.tile * kSplitRows + i / chunks;
    if (row >= p.rows || (mask != nullptr && mask[row * p.mask_row] == 0)) continue;
    float values[8];
    load8(values, x + row * p.x_strides.row + i % chunks * 8);
#pragma unroll
    for (int c = 0; c < 8; ++c) largest = fmaxf(largest, fabsf(values[c]));
  }
  largest = lane_max<32>(largest);
  // Floats that are not negative are ordered like their bits.
  if (threadIdx.x % 32 == 0) {
    atomicMax(reinterpret_cast<int*>(p.largest) + index.first_row(p.b1, p.heads, 1), __float_as_int(largest));
  }
}

template <int kThreads, bool kHiAlone>
__global__ void __launch_bounds__(kThreads) split_kernel(const SplitParams p) {
  const TileIndex index = TileIndex::from_block(blockIdx.x, ceil_div(p.rows, kSplitRows), p.heads, p.b1);
  const float* x = p.x + index.offset(p.x_strides);
  const float scale = split_scale(p.largest[index.first_row(p.b1, p.heads, 1)]);
  const int64_t first_row = index.first_row(p.b1, p.heads, p.rows);
  const int chunks = p.head_dim / 8;
  for (int i = threadIdx.x; i < kSplitRows * chunks; i += kThreads) {
    const int64_t row = index.tile * kSplitRows + i / chunks;
    const int column = i % chunks * 8;
    if (row >= p.rows) return;
    float values[8];
    load8(values, x + row * p.x_strides.row + column);
#pragma unroll
    for (int c = 0; c < 8; ++c) values[c] *= scale;
    if constexpr (kHiAlone) {
      store8(p.split + (first_row + row) * p.head_dim + column, values);
    } else {
      store_split8(p.split + (first_row + row) * 2 * p.head_dim, column, p.head_dim, values);
    }
  }
}

}  // namespace norm

// Writes `largest` and `split`. The maximum does not depend on the order of the atomics.
template <bool kHiAlone = false>
cudaError_t launch_split(const SplitParams& p, cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(p.b0) * p.b1 * p.heads;
  const int64_t blocks = heads * ceil_div(p.rows, norm::kSplitRows);
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (cudaError_t error = cudaMemsetAsync(p.largest, 0, heads * sizeof(float), stream); error != cudaSuccess)
    return error;
  norm::largest_kernel<norm::kSplitThreads><<<static_cast<uint32_t>(blocks), norm::kSplitThreads, 0, stream>>>(p);
  norm::split_kernel<norm::kSplitThreads, kHiAlone><<<static_cast<uint32_t>(blocks), norm::kSplitThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fcsa
