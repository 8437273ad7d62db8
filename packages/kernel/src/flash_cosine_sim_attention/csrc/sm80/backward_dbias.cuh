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

// The walk of a block of threads over all (b0, b1, head, query block, key block) that share its tile; what the causal
// mask hides is left out.
template <class Traits>
struct DbiasWalk {
  using Block = ScoreBlock<Traits>;
  Range key_blocks, q_blocks, heads, b1, b0;
  TileIndex head;  // tile: query block
  int key_block;

  __device__ __forceinline__ DbiasWalk(const BackwardParams& p, uint32_t block)
      : key_blocks(Range::take(block, ceil_div(p.num_keys, Block::kKeys), p.dbias_key == 0)),
        q_blocks(Range::take(block, ceil_div(p.num_queries, Block::kQueries), p.dbias_query == 0)),
        heads(Range::take(block, p.heads, p.dbias_head == 0)),
        b1(Range::take(block, p.b1, p.dbias_b1 == 0)),
        b0(Range::take(block, p.b0, p.dbias_b0 == 0)),
        head{q_blocks.first, heads.first, b1.first, b0.first},
        key_block(key_blocks.first - 1) {}

  __device__ __forceinline__ int query0() const { return head.tile * Block::kQueries; }
  __device__ __forceinline__ int key0() const { return key_block * Block::kKeys; }

  // To the first tile, then to the next; false where there is none.
  __device__ __forceinline__ bool advance(const BackwardParams& p) {
    while (++key_block >= min(key_blocks.end, Block::num_key_blocks(p, query0()))) {
      key_block = key_blocks.first - 1;
      if (++head.tile < q_blocks.end) continue;
      head.tile = q_blocks.first;
      if (++head.head < heads.end) continue;
      head.head = heads.first;
      if (++head.b1 < b1.end) continue;
      head.b1 = b1.first;
      if (++head.b0 >= b0.end) return false;
    }
    return true;
  }
};

template <class Traits>
struct DbiasStorage {
  using Block = ScoreBlock<Traits>;
  using Smem = typename Block::Smem;
  static constexpr int kStages = 2 * sizeof(Smem) <= kSmallSharedMemory ? 2 : 1;
  static constexpr int kStride = Block::kKeys + 2;
  union {
    Smem stage[kStages];
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

template <class Traits>
__device__ __forceinline__ void load_tile(typename ScoreBlock<Traits>::Smem& smem, const BackwardParams& p,
                                          const DbiasWalk<Traits>& walk) {
  ScoreBlock<Traits>::load_queries(smem, p, walk.head, walk.query0());
  ScoreBlock<Traits>::load_keys(smem, p, kv_head_of(p, walk.head), walk.key0());
}

// bias * log2(e) of the tile that `walk` starts with: the same for all that share it.
template <class Traits>
__device__ __forceinline__ void load_bias(float (&bias)[2][ScoreBlock<Traits>::kN][2], const BackwardParams& p,
                                          const DbiasWalk<Traits>& start) {
  using Block = ScoreBlock<Traits>;
  const BiasReader<Traits> reader(p, start.head);
  const int query0 = start.query0(), key0 = start.key_blocks.first * Block::kKeys;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int n = 0; n < Block::kN; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        bias[half][n][c] = reader(query0 + Block::row_of(half), key0 + Block::column_of(n, c));
      }
    }
  }
}

// dS of one tile, without any factor, added to `sum`.
template <class Traits>
__device__ __forceinline__ void add_tile(float (&sum)[1][ScoreBlock<Traits>::kN][4],
                                         const float (&bias)[2][ScoreBlock<Traits>::kN][2],
                                         const typename ScoreBlock<Traits>::Smem& smem, const BackwardParams& p,
                                         const TileIndex& head, int query0, int key0) {
  using Block = ScoreBlock<Traits>;
  float ds[1][Block::kN][4];
  Block::compute_ds(ds, smem, p, query0, key0, [&](int half, int n, int c) { return bias[half][n][c]; });
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float gradient = query_row(smem.query_rows, Block::row_of(half)).gradient;
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
  using Storage = DbiasStorage<Traits>;
  Storage& storage = *reinterpret_cast<Storage*>(shared_memory);
  const DbiasWalk<Traits> start(p, blockIdx.x);
  DbiasWalk<Traits> next = start;
  float sum[1][Block::kN][4], bias[2][Block::kN][2];
  set_zero(sum);
  load_bias<Traits>(bias, p, start);

  bool has_next = next.advance(p);
  if (has_next) load_tile<Traits>(storage.stage[0], p, next);
  ptx::cp_async_commit();
  for (int stage = 0; has_next; stage = (stage + 1) % Storage::kStages) {
    const TileIndex head = next.head;
    const int query0 = next.query0(), key0 = next.key0();
    has_next = next.advance(p);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there; nobody reads the one before
    if (Storage::kStages == 2 && has_next) load_tile<Traits>(storage.stage[1 - stage], p, next);
    add_tile<Traits>(sum, bias, storage.stage[stage], p, head, query0, key0);
    if constexpr (Storage::kStages == 1) {
      __syncthreads();  // nobody reads this tile any more
      if (has_next) load_tile<Traits>(storage.stage[0], p, next);
    }
    ptx::cp_async_commit();
  }

  __syncthreads();
  const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < Block::kN; ++n) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      storage.tile[(row0 + r / 2 * 8) * Storage::kStride + 8 * n + lane % 4 * 2 + r % 2] = sum[0][n][r];
    }
  }
  __syncthreads();
  const int query0 = start.q_blocks.first * Block::kQueries, key0 = start.key_blocks.first * Block::kKeys;
  const int64_t offset = start.b0.first * p.dbias_b0 + start.b1.first * p.dbias_b1 +
                         start.heads.first * p.dbias_head + query0 * p.dbias_query + key0 * p.dbias_key;
  write_tile<Traits>(storage.tile, p, offset, min(Block::kQueries, p.num_queries - query0),
                     min(Block::kKeys, p.num_keys - key0));
}

}  // namespace fcsa::sm80
