// Squares of transposed scores in registers: S -> P -> dS', and on to the operands of the next products.
#pragma once

#include "../common/vectorized.cuh"
#include "backward_traits.cuh"
#include "ptx.cuh"

namespace fcsa::sm90 {

// What a consumer thread is: two keys (`row` and row + 8 of the block) and, of every eight queries, two.
template <class Traits>
struct KeyThread {
  int thread;      // within the warpgroup
  int warpgroup;   // owns keys 64 * warpgroup ...
  int row, column; // its first key in the block, its first query in every eight
  float factor[2]; // k_rnorm where the norm is folded; 0 for keys that are not there: so is then their dS'
  float score_factor[2];  // the same times scale * log2(e)
  int first_query[2];  // the first query that sees the key

  __device__ __forceinline__ KeyThread(const BackwardParams& p, const BlockOfKeys<Traits>& block) {
    const int index = threadIdx.x - 128, lane = threadIdx.x % 32;
    thread = index % 128;
    warpgroup = __shfl_sync(0xffffffffu, index / 128, 0);  // known to be the same in all lanes: a uniform register
    row = index / 32 * 16 + lane / 4;
    column = lane % 4 * 2;
    const uint8_t* mask = mask_row(p, block.index);
    const int64_t row0 = block.index.first_row(p.b1, p.kv_heads, p.num_keys) + block.first_key;
    const bool folded = norm_is_folded<Traits>(p);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = row + 8 * half;
      bool visible = key < block.num_keys;
      if (visible && mask != nullptr) visible = mask[(block.first_key + key) * p.mask_key] != 0;
      factor[half] = !visible ? 0.0f : folded ? folded_factor<Traits>(p.k_rnorm[row0 + key]) : 1.0f;
      score_factor[half] = factor[half] * (head_scale(p, block.index.head * block.group) * kLog2e);
      first_query[half] = !visible ? INT32_MAX : p.causal ? block.first_key + key - (p.num_keys - p.num_queries) : INT32_MIN / 2;
    }
  }
};

using Square = float[kSquare / 2];              // accumulators of 64 keys x 64 queries
using SquareOperand = uint32_t[kSquare / 16][4];  // the same, rounded, as A operands of the k16 steps over the queries

// S -> P, rounded, as an operand, and P times the query's factor of the gradient, of the queries [kFirst, kEnd) of the square.
// rows: of its queries (common/backward_preprocess.cuh); query0: the first of them.
template <class Traits, bool kMasked, int kFirst = 0, int kEnd = kSquare>
__device__ __forceinline__ void probabilities(SquareOperand& operand, Square& s, const KeyThread<Traits>& thread,
                                              const float4* rows, int query0) {
  const int limit[2] = {thread.first_query[0] - query0, thread.first_query[1] - query0};
#pragma unroll
  for (int i = kFirst / 8; i < kEnd / 8; ++i) {
    const float4 row = rows[i * 8 + thread.column];  // gradient, gradient, shift, shift of two queries
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& first = s[i * 4 + half * 2];
      float& second = s[i * 4 + half * 2 + 1];
      first = exp2_approx(fmaf(first * thread.score_factor[half], row.x, row.z));
      second = exp2_approx(fmaf(second * thread.score_factor[half], row.y, row.w));
      if constexpr (kMasked) {  // selects, no branches: those would serialise the products under way
        first = i * 8 + thread.column >= limit[half] ? first : 0.0f;
        second = i * 8 + thread.column + 1 >= limit[half] ? second : 0.0f;
      }
      operand[i / 2][i % 2 * 2 + half] = pack<typename Traits::Element>(first, second);
      first *= row.x;
      second *= row.y;
    }
  }
}

// dP -> dS' = P gradient (dP - delta) k_factor. s: P gradient.
template <class Traits>
__device__ __forceinline__ void differentiate(Square& dp, const Square& s, const KeyThread<Traits>& thread,
                                              const float4* rows) {
#pragma unroll
  for (int i = 0; i < kSquare / 8; ++i) {
    const float2 minus_delta = *reinterpret_cast<const float2*>(rows + i * 8 + thread.column + 1);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = i * 4 + half * 2;
      dp[at] = s[at] * (dp[at] + minus_delta.x) * thread.factor[half];
      dp[at + 1] = s[at + 1] * (dp[at + 1] + minus_delta.y) * thread.factor[half];
    }
  }
}

template <class Element>
__device__ __forceinline__ void pack_square(SquareOperand& operand, const Square& x) {
#pragma unroll
  for (int step = 0; step < kSquare / 16; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) operand[step][r] = pack<Element>(x[step * 8 + r * 2], x[step * 8 + r * 2 + 1]);
  }
}

// A warp's sixteen keys of dS' into the tile that dq is made from.
template <class Traits>
__device__ __forceinline__ void store_square(typename Traits::ScoreTile& tile, const SquareOperand& ds) {
  const int warp = (threadIdx.x - 128) / 32, lane = threadIdx.x % 32;
  const auto first = reinterpret_cast<uintptr_t>(tile.chunk(warp * 16 + lane % 16, lane / 16 * 8));
#pragma unroll
  for (int step = 0; step < kSquare / 16; ++step) {  // chunks of a row are permuted by XOR: so are the steps to them
    store_matrix_x4(reinterpret_cast<void*>(first ^ step * 32), ds[step]);
  }
}

}  // namespace fcsa::sm90
