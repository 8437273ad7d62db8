// Epilogue of the Hopper forward: rows of O and their log-sum-exp, from the accumulator layout to device memory.
#pragma once

#include "../common/reduce.cuh"
#include "../common/vectorized.cuh"
#include "forward_traits.cuh"

namespace fcsa::sm90 {

// Lanes l and l ^ kDistance of a quad trade one word of a pair: the lane with the bit set keeps `b`, the other keeps `a`.
template <int kDistance>
__device__ __forceinline__ void trade(uint32_t& a, uint32_t& b) {
  const bool upper = threadIdx.x & kDistance;
  const uint32_t taken = __shfl_xor_sync(0xffffffffu, upper ? a : b, kDistance);
  a = upper ? taken : a;
  b = upper ? b : taken;
}

// A quad holds, of every 32 columns of a row, four times two columns each; transposed, so that each lane holds eight
// neighbouring ones and stores 16 bytes. words: this lane's packed pairs of the row, one for each eight columns.
template <class Traits>
__device__ __forceinline__ void store_row(typename Traits::Element* row, uint32_t (&words)[Traits::kHeadDim / 8],
                                          int head_dim, bool valid) {
#pragma unroll
  for (int first = 0; first < Traits::kHeadDim / 8; first += 4) {
    trade<1>(words[first], words[first + 1]);
    trade<1>(words[first + 2], words[first + 3]);
    trade<2>(words[first], words[first + 2]);
    trade<2>(words[first + 1], words[first + 3]);
    const int column = first * 8 + threadIdx.x % 4 * 8;
    const uint4 eight = {words[first], words[first + 1], words[first + 2], words[first + 3]};
    store_if(valid && column < head_dim, reinterpret_cast<uint4*>(row + column), eight);
  }
}

template <class Traits>
__device__ __forceinline__ void store_results(const ForwardParams& p, const BlockOfQueries<Traits>& block, int row,
                                              const float (&o)[Traits::kOutColumns / 2], const float (&sum)[2],
                                              const float (&rnorm)[2], const float (&shift)[2], bool write_rnorm) {
  using Element = typename Traits::Element;
  const int64_t first_row = block.first_row(p);
  const Strides& strides = p.out_strides;
  Element* out = static_cast<Element*>(p.out) + block.b0 * strides.b0 + block.b1 * strides.b1 + block.head * strides.head;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total;
    if constexpr (Traits::kSumsByProducts) {
      total = o[Traits::kHeadDim / 2 + half * 2];
    } else {
      total = lane_sum<4>(sum[half]);
    }
    const float reciprocal = total == 0.0f ? 0.0f : 1.0f / total;
    const int query = block.first_query + row + half * 8;
    const bool valid = query < p.num_queries;
    const bool writes = valid && threadIdx.x % 4 == 0;
    store_if(writes, p.lse + first_row + row + half * 8, total == 0.0f ? -INFINITY : shift[half] * kLn2 + logf(total));
    store_if(writes && write_rnorm, p.q_rnorm + first_row + row + half * 8, rnorm[half]);
    uint32_t words[Traits::kHeadDim / 8];
#pragma unroll
    for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
      words[i] = pack<Element>(o[i * 4 + half * 2] * reciprocal, o[i * 4 + half * 2 + 1] * reciprocal);
    }
    store_row<Traits>(out + query * strides.row, words, p.head_dim, valid);
  }
}

}  // namespace fcsa::sm90
