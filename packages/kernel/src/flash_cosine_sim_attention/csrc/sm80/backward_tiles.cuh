// Stages that the backward kernels share: warp-level products, tile copies, visibility.
#pragma once

#include "../common/backward_preprocess.cuh"
#include "tile_reader.cuh"

namespace fcsa::sm80 {

template <class Tile>
using RowsReader = TileReader<Tile, LanePattern::kRowsFirst>;
template <class Tile>
using ChunksReader = TileReader<Tile, LanePattern::kChunksFirst>;

template <int kM, int kN>
__device__ __forceinline__ void set_zero(float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) acc[m][n][r] = 0.0f;
    }
  }
}

struct DoNothing {
  __device__ __forceinline__ void operator()(int, int) const {}
};

// acc += A B^T over kDepth columns; A and B stored row by row, A's rows in steps of 16, B's in steps of 8. `between` is
// called as between(step, number of steps) after each k16 step: independent arithmetic that is to run beside the products.
template <class Element, int kDepth, int kM, int kN, class TileA, class TileB, class Between = DoNothing>
__device__ __forceinline__ void multiply_rows(float (&acc)[kM][kN][4], const RowsReader<TileA>& a,
                                              const ChunksReader<TileB>& b, Between between = {}) {
#pragma unroll
  for (int chunk = 0; chunk < kDepth / 8; chunk += 2) {
    uint32_t fragment_a[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) a.load(fragment_a[m], 16 * m, chunk);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t fragment_b[4];
      b.load(fragment_b, 8 * n, chunk);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_16816<Element>(acc[m][n], fragment_a[m], fragment_b[0], fragment_b[1]);
        ptx::mma_16816<Element>(acc[m][n + 1], fragment_a[m], fragment_b[2], fragment_b[3]);
      }
    }
    between(chunk / 2, kDepth / 16);
  }
}

// acc += A B for one k16 step; B stored [k][n], its 16-column groups kGroupStep apart. between(pair, number of pairs) is
// called after each pair of columns tiles.
template <class Element, int kGroupStep, int kM, int kN, class TileB, class Between = DoNothing>
__device__ __forceinline__ void multiply_step(float (&acc)[kM][kN][4], const uint32_t (&a)[kM][4],
                                              const RowsReader<TileB>& b, int row, Between between = {}) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t fragment_b[4];
    b.load_transposed(fragment_b, row, n * kGroupStep);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      ptx::mma_16816<Element>(acc[m][n], a[m], fragment_b[0], fragment_b[1]);
      ptx::mma_16816<Element>(acc[m][n + 1], a[m], fragment_b[2], fragment_b[3]);
    }
    between(n / 2, kN / 2);
  }
}

// Accumulators (16 kM x 8 kN), rounded and paired along their columns: A fragments of the k16 steps over those columns.
template <class Element, int kM, int kN>
__device__ __forceinline__ void to_operand(uint32_t (&operand)[kN / 2][kM][4], const float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      operand[n / 2][m][n % 2 * 2] = pack<Element>(acc[m][n][0], acc[m][n][1]);
      operand[n / 2][m][n % 2 * 2 + 1] = pack<Element>(acc[m][n][2], acc[m][n][3]);
    }
  }
}

// Operands of a warp into a tile at (row0 + 16 m, column0 + 16 step). row0 is a multiple of 8; no bit is set both in
// column0 / 8 and in the index of an operand's 16-byte chunk.
template <class Tile, int kSteps, int kM>
__device__ __forceinline__ void store_operand(const Tile& tile, const uint32_t (&operand)[kSteps][kM][4], int row0,
                                              int column0) {
  static_assert(2 * kSteps <= Tile::kChunksPerPanelRow);
  const int lane = threadIdx.x % 32;
  const uint32_t base = tile.chunk_address(row0 + lane / 4, column0 / 8) + lane % 4 * 4;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t offset = (16 * m + r % 2 * 8) * Tile::kPanelCols * 2;
        ptx::store_shared(base ^ (2 * step + r / 2) * 16, offset, operand[step][m][r]);
      }
    }
  }
}

