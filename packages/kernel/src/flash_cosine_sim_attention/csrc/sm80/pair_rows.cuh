// Pair bias: short rows of a small head dim that share one bias (triangle attention over a pair representation). Blocks
// of threads hold all keys of a row; the bias comes repacked, once a call, in the order of the threads' accumulators.
#pragma once

#include "../common/launch.cuh"
#include "../norm/l2norm_forward.cuh"
#include "packed_bias.cuh"
#include "tile_copy.cuh"
#include "tile_reader.cuh"

namespace fcsa::sm80 {

// For a kernel whose need of shared memory depends on the call: as much as the device has.
template <auto kKernel>
cudaError_t allow_all_shared_memory(int bytes) {
  if (bytes <= 48 * 1024) return cudaSuccess;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  return bytes > limit ? cudaErrorInvalidValue : allow_shared_memory<kKernel>(limit);
}

}  // namespace fcsa::sm80

namespace fcsa::sm80::pair {

constexpr int kHeadDim = 32;
constexpr int kMaxKeys = 512, kMaxBackwardKeys = 384;
constexpr int kWarpQueries = 32, kChunkKeys = 16;  // of a fragment of the packed bias

using Unit = __half;  // of unit vectors: eleven bits, so that q and k lose nothing that bf16 or P would show
template <class Operand>
using Tile = SmemTile<Operand, kMaxKeys, kHeadDim>;  // as many of its rows as there are keys

// Batch rows (b0, b1), cut into `inner` rows that share a bias and `outer` ones that do not.
struct Rows {
  int outer, inner;
  int b0_step, b1_step;  // (b0, b1) of (o, i): see at()
  bool inner_is_both, inner_is_b1;
  int b1;

  __device__ __forceinline__ TileIndex at(int o, int i, int head, int tile) const {
    if (inner_is_both) return {tile, head, i % b1, i / b1};
    return inner_is_b1 ? TileIndex{tile, head, i, o} : TileIndex{tile, head, o, i};
  }
};

inline Rows rows_of(const Problem& p) {
  const bool shared0 = p.bias_b0 == 0, shared1 = p.bias_b1 == 0;
  Rows rows = {};
  rows.b1 = p.b1;
  rows.inner_is_both = shared0 && shared1;
  rows.inner_is_b1 = !shared0 || p.b1 > 1;
  if (!rows.inner_is_both) rows.inner_is_b1 = shared1;
  rows.inner = rows.inner_is_both ? p.b0 * p.b1 : rows.inner_is_b1 ? p.b1 : p.b0;
  rows.outer = rows.inner_is_both ? 1 : rows.inner_is_b1 ? p.b0 : p.b1;
  return rows;
}

// Queries times scale * log2(e) have to stay in the range of half: keys take over a power of two of a very large scale.
struct ScaleFactors {
  float query, key;
  __device__ __forceinline__ explicit ScaleFactors(float scale) {
    const float factor = scale * kLog2e;
    key = fabsf(factor) > 8192.0f ? 8192.0f : 1.0f;
    query = factor / key;
  }
};

// 16 bytes of every kStep-th row, four threads a row: all loads are under way before the first is looked at. Rows that do
// not exist are zero.
template <int kCount, class Element>
struct RowChunks {
  uint4 raw[kCount];

  __device__ __forceinline__ void load(const Element* source, int64_t stride, int first, int step, int rows, int column,
                                       int head_dim) {
    const int end = column < head_dim ? rows : 0;
    const Element* chunk = source + first * stride + column;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {  // loads with a predicate, no branches
      raw[i] = make_uint4(0, 0, 0, 0);
      if (first + i * step < end) raw[i] = *reinterpret_cast<const uint4*>(chunk);
      chunk += step * stride;
    }
  }

  __device__ __forceinline__ void hide(int i, bool visible) {  // NaN and all
    if (!visible) raw[i] = make_uint4(0, 0, 0, 0);
  }

  __device__ __forceinline__ void get(float (&x)[8], int i) const {
    load8(x, reinterpret_cast<const Element*>(&raw[i]));
  }
};

__device__ __forceinline__ float largest_of(const float (&x)[8], float largest) {
#pragma unroll
  for (int c = 0; c < 8; ++c) largest = fmaxf(largest, fabsf(x[c]));
  return largest;
}

// A row of q or k, eight columns of it in each of four lanes, as a unit vector times `factor`; -> 1 / its norm.
__device__ __forceinline__ float store_unit(Unit* chunk, float (&x)[8], bool l2norm, float factor) {
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < 8; ++c) squares += x[c] * x[c];
  squares = lane_sum<4>(squares);
  const float rnorm = l2norm ? fminf(rsqrtf(squares), 1e12f) : 1.0f;  // 1 / max(|x|, 1e-12) up to 2^-22
#pragma unroll
  for (int c = 0; c < 8; ++c) x[c] *= rnorm * factor;
  store8(chunk, x);
  return rnorm;
}

__device__ __forceinline__ float store_unit(Tile<Unit>& tile, int row, int column, float (&x)[8], bool l2norm,
                                            float factor) {
  return store_unit(tile.data + Tile<Unit>::chunk_offset(row, column / 8), x, l2norm, factor);
}

}  // namespace fcsa::sm80::pair
