// float32: dout as halves, by the largest value of all queries that one kv head meets, so that dk and dv sum over them
// without a change of scale.
#pragma once

#include "backward_preprocess.cuh"

namespace fcsa::backward {

constexpr int kSplitThreads = 256;
constexpr int kSplitRows = 64;  // of a block

// p.dout_largest = max |dout|, max |dlse| of each kv head; zero before.
template <int kThreads>  // a template, so that every translation unit may hold it
__global__ void __launch_bounds__(kThreads) dout_largest_kernel(const __grid_constant__ BackwardParams p) {
  const TileIndex index = TileIndex::from_block(blockIdx.x, ceil_div(p.num_queries, kSplitRows), p.heads, p.b1);
  const float* dout = static_cast<const float*>(p.dout) + index.offset(p.dout_strides);
  const int chunks = p.head_dim / 8;
  float largest = 0.0f, largest_dlse = 0.0f;
  for (int i = threadIdx.x; i < kSplitRows * chunks; i += kThreads) {
    const int64_t row = index.tile * kSplitRows + i / chunks;
    if (row >= p.num_queries) break;
    float x[8];
    load8(x, dout + row * p.dout_strides.row + i % chunks * 8);
#pragma unroll
    for (int c = 0; c < 8; ++c) largest = fmaxf(largest, fabsf(x[c]));
    if (p.dlse != nullptr) {
      largest_dlse = fmaxf(largest_dlse, fabsf(p.dlse[index.first_row(p.b1, p.heads, p.num_queries) + row]));
    }
  }
  largest = lane_max<32>(largest), largest_dlse = lane_max<32>(largest_dlse);
  if (threadIdx.x % 32 != 0) return;
  // Floats that are not negative are ordered like their bits.
  int* target = reinterpret_cast<int*>(p.dout_largest) + kv_head_of(p, index).first_row(p.b1, p.kv_heads, 1);
  atomicMax(target, __float_as_int(largest));
  atomicMax(target + static_cast<int64_t>(p.b0) * p.b1 * p.kv_heads, __float_as_int(largest_dlse));
}

template <class Traits>
__global__ void __launch_bounds__(kSplitThreads) split_dout_kernel(const __grid_constant__ BackwardParams p) {
  const TileIndex index = TileIndex::from_block(blockIdx.x, ceil_div(p.num_queries, kSplitRows), p.heads, p.b1);
  const float* dout = static_cast<const float*>(p.dout) + index.offset(p.dout_strides);
  const float scale = scales_of<Traits>(p, kv_head_of(p, index)).dout;
  const int64_t first_row = index.first_row(p.b1, p.heads, p.num_queries);
  const int chunks = p.head_dim / 8;
  for (int i = threadIdx.x; i < kSplitRows * chunks; i += kSplitThreads) {
    const int64_t row = index.tile * kSplitRows + i / chunks;
    const int column = i % chunks * 8;
    if (row >= p.num_queries) return;
    float x[8];
    load8(x, dout + row * p.dout_strides.row + column);
#pragma unroll
    for (int c = 0; c < 8; ++c) x[c] *= scale;
    __half* target = static_cast<__half*>(p.dout_split) + (first_row + row) * Traits::kPlanes * p.head_dim;
    if constexpr (Traits::kPlanes == 2) {
      store_split8(target, column, p.head_dim, x);
    } else {
      store8(target + column, x);
    }
  }
}

template <class Traits>
cudaError_t launch_split_dout(const BackwardParams& p, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(ceil_div(p.num_queries, kSplitRows)) * p.heads * p.b1 * p.b0;
  const int64_t maxima = 2 * static_cast<int64_t>(p.b0) * p.b1 * p.kv_heads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (cudaError_t error = cudaMemsetAsync(p.dout_largest, 0, maxima * sizeof(float), stream); error != cudaSuccess)
    return error;
  if (blocks == 0) return cudaSuccess;
  dout_largest_kernel<kSplitThreads><<<static_cast<uint32_t>(blocks), kSplitThreads, 0, stream>>>(p);
  split_dout_kernel<Traits><<<static_cast<uint32_t>(blocks), kSplitThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fcsa::backward
