// Stages that the backward kernels share: warp-level products, tile copies, visibility.
#pragma once

#include "../common/backward_preprocess.cuh"
#include "../common/mask.cuh"
#include "backward_traits.cuh"
#include "packed_bias.cuh"
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

// Operands come in kPlanes planes, hi and lo of float32, or one. A tile in shared memory holds the rows of its planes
// one after the other; a register operand has its planes' row tiles one after the other.
//
// acc0, acc1 += A B of one m16 tile and two n8 tiles. Tensor cores truncate when they add to an accumulator, which
// over a long sum costs float32 its last bits: with two planes each k16 step is a sum of its own, the small products
// first, and is added by an ordinary rounded addition.
template <class Operand, int kPlanes, int kM>
__device__ __forceinline__ void multiply_pair(float (&acc0)[4], float (&acc1)[4], const uint32_t (&a)[kPlanes * kM][4],
                                              int m, const uint32_t (&b)[kPlanes][4]) {
  if constexpr (kPlanes == 1) {
    ptx::mma_16816<Operand>(acc0, a[m], b[0][0], b[0][1]);
    ptx::mma_16816<Operand>(acc1, a[m], b[0][2], b[0][3]);
  } else {
    float step0[4] = {}, step1[4] = {};
    ptx::mma_16816<Operand>(step0, a[m], b[1][0], b[1][1]);
    ptx::mma_16816<Operand>(step1, a[m], b[1][2], b[1][3]);
    ptx::mma_16816<Operand>(step0, a[kM + m], b[0][0], b[0][1]);
    ptx::mma_16816<Operand>(step1, a[kM + m], b[0][2], b[0][3]);
    ptx::mma_16816<Operand>(step0, a[m], b[0][0], b[0][1]);
    ptx::mma_16816<Operand>(step1, a[m], b[0][2], b[0][3]);
#pragma unroll
    for (int r = 0; r < 4; ++r) acc0[r] += step0[r], acc1[r] += step1[r];
  }
}

// acc += A B^T over kDepth columns; A and B stored row by row, A's rows in steps of 16, B's in steps of 8. `between` is
// called as between(step, number of steps) after each k16 step: independent arithmetic that is to run beside the
// products.
template <class Operand, int kPlanes, int kDepth, int kM, int kN, class TileA, class TileB, class Between = DoNothing>
__device__ __forceinline__ void multiply_rows(float (&acc)[kM][kN][4], const RowsReader<TileA>& a,
                                              const ChunksReader<TileB>& b, Between between = {}) {
  constexpr int kPlaneA = TileA::kRows / kPlanes, kPlaneB = TileB::kRows / kPlanes;
#pragma unroll
  for (int chunk = 0; chunk < kDepth / 8; chunk += 2) {
    uint32_t fragment_a[kPlanes * kM][4];
#pragma unroll
    for (int i = 0; i < kPlanes * kM; ++i) a.load(fragment_a[i], i / kM * kPlaneA + 16 * (i % kM), chunk);
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      uint32_t fragment_b[kPlanes][4];
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) b.load(fragment_b[plane], plane * kPlaneB + 8 * n, chunk);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        multiply_pair<Operand, kPlanes, kM>(acc[m][n], acc[m][n + 1], fragment_a, m, fragment_b);
      }
    }
    between(chunk / 2, kDepth / 16);
  }
}

// acc += A B for one k16 step; B stored [k][n], its 16-column groups kGroupStep apart. between(pair, number of pairs)
// is called after each pair of column tiles.
template <class Operand, int kPlanes, int kGroupStep, int kM, int kN, class TileB, class Between = DoNothing>
__device__ __forceinline__ void multiply_step(float (&acc)[kM][kN][4], const uint32_t (&a)[kPlanes * kM][4],
                                              const RowsReader<TileB>& b, int row, Between between = {}) {
  constexpr int kPlaneB = TileB::kRows / kPlanes;
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t fragment_b[kPlanes][4];
#pragma unroll
    for (int plane = 0; plane < kPlanes; ++plane) {
      b.load_transposed(fragment_b[plane], plane * kPlaneB + row, n * kGroupStep);
    }
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      multiply_pair<Operand, kPlanes, kM>(acc[m][n], acc[m][n + 1], a, m, fragment_b);
    }
    between(n / 2, kN / 2);
  }
}

