// From a warpgroup's accumulators of 64 rows x kHeadDim to rows of dq, dk or dv in device memory, without shared memory.
//
// A thread holds of rows r and r + 8 two neighbouring columns in every eight (wgmma.cuh). It trades with the other lanes of its
// quad until it holds all eight columns of every fourth eight instead: sums over a row are then sums over the quad, and every
// access is of 16 bytes.
#pragma once

#include "../common/backward_project.cuh"
#include "backward_traits.cuh"

namespace fcsa::sm90 {

template <class Traits>
using RowAccumulators = float[Traits::kHeadDim / 2];

// Sixteen accumulators from `first` on, two columns of each of four eights -> eight columns of one of them, of both rows.
// Not in place: the accumulators of wgmma stay where they are.
template <int kSize>
__device__ __forceinline__ void trade_in_quad(float (&rows)[2][8], const float (&acc)[kSize], int first) {
  const bool odd = (threadIdx.x & 1) != 0, upper = (threadIdx.x & 2) != 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      float x[4];
#pragma unroll
      for (int eight = 0; eight < 4; ++eight) x[eight] = acc[first + eight * 4 + half * 2 + c];
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const float received = __shfl_xor_sync(0xffffffffu, odd ? x[i] : x[i + 1], 1);
        x[i] = odd ? received : x[i], x[i + 1] = odd ? x[i + 1] : received;
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float received = __shfl_xor_sync(0xffffffffu, upper ? x[i] : x[i + 2], 2);
        x[i] = upper ? received : x[i], x[i + 2] = upper ? x[i + 2] : received;
      }
#pragma unroll
      for (int lane = 0; lane < 4; ++lane) rows[half][lane * 2 + c] = x[lane];
    }
  }
}

// Where a thread's two rows are, and what it needs of q or k for them.
template <class Traits>
struct RowPair {
  using Element = typename Traits::Element;
  static constexpr int kParts = Traits::kHeadDim / 32;  // of a part a thread has columns `column` to column + 7

  int row, column;           // the first of the rows; the other is row + 8
  bool exists[2], visible[2];
  uint4 raw[2][kParts];      // of q or k
  float rnorm[2];

  // thread: of the warpgroup. first_row: of its 64, among those of `rows`.
  __device__ __forceinline__ RowPair(const backward::ProjectedRows& rows, int first_row, int thread)
      : row(first_row + thread / 32 * 16 + thread % 32 / 4), column(thread % 4 * 8) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      exists[half] = row + 8 * half < rows.num_rows;
      visible[half] = exists[half] && (rows.visible == nullptr || rows.visible[(row + 8 * half) * rows.visible_stride] != 0);
    }
  }

  // All loads at once: their values are needed later.
  __device__ __forceinline__ void load(const backward::ProjectedRows& rows) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Element* x = static_cast<const Element*>(rows.x) + (row + 8 * half) * rows.x_stride + column;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        raw[half][part] = make_uint4(0, 0, 0, 0);
        if (visible[half] && part * 32 + column < rows.head_dim) {
          raw[half][part] = *reinterpret_cast<const uint4*>(x + part * 32);
        }
      }
      rnorm[half] = visible[half] && rows.rnorm != nullptr ? rows.rnorm[row + 8 * half] : 1.0f;
    }
  }
};

// target: of row 0; 0 goes to rows that are hidden.
template <class Traits>
__device__ __forceinline__ void write_rows(const RowAccumulators<Traits>& acc, const RowPair<Traits>& pair,
                                           typename Traits::Element* target, int64_t stride, int head_dim) {
#pragma unroll
  for (int part = 0; part < RowPair<Traits>::kParts; ++part) {
    float x[2][8];
    trade_in_quad(x, acc, part * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int c = 0; c < 8; ++c) x[half][c] = pair.visible[half] ? x[half][c] : 0.0f;
      if (!pair.exists[half] || part * 32 + pair.column >= head_dim) continue;
      store8(target + (pair.row + 8 * half) * stride + part * 32 + pair.column, x[half]);
    }
  }
}

// One group or no norm: common/backward_project.cuh in registers. pair: loaded.
template <class Traits>
__device__ __forceinline__ void project_and_write_rows(const RowAccumulators<Traits>& acc, const RowPair<Traits>& pair,
                                                       const backward::ProjectedRows& rows) {
  using Element = typename Traits::Element;
  constexpr int kParts = RowPair<Traits>::kParts;
  float along[2] = {}, scale[2] = {rows.scale, rows.scale};
  if (rows.rnorm != nullptr || rows.dscale_rows != nullptr) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      float a[2][8];
      trade_in_quad(a, acc, part * 16);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[8];
        load8(x, reinterpret_cast<const Element*>(&pair.raw[half][part]));
#pragma unroll
        for (int c = 0; c < 8; ++c) along[half] += a[half][c] * x[c];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float rnorm = pair.rnorm[half], dot = lane_sum<4>(along[half]) * rnorm;
      if (rows.dscale_rows != nullptr && pair.exists[half] && threadIdx.x % 4 == 0) {
        rows.dscale_rows[pair.row + 8 * half] = backward::row_dscale(rows, rnorm, dot);
      }
      along[half] = rows.rnorm != nullptr ? dot * rnorm : 0.0f;
      if (rows.rnorm != nullptr) scale[half] *= backward::row_factor(rows, rnorm);
    }
  }
  if (rows.target == nullptr) return;
  Element* target = static_cast<Element*>(rows.target) + pair.row * rows.target_stride + pair.column;
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
    float d[2][8];
    trade_in_quad(d, acc, part * 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8];
      load8(x, reinterpret_cast<const Element*>(&pair.raw[half][part]));
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        d[half][c] = pair.visible[half] ? (d[half][c] - along[half] * x[c]) * scale[half] : 0.0f;
      }
      if (!pair.exists[half] || part * 32 + pair.column >= rows.head_dim) continue;
      store8(target + 8 * half * rows.target_stride + part * 32, d[half]);
    }
  }
}

}  // namespace fcsa::sm90
