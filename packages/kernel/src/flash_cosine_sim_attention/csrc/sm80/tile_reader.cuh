// Fragment addresses with one integer operation per ldmatrix: everything that depends on the lane or the warp is
// computed once, and what is known at compile time is added by an XOR and an immediate offset.
#pragma once

#include "smem_tile.cuh"

namespace fcsa::sm80 {

// How the lanes of a warp are laid over rows and 16-byte chunks by one ldmatrix of four 8 x 8 matrices.
enum class LanePattern {
  kRowsFirst,   // a of a tile [m][k]; b of a tile [k][n]
  kChunksFirst  // b of a tile [n][k]; a of a tile [k][m]
};

// Reads fragments of a SmemTile at (row0 + row, 8 * (chunk0 + chunk)). row0 and chunk0 are run-time values, row and
// chunk compile-time ones; row0 and row are multiples of 8, and no bit is set both in chunk0 + 1 and in chunk.
template <class Tile, LanePattern kPattern>
struct TileReader {
  static constexpr int kChunks = Tile::kChunksPerPanelRow;
  static constexpr int kRowBytes = Tile::kPanelCols * 2;
  uint32_t base;

  __device__ __forceinline__ TileReader(const Tile& tile, int row0, int chunk0) {
    const int lane = threadIdx.x % 32;
    const int row = kPattern == LanePattern::kRowsFirst ? lane % 16 : lane % 8 + lane / 16 * 8;
    const int chunk = kPattern == LanePattern::kRowsFirst ? lane / 16 : lane / 8 % 2;
    base = tile.chunk_address(row0 + row, chunk0 + chunk);
  }

  __device__ __forceinline__ uint32_t address(int row, int chunk) const {
    return (base ^ (chunk % kChunks * 16)) + (chunk / kChunks * Tile::kRows + row) * kRowBytes;
  }

  __device__ __forceinline__ void load(uint32_t (&r)[4], int row, int chunk) const {
    ptx::ldmatrix_x4(r, address(row, chunk));
  }

  __device__ __forceinline__ void load_transposed(uint32_t (&r)[4], int row, int chunk) const {
    ptx::ldmatrix_x4_trans(r, address(row, chunk));
  }
};

}  // namespace fcsa::sm80
