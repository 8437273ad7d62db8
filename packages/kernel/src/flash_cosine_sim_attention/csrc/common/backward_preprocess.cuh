// What the backward needs of every query row before it starts, and how norm and learned scale enter it.
#pragma once

#include "../norm/l2norm_forward.cuh"
#include "../norm/split.cuh"
#include "../params.h"
#include "softmax.cuh"
#include "tile_index.cuh"

namespace fcsa {

// Rows of the workspaces of one (b0, b1, head) are padded to a multiple of this, so that tiles load without bounds.
constexpr int kQueryPadding = 128;

__host__ __device__ constexpr int padded_queries(int num_queries) {
  return ceil_div(num_queries, kQueryPadding) * kQueryPadding;
}

// Of BackwardParams::dq_progress.
__device__ __forceinline__ int64_t num_progress_words(const Problem& p) {
  return static_cast<int64_t>(ceil_div(p.num_keys, 128)) * p.kv_heads * p.b1 * p.b0 * 2;
}

// With t = (q_i . k_j) * k_factor_j, log2 P_ij = t * score + shift, and dS'_ij = P_ij * (dP_ij * gradient + offset).
// Rows 2 r and 2 r + 1 lie together as {score, score, shift, shift}, {gradient, gradient, offset, offset}: a thread
// holds two neighbouring queries of a transposed score. Where score / gradient is one number a head (Traits::kScaleInKeys) it
// goes into another k_factor, and six numbers remain: {gradient, gradient, shift, shift}, {-delta, -delta, unused}.
// float32: the powers of two that its operands carry (OperandScales, kUnit, kProbabilityScale) are undone or put on here.
// A row that sees no key, and a row of padding, has shift -inf and zeros elsewhere: P and dS' are 0.
struct QueryRow {
  float score;     // scale * q_rnorm * log2(e)
  float shift;     // -lse * log2(e)
  float gradient;  // q_rnorm * row_scale
  float offset;    // -delta * q_rnorm * row_scale,  delta = sum_c dout_c out_c - dlse
};

__device__ __forceinline__ QueryRow query_row(const float4* rows, int row) {
  const float* source = reinterpret_cast<const float*>(rows + row / 2 * 2) + row % 2;
  return {source[0], source[2], source[4], source[6]};
}

__device__ __forceinline__ TileIndex kv_head_of(const Problem& p, const TileIndex& head) {
  TileIndex result = head;
  result.head = head.head / (p.heads / p.kv_heads);
  return result;
}

// How the norm meets the products: folded into the factors of QueryRow and k_factor, or by unit copies, or not at all.
// Copies that are scaled by powers of two (kExactCopies) leave the remainders of the norms to be folded.
template <class Traits>
__device__ __forceinline__ bool norm_is_folded(const Problem& p) {
  return p.l2norm_qk && (Traits::kExactCopies ? p.groups == 1 : p.q_unit == nullptr);
}

// The factor that is folded for a row of q or k.
template <class Traits>
__device__ __forceinline__ float folded_factor(float rnorm) {
  return Traits::kExactCopies ? remainder_of(rnorm) : rnorm;
}

__device__ __forceinline__ float head_scale(const Problem& p, int head) {
  return p.scale != nullptr ? p.scale[head] : p.scale_value;
}

// Query heads of one kv head may have learned scales of their own; dk mixes them, so there dS' carries the scale.
__device__ __forceinline__ bool scale_in_rows(const Problem& p) { return p.scale != nullptr && p.heads != p.kv_heads; }

// The scale that dS' carries: never 0, since dscale is divided by it. Products for dk skip heads of scale 0.
__device__ __forceinline__ float row_scale(const Problem& p, int head) {
  const float scale = head_scale(p, head);
  return scale_in_rows(p) && scale != 0.0f ? scale : 1.0f;
}

// The scale that is still to be multiplied to sums of dS'.
__device__ __forceinline__ float remaining_scale(const Problem& p, int head) {
  const float scale = head_scale(p, head);
  return scale_in_rows(p) && scale != 0.0f ? 1.0f : scale;
}

// Powers of two that the operands of float32 carry (norm/split.cuh), of one kv head; all 1 for half types.
struct OperandScales {
  float dout = 1.0f, v = 1.0f;
  float ds = 1.0f;  // what dS' is multiplied by on top of QueryRow's factors, to lie in the range of halves
};

// |dS'| <= (|dP| + |delta|) |row_scale| <= (2 d max|dout| max|v| + max|dlse|) max|row_scale|
__device__ __forceinline__ OperandScales operand_scales(const BackwardParams& p, const TileIndex& kv_head) {
  const int64_t index = kv_head.first_row(p.b1, p.kv_heads, 1);
  const float v = p.v_largest[index], dout = p.dout_largest[index];
  const float dlse = p.dout_largest[static_cast<int64_t>(p.b0) * p.b1 * p.kv_heads + index];
  const int group = p.heads / p.kv_heads;
  float largest_scale = 0.0f;
  for (int i = 0; i < (scale_in_rows(p) ? group : 1); ++i) {
    largest_scale = fmaxf(largest_scale, fabsf(row_scale(p, kv_head.head * group + i)));
  }
  return {split_scale(dout), split_scale(v), split_scale((2.0f * p.head_dim * dout * v + dlse) * largest_scale)};
}

template <class Traits>
__device__ __forceinline__ OperandScales scales_of(const BackwardParams& p, const TileIndex& kv_head) {
  if constexpr (Traits::kFloat) return operand_scales(p, kv_head);
  return {};
}

}  // namespace fcsa
