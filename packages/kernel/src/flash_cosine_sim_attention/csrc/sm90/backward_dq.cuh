// The accumulator of dq in device memory, and the kernel that makes dq of it.
//
// It consists of units of 64 queries x 64 columns, each laid out as a warpgroup holds it: float4 number i * 128 + t is what
// thread t holds of columns 8 i .. 8 i + 7 (wgmma.cuh), so that a unit goes there by one bulk addition, and into shared
// memory without bank conflicts. Units of the same queries stand side by side.
#pragma once

#include "../common/backward_project.cuh"
#include "../common/launch.cuh"
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

// x[j] of lane c of a quad <-> x[c] of lane j.
__device__ __forceinline__ void transpose_quad(float4 (&x)[4]) {
#pragma unroll
  for (int bit = 1; bit < 4; bit *= 2) {
    const bool upper = (threadIdx.x & bit) != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (j & bit) continue;
      float4 sent = upper ? x[j] : x[j | bit];
      sent.x = __shfl_xor_sync(0xffffffffu, sent.x, bit);
      sent.y = __shfl_xor_sync(0xffffffffu, sent.y, bit);
      sent.z = __shfl_xor_sync(0xffffffffu, sent.z, bit);
      sent.w = __shfl_xor_sync(0xffffffffu, sent.w, bit);
      if (upper) {
        x[j] = sent;
      } else {
        x[j | bit] = sent;
      }
    }
  }
}

// One group or no norm: a thread takes two rows of the accumulator as they lie, trades with its quad until it holds eight
// neighbouring columns at a time, and projects them in registers. What does not depend on the main kernel is loaded before its end.
template <class Traits>
__global__ void __launch_bounds__(128) backward_dq_kernel(const __grid_constant__ BackwardParams p) {
  using Element = typename Traits::Element;
  constexpr int kParts = Traits::kHeadDim / 32;  // a thread has columns 32 part + 8 (lane % 4) ... + 7 of each
  const TileIndex head = dq_block(p);
  const int query = head.tile * kSquare, lane = threadIdx.x % 32;
  const int row0 = threadIdx.x / 32 * 16 + lane / 4, column0 = lane % 4 * 8;
  const auto rows = backward::projected_queries<Traits>(p, head, query, min(kSquare, p.num_queries - query));
  uint4 raw[2][kParts];
  float rnorm[2] = {1.0f, 1.0f};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + 8 * half;
    const Element* x = static_cast<const Element*>(rows.x) + row * rows.x_stride + column0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      raw[half][part] = make_uint4(0, 0, 0, 0);
      if (row < rows.num_rows && part * 32 + column0 < p.head_dim) {
        raw[half][part] = *reinterpret_cast<const uint4*>(x + part * 32);
      }
    }
    if (row < rows.num_rows && rows.rnorm != nullptr) rnorm[half] = rows.rnorm[row];
  }
  wait_for_prologue();

  const float4* units = reinterpret_cast<const float4*>(dq_units<Traits>(p, head, query));
  float4 acc[kParts][4];
#pragma unroll
  for (int i = 0; i < kParts * 4; ++i) {
    acc[i / 4][i % 4] = units[i / (kSquare / 8) * (kUnitFloats / 4) + i % (kSquare / 8) * 128 + threadIdx.x];
  }
#pragma unroll
  for (int part = 0; part < kParts; ++part) transpose_quad(acc[part]);

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = row0 + 8 * half;
    float a[kParts][8], x[kParts][8], product = 0.0f;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      load8(x[part], reinterpret_cast<const Element*>(&raw[half][part]));
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float4& pair = acc[part][c / 2];
        a[part][c] = half == 0 ? (c % 2 == 0 ? pair.x : pair.y) : (c % 2 == 0 ? pair.z : pair.w);
        product += a[part][c] * (x[part][c] *= rnorm[half]);
      }
    }
    const float dot = lane_sum<4>(product), factor = backward::row_factor(rows, rnorm[half]);
    if (row >= rows.num_rows) continue;
    if (rows.dscale_rows != nullptr && lane % 4 == 0) {
      rows.dscale_rows[row] = backward::row_dscale(rows, rnorm[half], dot);
    }
    if (rows.target == nullptr) continue;
    Element* target = static_cast<Element*>(rows.target) + row * rows.target_stride + column0;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (part * 32 + column0 >= p.head_dim) continue;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        if (rows.rnorm != nullptr) a[part][c] = factor * (a[part][c] - dot * x[part][c]);
        a[part][c] *= rows.scale;
      }
      store8(target + part * 32, a[part]);
    }
  }
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
