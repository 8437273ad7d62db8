// Copies of (rows, d) tiles from global to shared memory with cp.async. Every thread keeps one 16-byte chunk column of
// each panel and walks down the rows in constant steps, so that a copy costs one address addition and one instruction.
#pragma once

#include "smem_tile.cuh"

namespace fcsa::sm80 {

template <class Tile, int kThreads>
class TileCopy {
  using Element = typename Tile::Element;
  static constexpr int kChunks = Tile::kPanelCols / 8;
  static constexpr int kRowStep = kThreads / kChunks;
  static constexpr int kPanels = Tile::kCols / Tile::kPanelCols;
  static_assert(kRowStep % 8 == 0, "the swizzle of a thread's rows is one constant");
  static_assert(kThreads % kChunks == 0 && kRowStep <= 32 && Tile::kRows % kRowStep == 0);

 public:
  // source: row 0, column 0 of the matrix; columns from num_cols (a multiple of 8) on become zero.
  __device__ __forceinline__ TileCopy(const Element* source, int64_t row_stride, int num_cols)
      : row_(threadIdx.x / kChunks),
        col_(threadIdx.x % kChunks * 8),
        num_cols_(num_cols),
        row_stride_(row_stride),
        source_(source + row_ * row_stride + col_) {}

  // Rows first_row, first_row + 1, ... into `tile`. Row r + offset of the tile becomes zero and is not read unless
  // valid(r, offset), with r known at compile time and 0 <= offset < 32. The columns begin at first_col.
  template <class RowPredicate>
  __device__ __forceinline__ void copy(Tile& tile, int64_t first_row, RowPredicate valid, int first_col = 0) const {
    const Element* source = source_ + first_row * row_stride_ + first_col;
    const uint32_t target = tile.chunk_address(row_, col_ / 8);
#pragma unroll
    for (int row = 0; row < Tile::kRows; row += kRowStep) {
      const bool row_valid = valid(row, row_);
#pragma unroll
      for (int panel = 0; panel < kPanels; ++panel) {
        const int offset = (panel * Tile::kRows + row) * Tile::kPanelCols * static_cast<int>(sizeof(Element));
        ptx::cp_async_16(target + offset, source + panel * Tile::kPanelCols,
                         row_valid && panel * Tile::kPanelCols + col_ < num_cols_);
      }
      source = ptx::opaque(source + kRowStep * row_stride_);
    }
  }

  // The same where every row is valid.
  __device__ __forceinline__ void copy_all(Tile& tile, int64_t first_row, int first_col = 0) const {
    copy(tile, first_row, [](int, int) { return true; }, first_col);
  }

 private:
  int row_, col_, num_cols_;
  int64_t row_stride_;
  const Element* source_;
};

}  // namespace fcsa::sm80