// Accumulators (16 kM x 8 kN), rounded and paired along their columns: A fragments of the k16 steps over those columns.
// With two planes, lo is what the rounding left.
template <class Operand, int kPlanes, int kM, int kN>
__device__ __forceinline__ void to_operand(uint32_t (&operand)[kN / 2][kPlanes * kM][4],
                                           const float (&acc)[kM][kN][4]) {
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float x = acc[m][n][2 * half], y = acc[m][n][2 * half + 1];
        const uint32_t hi = pack<Operand>(x, y);
        operand[n / 2][m][n % 2 * 2 + half] = hi;
        if constexpr (kPlanes == 2) {
          const float2 rounded = unpack<Operand>(hi);
          operand[n / 2][kM + m][n % 2 * 2 + half] = pack<Operand>(x - rounded.x, y - rounded.y);
        }
      }
    }
  }
}

// Operands of a warp into a tile at (row0 + 16 m, column0 + 16 step). row0 is a multiple of 8; no bit is set both in
// column0 / 8 and in the index of an operand's 16-byte chunk.
template <int kPlanes, class Tile, int kSteps, int kRowTiles>
__device__ __forceinline__ void store_operand(const Tile& tile, const uint32_t (&operand)[kSteps][kRowTiles][4],
                                              int row0, int column0) {
  static_assert(2 * kSteps <= Tile::kChunksPerPanelRow);
  constexpr int kM = kRowTiles / kPlanes, kPlane = Tile::kRows / kPlanes;
  const int lane = threadIdx.x % 32;
  const uint32_t base = tile.chunk_address(row0 + lane / 4, column0 / 8) + lane % 4 * 4;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const uint32_t offset = (i / kM * kPlane + 16 * (i % kM) + r % 2 * 8) * Tile::kPanelCols * 2;
        ptx::store_shared(base ^ (2 * step + r / 2) * 16, offset, operand[step][i][r]);
      }
    }
  }
}

// A matrix of operands in global memory: row 0 of one (b0, b1, head); its planes lie side by side in a row.
template <class Operand>
struct Rows {
  const Operand* base;
  int64_t stride;  // between rows
  int plane;       // columns between the planes

  __device__ __forceinline__ Rows from(int row) const { return {base + row * stride, stride, plane}; }
};

// Copies rows into a tile with cp.async (not committed). Every thread keeps one 16-byte column of each panel. Rows from
// num_rows on, columns from num_cols (a multiple of 8) on, and rows that are not visible become zero without being
// read, so that what a masked key holds never meets a product.
template <int kThreads, int kPlanes, class Tile>
__device__ __forceinline__ void copy_rows_async(const Tile& tile, const Rows<typename Tile::Element>& rows,
                                                int num_rows, int num_cols, const uint8_t* visible = nullptr,
                                                int64_t visible_stride = 0) {
  constexpr int kChunks = Tile::kChunksPerPanelRow, kRowStep = kThreads / kChunks, kRows = Tile::kRows / kPlanes;
  static_assert(kRowStep % 8 == 0, "the swizzle of a thread's rows is one constant");
  const int first_row = threadIdx.x / kChunks, column = threadIdx.x % kChunks * 8;
  const uint32_t target = tile.chunk_address(first_row, column / 8);
  const typename Tile::Element* source = rows.base + first_row * rows.stride + column;
#pragma unroll
  for (int row = 0; row < kRows; row += kRowStep) {
    if (kRows % kRowStep != 0 && first_row + row >= kRows) break;
    bool valid = first_row + row < num_rows;
    if (valid && visible != nullptr) valid = visible[(first_row + row) * visible_stride] != 0;
#pragma unroll
    for (int panel = 0; panel < Tile::kCols / Tile::kPanelCols; ++panel) {
#pragma unroll
      for (int plane = 0; plane < kPlanes; ++plane) {
        const int offset = (panel * Tile::kRows + plane * kRows + row) * Tile::kPanelCols * 2;
        ptx::cp_async_16(target + offset, source + plane * rows.plane + panel * Tile::kPanelCols,
                         valid && panel * Tile::kPanelCols + column < num_cols);
      }
    }
    source += kRowStep * rows.stride;
  }
}

