// A tile of rows of a (b0, b1, heads, rows, d) tensor into shared memory by TMA.
#pragma once

#include "ptx.cuh"
#include "smem_panel.cuh"
#include "tensor_map.h"

namespace fcsa::sm90 {

// One thread; the bytes of all panels count at `barrier`. Rows and columns beyond the tensor become zeros.
template <class Tile>
__device__ __forceinline__ void load_tile(Tile& tile, const TensorMap& source, int first_row, int head, int b1, int b0,
                                          uint64_t& barrier) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    const int32_t coordinates[5] = {panel * Tile::kPanelCols, first_row, head * source.head_step, b1 * source.b1_step,
                                    b0 * source.b0_step};
    load_box(tile.data + panel * Tile::kPanelElements, source.map, coordinates, barrier);
  }
}

}  // namespace fcsa::sm90
