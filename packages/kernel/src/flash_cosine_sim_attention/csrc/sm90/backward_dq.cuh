// The accumulator of dq in device memory, and the kernel that makes dq of it.
//
// It consists of units of 64 queries x 64 columns, each laid out as a warpgroup holds it: float4 number i * 128 + t is what
// thread t holds of columns 8 i .. 8 i + 7 (wgmma.cuh), so that a unit goes there by one bulk addition, and into shared
// memory without bank conflicts. Units of the same queries stand side by side.
#pragma once

#include "../common/backward_project.cuh"
#include "../common/launch.cuh"
#include "backward_rows.cuh"
#include "backward_traits.cuh"
#include "ptx.cuh"

namespace fcsa::sm90 {

constexpr int kUnitFloats = kSquare * kSquare;

// Unit 0 of the queries from `query` (a multiple of 64) on.
template <class Traits>
__device__ __forceinline__ float* dq_units(const BackwardParams& p, const TileIndex& head, int query) {
  const int64_t row = head.first_row(p.b1, p.heads, padded_queries(p.num_queries)) + query;
  return p.dq_accum + row * Traits::kHeadDim;
}

// A warpgroup's accumulators into a unit in shared memory.
__device__ __forceinline__ void store_unit(float* unit, const float (&dq)[kSquare / 2], int thread) {
#pragma unroll
  for (int i = 0; i < kSquare / 8; ++i) {
    reinterpret_cast<float4*>(unit)[i * 128 + thread] =
        make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
  }
}

// A block of threads makes dq of 64 queries of a head.
__device__ __forceinline__ TileIndex dq_block(const BackwardParams& p) {
  return TileIndex::from_block(blockIdx.x, ceil_div(p.num_queries, kSquare), p.heads, p.b1);
}

// One group or no norm. What does not depend on the main kernel is loaded before its end.
template <class Traits>
__global__ void __launch_bounds__(128) backward_dq_kernel(const __grid_constant__ BackwardParams p) {
  const TileIndex head = dq_block(p);
  const int query = head.tile * kSquare;
  const auto rows = backward::projected_queries<Traits>(p, head, query, min(kSquare, p.num_queries - query));
  RowPair<Traits> pair(rows, 0, threadIdx.x);
  pair.load(rows);
  wait_for_prologue();
  const float4* units = reinterpret_cast<const float4*>(dq_units<Traits>(p, head, query));
  RowAccumulators<Traits> acc;
#pragma unroll
  for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
    const float4 x = units[i / (kSquare / 8) * (kUnitFloats / 4) + i % (kSquare / 8) * 128 + threadIdx.x];
    acc[4 * i] = x.x, acc[4 * i + 1] = x.y, acc[4 * i + 2] = x.z, acc[4 * i + 3] = x.w;
  }
  project_and_write_rows<Traits>(acc, pair, rows);
}

// Several groups, which may begin and end anywhere: through shared memory.
template <class Traits>
__global__ void __launch_bounds__(128) backward_grouped_dq_kernel(const __grid_constant__ BackwardParams p) {
  constexpr int kStride = Traits::kHeadDim + 8;
  __shared__ __align__(16) float tile[kSquare * kStride];
  const TileIndex head = dq_block(p);
  const int query = head.tile * kSquare, lane = threadIdx.x % 32;
  const float* units = dq_units<Traits>(p, head, query);
  wait_for_prologue();
#pragma unroll
  for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
    const float* unit = units + i / (kSquare / 8) * kUnitFloats;
    const float4 x = reinterpret_cast<const float4*>(unit)[i % (kSquare / 8) * 128 + threadIdx.x];
    float* target = tile + (threadIdx.x / 32 * 16 + lane / 4) * kStride + i * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(target) = make_float2(x.x, x.y);
    *reinterpret_cast<float2*>(target + 8 * kStride) = make_float2(x.z, x.w);
  }
  __syncthreads();
  const auto rows = backward::projected_queries<Traits>(p, head, query, min(kSquare, p.num_queries - query));
  backward::project_rows<typename Traits::Element, Traits::kHeadDim, kSquare, backward::BlockTeam<128>>(tile, kStride,
                                                                                                      rows);
}

}  // namespace fcsa::sm90
