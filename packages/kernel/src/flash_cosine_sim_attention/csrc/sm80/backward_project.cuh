// From a row of accumulated products to a row of dq or dk: the norm's backward, the scale, the dtype.
//
//   A_i = sum_j dS'_ij k_j (for dq; for dk sums over i of q), xn = rnorm x per group g
//   folded norm      d_i = scale (A_i - (A_i . xn_i) xn_i)                 dS' holds the rnorms of both sides
//   exact copies     d_i = power_of_two(rnorm) scale (A_i - (A_i . xn_i) xn_i)     dS' holds the remainders
//   copies           d_i = scale rnorm_g (A_i - (A_i . xn_i)_g xn_i)
//   no norm          d_i = scale A_i
//   dscale_i = sum_j dS_ij cos_ij = A_i . xn_i, or over rnorm where it is folded
#pragma once

#include "../common/backward_preprocess.cuh"

namespace fcsa::sm80 {

struct ProjectedRows {
  const void* x;        // row 0: q or k as given
  int64_t x_stride;     // between rows
  const float* rnorm;   // (rows, groups) of row 0; nullptr: no norm
  bool folded;          // groups is 1
  bool exact_copies;    // and the operands were copies, times the powers of two in rnorm
  void* target;         // row 0; nullptr: not wanted
  int64_t target_stride;
  float* dscale_rows;   // (rows,) of row 0; nullptr: not wanted
  float scale;          // what is still to be multiplied to A for the gradient
  float dscale_factor;  // and for dscale_rows
  float operand_scale;  // A is to be divided by this power of two, the scale of dS', and by `unit`
  float unit;
  int num_rows, head_dim, groups;
  const uint8_t* visible;  // (rows,) `visible_stride` apart: where 0, x may be NaN and the result is 0; nullptr: all
  int64_t visible_stride;
};

// Several groups: rnorm (A - (A . xn)_g xn) in place, one thread a (row, group). Chunks may begin and end anywhere.
template <class Element, int kThreads>
__device__ __forceinline__ void project_groups(float* tile, int tile_stride, const ProjectedRows& p) {
  const int chunk = p.head_dim / p.groups;
  for (int index = threadIdx.x; index < p.num_rows * p.groups; index += kThreads) {
    const int row = index / p.groups, group = index % p.groups;
    const Element* x = static_cast<const Element*>(p.x) + row * p.x_stride + group * chunk;
    float* a = tile + row * tile_stride + group * chunk;
    const float rnorm = p.rnorm[static_cast<int64_t>(row) * p.groups + group];
    float dot = 0.0f;
    for (int c = 0; c < chunk; ++c) dot += a[c] * (rnorm * to_float(x[c]));
    for (int c = 0; c < chunk; ++c) a[c] = rnorm * (a[c] - dot * (rnorm * to_float(x[c])));
  }
}

template <class Element, int kThreads>
__device__ __forceinline__ void write_grouped_dscale(const float* tile, int tile_stride, const ProjectedRows& p) {
  const int chunk = p.head_dim / p.groups;
  for (int row = threadIdx.x; row < p.num_rows; row += kThreads) {
    const Element* x = static_cast<const Element*>(p.x) + row * p.x_stride;
    const float* rnorm = p.rnorm + static_cast<int64_t>(row) * p.groups;
    float dot = 0.0f;
    for (int c = 0; c < p.head_dim; ++c) dot += tile[row * tile_stride + c] * (rnorm[c / chunk] * to_float(x[c]));
    p.dscale_rows[row] = dot / p.operand_scale / p.unit * p.dscale_factor;
  }
}

// tile: kRows x kHeadDim floats of A in shared memory, rows `tile_stride` apart; p.num_rows of them are real.
// All threads of the block; the tile has been written and synchronised.
template <class Element, int kHeadDim, int kRows, int kThreads>
__device__ __forceinline__ void project_rows(float* tile, int tile_stride, const ProjectedRows& p) {
  constexpr int kLanes = kHeadDim <= 32 ? 4 : kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;
  const bool grouped = p.rnorm != nullptr && p.groups > 1;
  if (grouped) {
    if (p.dscale_rows != nullptr) write_grouped_dscale<Element, kThreads>(tile, tile_stride, p);
    __syncthreads();
    project_groups<Element, kThreads>(tile, tile_stride, p);
    __syncthreads();
  }
  // Powers of two, taken off one by one: their product may lie beyond the range of floats.
  const float inverse = 1.0f / p.operand_scale, scale = p.scale / p.unit, dscale_factor = p.dscale_factor / p.unit;
  const int lane = threadIdx.x % kLanes, column = lane * 8;
  for (int first = 0; first < kRows; first += kThreads / kLanes) {
    const int row = first + threadIdx.x / kLanes;
    const bool valid = row < p.num_rows && row < kRows && column < p.head_dim;
    const bool visible = valid && (p.visible == nullptr || p.visible[row * p.visible_stride] != 0);
    float a[8] = {}, x[8] = {};
    if (visible) load8(a, tile + row * tile_stride + column);
    if (!grouped) {
      if (visible) load8(x, static_cast<const Element*>(p.x) + row * p.x_stride + column);
      const float rnorm = visible && p.rnorm != nullptr ? p.rnorm[row] : 1.0f;
      float product = 0.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c) product += a[c] * (x[c] *= rnorm);
      const float dot = lane_sum<kLanes>(product);
      if (p.dscale_rows != nullptr && valid && lane == 0) {
        p.dscale_rows[row] = dot * inverse / (!p.folded ? 1.0f : p.exact_copies ? remainder_of(rnorm) : rnorm) * dscale_factor;
      }
      if (p.rnorm != nullptr) {
        const float factor = !p.folded ? rnorm : p.exact_copies ? power_of_two(rnorm) : 1.0f;
#pragma unroll
        for (int c = 0; c < 8; ++c) a[c] = factor * (a[c] - dot * x[c]);
      }
    }
    if (valid && p.target != nullptr) {
#pragma unroll
      for (int c = 0; c < 8; ++c) a[c] = a[c] * inverse * scale;
      store8(static_cast<Element*>(p.target) + row * p.target_stride + column, a);
    }
  }
}

}  // namespace fcsa::sm80
