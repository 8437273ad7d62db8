// A kRows x kCols tile of 16-bit values in shared memory as TMA writes it and wgmma reads it: panels of 64 columns, each
// row of a panel 128 bytes, its eight 16-byte chunks permuted by an XOR with row % 8 ("128-byte swizzle").
#pragma once

#include <cstdint>

namespace fcsa::sm90 {

template <class Element_, int kRows_, int kCols_>
struct PanelTile {
  using Element = Element_;
  static constexpr int kRows = kRows_;
  static constexpr int kCols = kCols_;
  static constexpr int kPanelCols = 64;
  static constexpr int kPanels = (kCols + kPanelCols - 1) / kPanelCols;  // the last may be half empty (kCols = 96)
  static constexpr int kPanelElements = kRows * kPanelCols;
  static constexpr int kBytes = kPanels * kPanelElements * 2;
  static_assert(sizeof(Element) == 2 && kRows % 8 == 0 && kCols % 32 == 0);

  alignas(1024) Element data[kPanels * kPanelElements];

  // wgmma operand stored [row][k]: 64 or more rows from `row`, 16 columns from `col`.
  __device__ uint64_t descriptor(int row, int col) const {
    return make_descriptor(1, row * kPanelCols / 8 + static_cast<uint32_t>(column_step(col)));
  }
  __host__ __device__ static constexpr uint64_t column_step(int col) {
    return (col / kPanelCols * kPanelElements + col % kPanelCols) / 8;
  }

  // wgmma operand stored [k][col]: 16 rows from `row`, columns from `col`: the first of a panel, and panels lie
  // kPanelElements apart, or columns that end within their panel.
  __device__ uint64_t descriptor_transposed(int row, int col = 0) const {
    return make_descriptor(kPanelElements * 2 / 16, row * kPanelCols / 8 + static_cast<uint32_t>(column_step(col)));
  }
  __host__ __device__ static constexpr uint64_t row_step(int row) { return row * kPanelCols / 8; }

  // The same for a tile of one panel, continued by the columns of `beside`, 16 rows of a panel at a higher address.
  __device__ uint64_t descriptor_transposed(int row, const Element (&beside)[16 * kPanelCols]) const {
    static_assert(kPanels == 1);
    const uint32_t distance = static_cast<uint32_t>(reinterpret_cast<const char*>(beside) - reinterpret_cast<const char*>(data));
    const uint32_t offset = static_cast<uint32_t>(row_step(row));
    return make_descriptor(distance / 16, offset - (offset << 16));
  }

  // Where the eight columns from `col` (a multiple of 8) of `row` lie.
  __device__ const Element* chunk(int row, int col) const { return data + chunk_offset(row, col); }
  __device__ Element* chunk(int row, int col) { return data + chunk_offset(row, col); }

 private:
  __device__ static int chunk_offset(int row, int col) {
    const int panel = col / kPanelCols, in_panel = col % kPanelCols / 8;
    return panel * kPanelElements + row * kPanelCols + (in_panel ^ (row & 7)) * 8;
  }

  // Matrix descriptor of wgmma, in units of 16 bytes: start address; leading byte offset, the stride between panels of a
  // transposed operand; stride byte offset, from one group of 8 rows to the next; bit 62: 128-byte swizzle. An offset within
  // the tile is added last and to the lower word, so that the descriptors of a tile differ by one addition of a constant.
  __device__ uint64_t make_descriptor(uint32_t leading, uint32_t offset) const {
    const uint32_t tile = static_cast<uint32_t>(__cvta_generic_to_shared(data)) >> 4 | leading << 16;
    constexpr uint64_t kEightRows = 8 * 128 / 16;
    return (tile + offset) | kEightRows << 32 | uint64_t{1} << 62;
  }
};

}  // namespace fcsa::sm90
