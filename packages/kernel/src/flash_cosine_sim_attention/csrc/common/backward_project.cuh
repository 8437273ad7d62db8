// From a row of accumulated products to a row of dq or dk: the norm's backward, the scale, the dtype.
//
//   A_i = sum_j dS'_ij k_j (for dq; for dk sums over i of q), xn = rnorm x per group g
//   folded norm      d_i = scale (A_i - (A_i . xn_i) xn_i)                 dS' holds the rnorms of both sides
//   exact copies     d_i = power_of_two(rnorm) scale (A_i - (A_i . xn_i) xn_i)     dS' holds the remainders
//   copies           d_i = scale rnorm_g (A_i - (A_i . xn_i)_g xn_i)
//   no norm          d_i = scale A_i
//   dscale_i = sum_j dS_ij cos_ij = A_i . xn_i, or over rnorm where it is folded
#pragma once

#include "backward_preprocess.cuh"

namespace fcsa::backward {

// The threads that work on a tile together: here those of a whole block.
template <int kThreads_>
struct BlockTeam {
  static constexpr int kThreads = kThreads_;
  __device__ static __forceinline__ int thread() { return threadIdx.x; }
  __device__ static __forceinline__ void sync() { __syncthreads(); }
};

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
template <class Element, class Team>
__device__ __forceinline__ void project_groups(float* tile, int tile_stride, const ProjectedRows& p) {
  const int chunk = p.head_dim / p.groups;
  for (int index = Team::thread(); index < p.num_rows * p.groups; index += Team::kThreads) {
    const int row = index / p.groups, group = index % p.groups;
    const Element* x = static_cast<const Element*>(p.x) + row * p.x_stride + group * chunk;
    float* a = tile + row * tile_stride + group * chunk;
    const float rnorm = p.rnorm[static_cast<int64_t>(row) * p.groups + group];
    float dot = 0.0f;
    for (int c = 0; c < chunk; ++c) dot += a[c] * (rnorm * to_float(x[c]));
    for (int c = 0; c < chunk; ++c) a[c] = rnorm * (a[c] - dot * (rnorm * to_float(x[c])));
  }
}

template <class Element, class Team>
__device__ __forceinline__ void write_grouped_dscale(const float* tile, int tile_stride, const ProjectedRows& p) {
  const int chunk = p.head_dim / p.groups;
  for (int row = Team::thread(); row < p.num_rows; row += Team::kThreads) {
    const Element* x = static_cast<const Element*>(p.x) + row * p.x_stride;
    const float* rnorm = p.rnorm + static_cast<int64_t>(row) * p.groups;
    float dot = 0.0f;
    for (int c = 0; c < p.head_dim; ++c) dot += tile[row * tile_stride + c] * (rnorm[c / chunk] * to_float(x[c]));
    p.dscale_rows[row] = dot / p.operand_scale / p.unit * p.dscale_factor;
  }
}

// One group, or none: d = row_factor (A - dot xn) with dot = A . xn, then the scale. rnorm: 1 where there is no norm.
__device__ __forceinline__ float row_factor(const ProjectedRows& p, float rnorm) {
  return !p.folded ? rnorm : p.exact_copies ? power_of_two(rnorm) : 1.0f;
}

__device__ __forceinline__ float row_dscale(const ProjectedRows& p, float rnorm, float dot) {
  const float in_dot = !p.folded ? 1.0f : p.exact_copies ? remainder_of(rnorm) : rnorm;
  return dot * (1.0f / p.operand_scale) / in_dot * (p.dscale_factor / p.unit);
}

// tile: kRows x kHeadDim floats of A in shared memory, rows `tile_stride` apart; p.num_rows of them are real.
// All threads of the team; the tile has been written and synchronised.
template <class Element, int kHeadDim, int kRows, class Team>
__device__ __forceinline__ void project_rows(float* tile, int tile_stride, const ProjectedRows& p) {
  constexpr int kLanes = kHeadDim <= 32 ? 4 : kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;
  const bool grouped = p.rnorm != nullptr && p.groups > 1;
  if (grouped) {
    if (p.dscale_rows != nullptr) write_grouped_dscale<Element, Team>(tile, tile_stride, p);
    Team::sync();
    project_groups<Element, Team>(tile, tile_stride, p);
    Team::sync();
  }
  // Powers of two, taken off one by one: their product may lie beyond the range of floats.
  const float inverse = 1.0f / p.operand_scale, scale = p.scale / p.unit;
  const int lane = Team::thread() % kLanes, column = lane * 8;
  for (int first = 0; first < kRows; first += Team::kThreads / kLanes) {
    const int row = first + Team::thread() / kLanes;
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
        p.dscale_rows[row] = row_dscale(p, rnorm, dot);
      }
      if (p.rnorm != nullptr) {
        const float factor = row_factor(p, rnorm);
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

// What project_rows needs for dq of the queries from query0 on.
template <class Traits>
__device__ __forceinline__ ProjectedRows projected_queries(const BackwardParams& p, const TileIndex& head, int query0,
                                                           int num_rows) {
  using Element = typename Traits::Element;
  const int64_t row = head.first_row(p.b1, p.heads, p.num_queries) + query0;
  ProjectedRows rows = {};
  rows.x = static_cast<const Element*>(p.q) + head.offset(p.q_strides) + query0 * p.q_strides.row;
  rows.x_stride = p.q_strides.row;
  rows.rnorm = p.l2norm_qk ? p.q_rnorm + row * p.groups : nullptr;
  rows.folded = norm_is_folded<Traits>(p), rows.exact_copies = Traits::kExactCopies;
  if (p.dq != nullptr) {
    rows.target = static_cast<Element*>(p.dq) + head.offset(p.dq_strides) + query0 * p.dq_strides.row;
  }
  rows.target_stride = p.dq_strides.row;
  rows.dscale_rows = p.dscale_rows == nullptr ? nullptr : p.dscale_rows + row;
  rows.scale = remaining_scale(p, head.head);
  rows.dscale_factor = 1.0f / row_scale(p, head.head);
  rows.operand_scale = scales_of<Traits>(p, kv_head_of(p, head)).ds, rows.unit = Traits::kUnit;
  rows.num_rows = num_rows, rows.head_dim = p.head_dim, rows.groups = p.groups;
  return rows;
}

// The same for dk of the keys from key0 on of a kv head. mask: of its batch row, or nullptr.
template <class Traits>
__device__ __forceinline__ ProjectedRows projected_keys(const BackwardParams& p, const TileIndex& kv_head, int key0,
                                                        int num_rows, const uint8_t* mask) {
  using Element = typename Traits::Element;
  const int64_t row = kv_head.first_row(p.b1, p.kv_heads, p.num_keys) + key0;
  ProjectedRows rows = {};
  rows.x = static_cast<const Element*>(p.k) + kv_head.offset(p.k_strides) + key0 * p.k_strides.row;
  rows.x_stride = p.k_strides.row;
  rows.rnorm = p.l2norm_qk ? p.k_rnorm + row * p.groups : nullptr;
  rows.folded = norm_is_folded<Traits>(p), rows.exact_copies = Traits::kExactCopies;
  rows.target = static_cast<Element*>(p.dk) + kv_head.offset(p.dk_strides) + key0 * p.dk_strides.row;
  rows.target_stride = p.dk_strides.row;
  rows.scale = scale_in_rows(p) ? 1.0f : head_scale(p, kv_head.head * (p.heads / p.kv_heads));
  rows.operand_scale = scales_of<Traits>(p, kv_head).ds, rows.unit = Traits::kUnit;
  rows.num_rows = num_rows, rows.head_dim = p.head_dim, rows.groups = p.groups;
  rows.visible = mask == nullptr ? nullptr : mask + key0 * p.mask_key, rows.visible_stride = p.mask_key;
  return rows;
}

}  // namespace fcsa::backward