template <int kRows>
__device__ __forceinline__ void copy_query_rows_async(float4 (&target)[kRows], const float4* source) {
  if (threadIdx.x < kRows) ptx::cp_async_16(ptx::smem_address(target + threadIdx.x), source + threadIdx.x, true);
}

// Of a contiguous copy (b0, b1, heads, rows, kPlanes * d).
template <class Traits>
__device__ __forceinline__ Rows<typename Traits::Operand> copied_rows(const void* copy, int64_t first_row,
                                                                      int head_dim) {
  const int64_t stride = Traits::kPlanes * head_dim;
  return {static_cast<const typename Traits::Operand*>(copy) + first_row * stride, stride, head_dim};
}

template <class Traits>
__device__ __forceinline__ Rows<typename Traits::Operand> given_rows(const void* x, const Strides& strides,
                                                                     const TileIndex& index) {
  return {static_cast<const typename Traits::Operand*>(x) + index.offset(strides), strides.row, 0};
}

// The operands of the products: copies where there are, else the tensors themselves.
template <class Traits>
__device__ __forceinline__ Rows<typename Traits::Operand> query_operand(const Problem& p, const TileIndex& head) {
  if (p.q_unit == nullptr) return given_rows<Traits>(p.q, p.q_strides, head);
  return copied_rows<Traits>(p.q_unit, head.first_row(p.b1, p.heads, p.num_queries), p.head_dim);
}

template <class Traits>
__device__ __forceinline__ Rows<typename Traits::Operand> dout_operand(const BackwardParams& p, const TileIndex& head) {
  if (!Traits::kFloat) return given_rows<Traits>(p.dout, p.dout_strides, head);
  return copied_rows<Traits>(p.dout_split, head.first_row(p.b1, p.heads, p.num_queries), p.head_dim);
}

template <class Traits>
__device__ __forceinline__ Rows<typename Traits::Operand> key_operand(const Problem& p, const TileIndex& kv_head) {
  if (p.k_unit == nullptr) return given_rows<Traits>(p.k, p.k_strides, kv_head);
  return copied_rows<Traits>(p.k_unit, kv_head.first_row(p.b1, p.kv_heads, p.num_keys), p.head_dim);
}

template <class Traits>
__device__ __forceinline__ Rows<typename Traits::Operand> value_operand(const BackwardParams& p,
                                                                        const TileIndex& kv_head) {
  if (!Traits::kFloat) return given_rows<Traits>(p.v, p.v_strides, kv_head);
  return copied_rows<Traits>(p.v_split, kv_head.first_row(p.b1, p.kv_heads, p.num_keys), p.head_dim);
}

// bias * log2(e) at (query, key) of this head; 0 beyond the last query or key.
template <class Traits>
struct BiasReader {
  using Element = typename Traits::Element;
  const void* base;
  int64_t query_stride, key_stride;
  int num_queries, num_keys;
  bool is_float32;
  const char* packed;  // the fragments of this head, keys in rows; nullptr where there are none
  int key_fragments, query_fragments;

  __device__ __forceinline__ BiasReader(const Problem& p, const TileIndex& index)
      : query_stride(p.bias_query), key_stride(p.bias_key), num_queries(p.num_queries), num_keys(p.num_keys),
        is_float32(p.bias_is_float32) {
    const int64_t offset = index.b0 * p.bias_b0 + index.b1 * p.bias_b1 + index.head * p.bias_head;
    base = static_cast<const char*>(p.bias) + offset * (is_float32 ? 4 : sizeof(Element));
    const PackedBias fragments(p, true);
    key_fragments = fragments.row_fragments, query_fragments = fragments.column_fragments;
    packed = static_cast<const char*>(p.packed_bias);
    if (packed != nullptr) packed += fragments.at(index, 0, 0, 0) * (is_float32 ? 4 : sizeof(Element));
  }

  __device__ __forceinline__ float operator()(int query, int key) const {
    if (query >= num_queries || key >= num_keys) return 0.0f;
    const int64_t offset = query * query_stride + key * key_stride;
    const float bias = is_float32 ? static_cast<const float*>(base)[offset]
                                  : to_float(static_cast<const Element*>(base)[offset]);
    return bias * kLog2e;
  }
};

}  // namespace fcsa::sm80
