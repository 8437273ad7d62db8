// The gradient of a bias that depends on key - query alone: dS summed over each diagonal, over everything that shares it.
//
//   bands     a block of threads walks along a band of tiles with one key0 - query0: all of them have the same diagonals,
//             so that dS is summed in registers as if they were one tile. At its end the sum over that tile's diagonals
//             goes to the band's window in the workspace.
//   windows   the windows of neighbouring bands overlap; they, and batch dims and heads that share the bias, are added.
//
// No atomics and a fixed order: bit-equal results. The workspace is O(queries + keys) for each (b0, b1, head).
#pragma once

#include "../common/diagonal_window.cuh"
#include "../common/launch.cuh"
#include "backward_scores.cuh"

namespace fcsa::sm80 {

template <class Traits>
struct DiagonalBands {
  using Block = ScoreBlock<Traits>;
  static constexpr int kStep = Block::kQueries / Block::kKeys;  // key blocks that a band goes on by at each query block
  static constexpr int kWindow = Block::kQueries + Block::kKeys;  // diagonals of a tile, and one that stays 0
  int q_blocks, key_blocks, count;

  // The key block of a band at the last query block is its number.
  __host__ __device__ explicit DiagonalBands(const Problem& p)
      : q_blocks(ceil_div(p.num_queries, Block::kQueries)),
        key_blocks(ceil_div(p.num_keys, Block::kKeys)),
        count(key_blocks + kStep * (q_blocks - 1)) {}

  __device__ __forceinline__ int key_block(int band, int q_block) const {
    return band - kStep * (q_blocks - 1 - q_block);
  }
  __device__ __forceinline__ int first_q_block(int band) const { return max(q_blocks - 1 - band / kStep, 0); }
};

template <class Traits>
struct DdiagonalsStorage {
  using Block = ScoreBlock<Traits>;
  using Smem = typename Block::Smem;
  static constexpr int kStages = 2 * sizeof(Smem) <= kSmallSharedMemory ? 2 : 1;
  static constexpr int kStride = Block::kKeys + 2;
  union {
    Smem stage[kStages];
    float tile[Block::kQueries * kStride];
  };
};

// The tiles of one band from the first query block on; what the causal mask hides is left out.
template <class Traits>
struct BandWalk {
  using Block = ScoreBlock<Traits>;
  const DiagonalBands<Traits>& bands;
  const int band;
  int q_block;

  __device__ __forceinline__ BandWalk(const DiagonalBands<Traits>& bands, int band)
      : bands(bands), band(band), q_block(bands.first_q_block(band) - 1) {}

  __device__ __forceinline__ int query0() const { return q_block * Block::kQueries; }
  __device__ __forceinline__ int key0() const { return bands.key_block(band, q_block) * Block::kKeys; }

  // To the first tile, then to the next; false where there is none.
  __device__ __forceinline__ bool advance(const BackwardParams& p) {
    while (++q_block < bands.q_blocks) {
      const int key_block = bands.key_block(band, q_block);
      if (key_block >= bands.key_blocks) return false;
      if (key_block < Block::num_key_blocks(p, query0())) return true;
    }
    return false;
  }
};

template <class Traits>
__device__ __forceinline__ void load_band_tile(typename ScoreBlock<Traits>::Smem& smem, const BackwardParams& p,
                                               const TileIndex& head, const BandWalk<Traits>& walk) {
  ScoreBlock<Traits>::load_queries(smem, p, head, walk.query0());
  ScoreBlock<Traits>::load_keys(smem, p, kv_head_of(p, head), walk.key0());
  ptx::cp_async_commit();
}

// dS of one tile, without any factor, added to `sum`.
template <class Traits, class Bias>
__device__ __forceinline__ void add_scores(float (&sum)[ScoreBlock<Traits>::kN][4],
                                           const typename ScoreBlock<Traits>::Smem& smem, const BackwardParams& p,
                                           const TileIndex& head, int query0, int key0, Bias bias) {
  using Block = ScoreBlock<Traits>;
  float ds[1][Block::kN][4];
  Block::compute_ds(ds, smem, p, query0, key0, bias);
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
      for (int c = 0; c < 2; ++c) sum[n][2 * half + c] = fmaf(ds[0][n][2 * half + c], factor, sum[n][2 * half + c]);
    }
  }
}

// The accumulators of the warps through shared memory; then each thread has a diagonal.
template <class Traits>
__device__ __forceinline__ void write_window(float* tile, const float (&sum)[ScoreBlock<Traits>::kN][4],
                                             float* window) {
  using Block = ScoreBlock<Traits>;
  constexpr int kStride = DdiagonalsStorage<Traits>::kStride, kLast = Block::kQueries - 1;
  static_assert(DiagonalBands<Traits>::kWindow <= Block::kThreads);
#pragma unroll
  for (int n = 0; n < Block::kN; ++n) {
#pragma unroll
    for (int r = 0; r < 4; ++r) tile[Block::row_of(r / 2) * kStride + Block::column_of(n, r % 2)] = sum[n][r];
  }
  __syncthreads();
  const int diagonal = threadIdx.x;  // of element (row, row + diagonal - kLast)
  if (diagonal >= DiagonalBands<Traits>::kWindow) return;
  const int end = min(Block::kQueries, Block::kKeys + kLast - diagonal);
  float total = 0.0f;
  for (int row = max(kLast - diagonal, 0); row < end; ++row) total += tile[row * kStride + row + diagonal - kLast];
  window[diagonal] = total;
}

