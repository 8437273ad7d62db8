// A tile of 16-bit values in shared memory, kRows x kCols, free of bank conflicts for cp.async, ldmatrix and its
// transposed form. Columns are cut into panels of 64 (or 32, where 64 does not divide kCols); within a panel the
// 16-byte chunks of a row are permuted by an XOR with the row, so that 8 consecutive rows of one chunk column lie in
// 8 different 16-byte bank groups.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "ptx.cuh"

namespace fcsa::sm80 {

template <class Element_, int kRows_, int kCols_>
struct SmemTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPanelCols = kCols % 64 == 0 ? 64 : 32;
  static constexpr int kChunksPerPanelRow = kPanelCols / 8;
  static_assert(sizeof(Element) == 2 && kCols % 32 == 0 && kRows % 8 == 0);

  Element data[kRows * kCols];

  // Element offset of the 16-byte chunk (row, 8 * chunk ...).
  __device__ static constexpr int chunk_offset(int row, int chunk) {
    const int panel = chunk / kChunksPerPanelRow;
    const int in_panel = chunk % kChunksPerPanelRow;
    const int permuted = kPanelCols == 64 ? in_panel ^ (row & 7) : in_panel ^ ((row >> 1) & 3);
    return panel * (kRows * kPanelCols) + row * kPanelCols + permuted * 8;
  }

  __device__ Element& at(int row, int col) { return data[chunk_offset(row, col / 8) + col % 8]; }
  __device__ const Element& at(int row, int col) const { return data[chunk_offset(row, col / 8) + col % 8]; }

  __device__ uint32_t chunk_address(int row, int chunk) const {
    return ptx::smem_address(data + chunk_offset(row, chunk));
  }

  // A fragment of mma.m16n8k16, 16 x 16 at (row, col), for a tile stored [m][k].
  __device__ void load_a(uint32_t (&a)[4], int row, int col) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(a, chunk_address(row + lane % 16, col / 8 + lane / 16));
  }

  // The same for a tile stored [k][m]: the fragment of the transpose, m at `col`, k at `row`.
  __device__ void load_a_transposed(uint32_t (&a)[4], int row, int col) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans(a, chunk_address(row + lane % 8 + lane / 16 * 8, col / 8 + lane / 8 % 2));
  }

  // Two B fragments (n, n + 8) x k16, for a tile stored [n][k]: b[0..1] for n at `row`, b[2..3] for row + 8.
  __device__ void load_b(uint32_t (&b)[4], int row, int col) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4(b, chunk_address(row + lane % 8 + lane / 16 * 8, col / 8 + lane / 8 % 2));
  }

  // The same for a tile stored [k][n]: b[0..1] for n at `col`, b[2..3] for col + 8.
  __device__ void load_b_transposed(uint32_t (&b)[4], int row, int col) const {
    const int lane = threadIdx.x % 32;
    ptx::ldmatrix_x4_trans(b, chunk_address(row + lane % 16, col / 8 + lane / 16));
  }
};

// Copies rows [0, kRows) of a (rows, d) matrix into `tile` with cp.async (not committed); rows from `num_rows` on and
// columns from `num_cols` (a multiple of 8) on become zero. `global` points at the tile's first row; the offsets within a
// tile fit 32 bits only if row_stride does, so they are computed in 64.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_tile_async(Tile& tile, const typename Tile::Element* global, int64_t row_stride,
                                                int num_rows, int num_cols) {
  constexpr int kChunksPerRow = Tile::kCols / 8;
  static_assert(Tile::kRows * kChunksPerRow % kThreads == 0);
#pragma unroll
  for (int step = 0; step < Tile::kRows * kChunksPerRow / kThreads; ++step) {
    const int index = step * kThreads + threadIdx.x;
    const int row = index / kChunksPerRow, chunk = index % kChunksPerRow;
    const bool valid = row < num_rows && chunk * 8 < num_cols;
    const typename Tile::Element* source = valid ? global + row * row_stride + chunk * 8 : global;
    ptx::cp_async_16(tile.chunk_address(row, chunk), source, valid);
  }
}

}  // namespace fcsa::sm80
