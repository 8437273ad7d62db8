// What the backward needs of every query row before it starts, and zeros in the accumulator of dq.
#pragma once

#include "../norm/l2norm_forward.cuh"
#include "../norm/split.cuh"
#include "../params.h"
#include "reduce.cuh"
#include "softmax.cuh"
#include "tile_index.cuh"
#include "vectorized.cuh"

namespace fcsa {

// Rows of the workspaces of one (b0, b1, head) are padded to a multiple of this, so that tiles load without bounds.
constexpr int kQueryPadding = 128;

__host__ __device__ constexpr int padded_queries(int num_queries) {
  return ceil_div(num_queries, kQueryPadding) * kQueryPadding;
}

// With t = (q_i . k_j) * k_factor_j, log2 P_ij = t * score + shift, and dS'_ij = P_ij * (dP_ij * gradient + offset).
// Rows 2 r and 2 r + 1 lie together as {score, score, shift, shift}, {gradient, gradient, offset, offset}: a thread
// holds two neighbouring queries of a transposed score. Where score / gradient is one number a head (Traits::kScaleInKeys) it
// goes into another k_factor, and six numbers remain: {gradient, gradient, shift, shift}, {-delta, -delta}. float32: the powers of two that its operands carry
// (OperandScales, kUnit, kProbabilityScale) are undone or put on here. A row that sees no key, and a row of padding,
// has shift -inf and zeros elsewhere: P and dS' are 0.
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

namespace backward {

constexpr int kPreprocessThreads = 256;

// One row in kLanesPerRow lanes, eight columns each.
template <class Traits, int kLanesPerRow>
__global__ void __launch_bounds__(kPreprocessThreads) preprocess_kernel(const __grid_constant__ BackwardParams p) {
  using Element = typename Traits::Element;
  constexpr int kRows = kPreprocessThreads / kLanesPerRow, kHeadDim = Traits::kHeadDim;
  const int padded = padded_queries(p.num_queries);
  const TileIndex index = TileIndex::from_block(blockIdx.x, padded / kRows, p.heads, p.b1);
  const int row = index.tile * kRows + threadIdx.x / kLanesPerRow;
  const int lane = threadIdx.x % kLanesPerRow, column = lane * 8;
  const int64_t padded_row = index.first_row(p.b1, p.heads, padded) + row;

  float product = 0.0f;
  if (row < p.num_queries && column < p.head_dim) {
    float dout[8], out[8];
    load8(dout, static_cast<const Element*>(p.dout) + index.offset(p.dout_strides) + row * p.dout_strides.row + column);
    load8(out, static_cast<const Element*>(p.out) + index.offset(p.out_strides) + row * p.out_strides.row + column);
#pragma unroll
    for (int c = 0; c < 8; ++c) product += dout[c] * out[c];
  }
  float delta = lane_sum<kLanesPerRow>(product);

  if (lane == 0) {
    QueryRow result = {0.0f, -INFINITY, 0.0f, 0.0f};
    if (row < p.num_queries) {
      const int64_t source = index.first_row(p.b1, p.heads, p.num_queries) + row;
      if (p.dlse != nullptr) delta -= p.dlse[source];
      const float lse = p.lse[source];
      const float rnorm = norm_is_folded<Traits>(p) ? folded_factor<Traits>(p.q_rnorm[source]) : 1.0f;
      if (lse != -INFINITY) {
        float factor = rnorm * row_scale(p, index.head);
        const OperandScales scales = scales_of<Traits>(p, kv_head_of(p, index));
        factor *= scales.ds / Traits::kProbabilityScale;
        const float score = head_scale(p, index.head) * rnorm * kLog2e / (Traits::kUnit * Traits::kUnit);
        const float shift = Traits::kLog2ProbabilityScale - lse * kLog2e;
        result = {score, shift, factor / scales.dout / scales.v, -delta * factor};
      }
    }
    float* target = reinterpret_cast<float*>(p.query_rows + padded_row / 2 * 2) + padded_row % 2;
    if constexpr (Traits::kScaleInKeys) {
      target[0] = result.gradient, target[2] = result.shift, target[4] = result.gradient == 0.0f ? 0.0f : -delta;
    } else {
      target[0] = result.score, target[2] = result.shift, target[4] = result.gradient, target[6] = result.offset;
    }
  }
  if (p.dq_accum != nullptr && column < kHeadDim) {
    float4* target = reinterpret_cast<float4*>(p.dq_accum + padded_row * kHeadDim + column);
    target[0] = target[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  }
}

template <class Traits>
cudaError_t launch_preprocess(const BackwardParams& p, cudaStream_t stream) {
  constexpr int kHeadDim = Traits::kHeadDim;
  constexpr int kLanesPerRow = kHeadDim <= 32 ? 4 : kHeadDim <= 64 ? 8 : kHeadDim <= 128 ? 16 : 32;
  constexpr int kRows = kPreprocessThreads / kLanesPerRow;
  static_assert(kQueryPadding % kRows == 0);
  const int64_t blocks = static_cast<int64_t>(padded_queries(p.num_queries) / kRows) * p.heads * p.b1 * p.b0;
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  preprocess_kernel<Traits, kLanesPerRow><<<static_cast<uint32_t>(blocks), kPreprocessThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace backward
}  // namespace fcsa
