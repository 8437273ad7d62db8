// The gradient of the bias: one block of threads owns a tile of it and walks over everything that shares the tile
// (batch dims, heads, and blocks of queries or keys along which the bias is broadcast). dS is summed in registers in a
// fixed order and stored once: no atomics, bit-equal results.
#pragma once

#include "backward_scores.cuh"

namespace fcsa::sm80 {

// A dim that the bias has is one index of the grid; a dim that it is summed over is a range to walk.
struct Range {
  int first, end;

  static __device__ __forceinline__ Range take(uint32_t& block, int size, bool is_summed) {
    if (is_summed) return {0, size};
    const int own = block % size;
    block /= size;
    return {own, own + 1};
  }
};

template <class Traits>
struct DbiasStorage {
  using Block = ScoreBlock<Traits>;
  static constexpr int kStride = Block::kKeys + 2;
  union {
    typename Block::Smem loop;
    float tile[Block::kQueries * kStride];
  };
};

template <class Traits>
__host__ int64_t dbias_blocks(const BackwardParams& p) {
  using Block = ScoreBlock<Traits>;
  int64_t blocks = 1;
  if (p.dbias_key != 0) blocks *= ceil_div(p.num_keys, Block::kKeys);
  if (p.dbias_query != 0) blocks *= ceil_div(p.num_queries, Block::kQueries);
  if (p.dbias_head != 0) blocks *= p.heads;
  if (p.dbias_b1 != 0) blocks *= p.b1;
  if (p.dbias_b0 != 0) blocks *= p.b0;
  return blocks;
}

// dS of one tile, without any factor, added to `sum`.
template <class Traits>
__device__ __forceinline__ void add_tile(float (&sum)[1][ScoreBlock<Traits>::kN][4],
                                         typename ScoreBlock<Traits>::Smem& smem, const BackwardParams& p,
                                         const TileIndex& head, int query0, int key0) {
  using Block = ScoreBlock<Traits>;
  __syncthreads();  // nobody reads the tiles of the step before
  Block::load_queries(smem, p, head, query0);
  Block::load_keys(smem, p, kv_head_of(p, head), key0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  float ds[1][Block::kN][4];
  Block::compute_ds(ds, smem, p, head, query0, key0);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = threadIdx.x / 32 * 16 + 8 * half + threadIdx.x % 32 / 4;
    const float gradient = query_row(smem.query_rows, row).gradient;
    float factor = gradient != 0.0f ? 1.0f / gradient : 0.0f;
    if constexpr (Traits::kFloat) {
      factor = 1.0f / scales_of<Traits>(p, kv_head_of(p, head)).ds / row_scale(p, head.head);
    }
#pragma unroll
    for (int n = 0; n < Block::kN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) sum[0][n][2 * half + c] += ds[0][n][2 * half + c] * factor;
    }
  }
}

// The tile out of shared memory, summed over its rows and columns where the bias is broadcast along them.
template <class Traits>
__device__ __forceinline__ void write_tile(const float* tile, const BackwardParams& p, int64_t offset, int num_rows,
                                           int num_columns) {
  constexpr int kStride = DbiasStorage<Traits>::kStride;
  const int rows = p.dbias_query == 0 ? 1 : num_rows, row_span = p.dbias_query == 0 ? num_rows : 1;
  const int columns = p.dbias_key == 0 ? 1 : num_columns, column_span = p.dbias_key == 0 ? num_columns : 1;
  for (int i = threadIdx.x; i < rows * columns; i += ScoreBlock<Traits>::kThreads) {
    const int row = i / columns, column = i % columns;
    float sum = 0.0f;
    for (int r = row; r < row + row_span; ++r) {
      for (int c = column; c < column + column_span; ++c) sum += tile[r * kStride + c];
    }
    const int64_t target = offset + row * p.dbias_query + column * p.dbias_key;
    if (p.bias_is_float32) {
      static_cast<float*>(p.dbias)[target] = sum;
    } else {
      static_cast<typename Traits::Element*>(p.dbias)[target] = from_float<typename Traits::Element>(sum);
    }
  }
}

template <class Traits>
__global__ void __launch_bounds__(ScoreBlock<Traits>::kThreads)
    backward_dbias_kernel(const __grid_constant__ BackwardParams p) {
  using Block = ScoreBlock<Traits>;
  extern __shared__ __align__(128) char shared_memory[];
  DbiasStorage<Traits>& storage = *reinterpret_cast<DbiasStorage<Traits>*>(shared_memory);
  uint32_t block = blockIdx.x;
  const Range key_blocks = Range::take(block, ceil_div(p.num_keys, Block::kKeys), p.dbias_key == 0);
  const Range q_blocks = Range::take(block, ceil_div(p.num_queries, Block::kQueries), p.dbias_query == 0);
  const Range heads = Range::take(block, p.heads, p.dbias_head == 0);
  const Range b1 = Range::take(block, p.b1, p.dbias_b1 == 0), b0 = Range::take(block, p.b0, p.dbias_b0 == 0);

  float sum[1][Block::kN][4];
  set_zero(sum);
  TileIndex head;
  for (head.b0 = b0.first; head.b0 < b0.end; ++head.b0) {
    for (head.b1 = b1.first; head.b1 < b1.end; ++head.b1) {
      for (head.head = heads.first; head.head < heads.end; ++head.head) {
        for (head.tile = q_blocks.first; head.tile < q_blocks.end; ++head.tile) {
          const int query0 = head.tile * Block::kQueries;
          const int end = min(key_blocks.end, Block::num_key_blocks(p, query0));
#pragma unroll 1
          for (int key_block = key_blocks.first; key_block < end; ++key_block) {
            add_tile<Traits>(sum, storage.loop, p, head, query0, key_block * Block::kKeys);
          }
        }
      }
    }
  }

  __syncthreads();
  const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < Block::kN; ++n) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      storage.tile[(row0 + r / 2 * 8) * DbiasStorage<Traits>::kStride + 8 * n + lane % 4 * 2 + r % 2] = sum[0][n][r];
    }
  }
  __syncthreads();
  const int query0 = q_blocks.first * Block::kQueries, key0 = key_blocks.first * Block::kKeys;
  const int64_t offset = b0.first * p.dbias_b0 + b1.first * p.dbias_b1 + heads.first * p.dbias_head +
                         query0 * p.dbias_query + key0 * p.dbias_key;
  write_tile<Traits>(storage.tile, p, offset, min(Block::kQueries, p.num_queries - query0),
                     min(Block::kKeys, p.num_keys - key0));
}

}  // namespace fcsa::sm80