template <class Traits>
__global__ void __launch_bounds__(ScoreBlock<Traits>::kThreads)
    backward_bands_kernel(const __grid_constant__ BackwardParams p) {
  using Block = ScoreBlock<Traits>;
  using Storage = DdiagonalsStorage<Traits>;
  extern __shared__ __align__(128) char shared_memory[];
  Storage& storage = *reinterpret_cast<Storage*>(shared_memory);
  const DiagonalBands<Traits> bands(p);
  const TileIndex head = TileIndex::from_block(blockIdx.x, bands.count, p.heads, p.b1);
  BandWalk<Traits> next(bands, head.tile);
  bool has_next = next.advance(p);
  if (has_next) load_band_tile<Traits>(storage.stage[0], p, head, next);

  // Element (half, n, c) lies on diagonal 8 (n - half) + c, counted from that of the first.
  DiagonalWindow<Block::kN + 1> window;
  const int key_minus_query = bands.key_block(head.tile, 0) * Block::kKeys;
  window.load(p, bias_diagonals(p, head), key_minus_query + Block::column_of(0, 0) - Block::row_of(0) - 8);
  float sum[Block::kN][4] = {};
  for (int stage = 0; has_next; stage = (stage + 1) % Storage::kStages) {
    const int query0 = next.query0(), key0 = next.key0();
    has_next = next.advance(p);
    ptx::cp_async_wait<0>();
    __syncthreads();  // this tile is there; nobody reads the one before
    if (Storage::kStages == 2 && has_next) load_band_tile<Traits>(storage.stage[1 - stage], p, head, next);
    add_scores<Traits>(sum, storage.stage[stage], p, head, query0, key0,
                       [&](int half, int n, int c) { return window.values[n - half + 1][c]; });
    if constexpr (Storage::kStages == 1) {
      __syncthreads();  // nobody reads this tile any more
      if (has_next) load_band_tile<Traits>(storage.stage[0], p, head, next);
    }
  }
  __syncthreads();
  const int64_t first = head.first_row(p.b1, p.heads, bands.count) + head.tile;
  write_window<Traits>(storage.tile, sum, p.dbias_parts + first * DiagonalBands<Traits>::kWindow);
}

constexpr int kWindowsThreads = 128;

// One thread has one diagonal of one (b0 | 1, b1 | 1, head | 1).
template <class Traits>
__global__ void __launch_bounds__(kWindowsThreads) backward_windows_kernel(const __grid_constant__ BackwardParams p) {
  using Block = ScoreBlock<Traits>;
  constexpr int kWindow = DiagonalBands<Traits>::kWindow;
  const DiagonalBands<Traits> bands(p);
  const int num_diagonals = p.num_queries + p.num_keys - 1;
  const int heads = p.dbias_head == 0 ? 1 : p.heads, b1 = p.dbias_b1 == 0 ? 1 : p.b1;
  const TileIndex own = TileIndex::from_block(blockIdx.x, ceil_div(num_diagonals, kWindowsThreads), heads, b1);
  const int diagonal = own.tile * kWindowsThreads + threadIdx.x;
  if (diagonal >= num_diagonals) return;

  // Band u has the diagonals from u * kKeys on, counted from the first of band 0.
  const int at = diagonal + bands.q_blocks * Block::kQueries - p.num_queries;
  float total = 0.0f;
  for (int i0 = own.b0; i0 < (p.dbias_b0 == 0 ? p.b0 : own.b0 + 1); ++i0) {
    for (int i1 = own.b1; i1 < (p.dbias_b1 == 0 ? p.b1 : own.b1 + 1); ++i1) {
      for (int head = own.head; head < (p.dbias_head == 0 ? p.heads : own.head + 1); ++head) {
        const int64_t first = TileIndex{0, head, i1, i0}.first_row(p.b1, p.heads, bands.count);
#pragma unroll
        for (int i = 0; i < kWindow / Block::kKeys; ++i) {
          const int band = at / Block::kKeys - i;
          if (band < 0 || band >= bands.count) continue;
          total += p.dbias_parts[(first + band) * kWindow + at - band * Block::kKeys];
        }
      }
    }
  }
  static_cast<float*>(p.dbias)[own.b0 * p.dbias_b0 + own.b1 * p.dbias_b1 + own.head * p.dbias_head + diagonal] = total;
}

template <class Traits>
cudaError_t launch_ddiagonals(const BackwardParams& p, cudaStream_t stream) {
  using Storage = DdiagonalsStorage<Traits>;
  static_assert(sizeof(Storage) <= kSmallSharedMemory);
  const int64_t blocks = static_cast<int64_t>(DiagonalBands<Traits>(p).count) * p.heads * p.b1 * p.b0;
  if (p.dbias_parts_size < blocks * DiagonalBands<Traits>::kWindow) return cudaErrorInvalidValue;
  const cudaError_t error = launch_blocks<backward_bands_kernel<Traits>>(p, blocks, ScoreBlock<Traits>::kThreads,
                                                                         sizeof(Storage), stream);
  if (error != cudaSuccess) return error;
  int64_t outputs = ceil_div(p.num_queries + p.num_keys - 1, kWindowsThreads);
  if (p.dbias_head != 0) outputs *= p.heads;
  if (p.dbias_b1 != 0) outputs *= p.b1;
  if (p.dbias_b0 != 0) outputs *= p.b0;
  return launch_blocks<backward_windows_kernel<Traits>>(p, outputs, kWindowsThreads, 0, stream);
}

}  // namespace fcsa::sm80
