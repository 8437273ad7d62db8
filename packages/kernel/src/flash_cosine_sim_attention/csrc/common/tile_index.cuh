// Grids are one-dimensional (gridDim.y and .z end at 65535): a block index is cut into (b0, b1, head, tile).
#pragma once

#include <cuda_runtime.h>

#include "../params.h"

namespace fcsa {

struct TileIndex {
  int tile, head, b1, b0;

  // Tile fastest, so that blocks that run together share one head's keys and values in the L2 cache.
  __device__ static TileIndex from_block(uint32_t block, int num_tiles, int num_heads, int num_b1) {
    TileIndex index;
    index.tile = block % num_tiles;
    block /= num_tiles;
    index.head = block % num_heads;
    block /= num_heads;
    index.b1 = block % num_b1;
    index.b0 = block / num_b1;
    return index;
  }

  // Row 0 of this (b0, b1, head) among the rows of a contiguous (b0, b1, heads, rows, ...) tensor.
  __device__ int64_t first_row(int num_b1, int num_heads, int num_rows) const {
    return ((static_cast<int64_t>(b0) * num_b1 + b1) * num_heads + head) * num_rows;
  }

  __device__ int64_t offset(const Strides& strides) const {
    return b0 * strides.b0 + b1 * strides.b1 + head * strides.head;
  }
};

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace fcsa