// Copies rows [0, kRows) from `source` (row 0, column 0) into a tile with cp.async (not committed). Every thread keeps one
// 16-byte column of each panel. Rows from num_rows on, columns from num_cols (a multiple of 8) on, and rows that are not
// visible become zero without being read, so that what a masked key holds never meets a product.
template <int kThreads, class Tile>
__device__ __forceinline__ void copy_rows_async(const Tile& tile, const typename Tile::Element* source,
                                                int64_t row_stride, int num_rows, int num_cols,
                                                const uint8_t* visible = nullptr, int64_t visible_stride = 0) {
  constexpr int kChunks = Tile::kChunksPerPanelRow, kRowStep = kThreads / kChunks;
  static_assert(kRowStep % 8 == 0 && Tile::kRows % kRowStep == 0, "the swizzle of a thread's rows is one constant");
  const int first_row = threadIdx.x / kChunks, column = threadIdx.x % kChunks * 8;
  const uint32_t target = tile.chunk_address(first_row, column / 8);
  source += first_row * row_stride + column;
#pragma unroll
  for (int row = 0; row < Tile::kRows; row += kRowStep) {
    bool valid = first_row + row < num_rows;
    if (valid && visible != nullptr) valid = visible[(first_row + row) * visible_stride] != 0;
#pragma unroll
    for (int panel = 0; panel < Tile::kCols / Tile::kPanelCols; ++panel) {
      const int offset = (panel * Tile::kRows + row) * Tile::kPanelCols * 2;
      ptx::cp_async_16(target + offset, source + panel * Tile::kPanelCols,
                       valid && panel * Tile::kPanelCols + column < num_cols);
    }
    source += kRowStep * row_stride;
  }
}

template <int kRows>
__device__ __forceinline__ void copy_query_rows_async(float4 (&target)[kRows], const float4* source) {
  if (threadIdx.x < kRows) ptx::cp_async_16(ptx::smem_address(target + threadIdx.x), source + threadIdx.x, true);
}

// The operands of the score products: unit copies (contiguous) where there are, else q and k.
template <class Element>
struct Rows {
  const Element* base;  // row 0 of this (b0, b1, head)
  int64_t stride;
};

template <class Element>
__device__ __forceinline__ Rows<Element> query_operand(const Problem& p, const TileIndex& index) {
  if (p.q_unit == nullptr) return {static_cast<const Element*>(p.q) + index.offset(p.q_strides), p.q_strides.row};
  const int64_t row = index.first_row(p.b1, p.heads, p.num_queries);
  return {static_cast<const Element*>(p.q_unit) + row * p.head_dim, p.head_dim};
}

template <class Element>
__device__ __forceinline__ Rows<Element> key_operand(const Problem& p, const TileIndex& index) {
  if (p.k_unit == nullptr) return {static_cast<const Element*>(p.k) + index.offset(p.k_strides), p.k_strides.row};
  const int64_t row = index.first_row(p.b1, p.kv_heads, p.num_keys);
  return {static_cast<const Element*>(p.k_unit) + row * p.head_dim, p.head_dim};
}

__device__ __forceinline__ const uint8_t* mask_row(const Problem& p, const TileIndex& index) {
  return p.mask == nullptr ? nullptr : p.mask + index.b0 * p.mask_b0 + index.b1 * p.mask_b1;
}

// bias * log2(e) at (query, key) of this head; 0 beyond the last query or key.
template <class Element>
struct BiasReader {
  const void* base;
  int64_t query_stride, key_stride;
  int num_queries, num_keys;
  bool is_float32;

  __device__ __forceinline__ BiasReader(const Problem& p, const TileIndex& index)
      : query_stride(p.bias_query), key_stride(p.bias_key), num_queries(p.num_queries), num_keys(p.num_keys),
        is_float32(p.bias_is_float32) {
    const int64_t offset = index.b0 * p.bias_b0 + index.b1 * p.bias_b1 + index.head * p.bias_head;
    base = static_cast<const char*>(p.bias) + offset * (is_float32 ? 4 : sizeof(Element));
  }

  __device__ __forceinline__ float operator()(int query, int key) const {
    if (query >= num_queries || key >= num_keys) return 0.0f;
    const int64_t offset = query * query_stride + key * key_stride;
    const float bias = is_float32 ? static_cast<const float*>(base)[offset]
                                  : to_float(static_cast<const Element*>(base)[offset]);
    return bias * backward::kLog2e;
  }
};

}  // namespace fcsa::sm80
