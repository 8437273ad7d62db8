// The five products of the Hopper backward, issued and not waited for; each is one committed group.
#pragma once

#include "backward_scores.cuh"
#include "wgmma.cuh"

namespace fcsa::sm90 {

// S^T = K Q^T, or dP^T = V dO^T: this warpgroup's 64 keys and one square of queries.
template <class Traits>
__device__ __forceinline__ void issue_scores(Square& s, const typename Traits::KeyTile& keys,
                                             const typename Traits::QueryTile& queries, int warpgroup, int square) {
  using Element = typename Traits::Element;
  wgmma_fence();
  wgmma_ss<Element, false>(s, keys.descriptor(warpgroup * kSquare, 0), queries.descriptor(square * kSquare, 0));
#pragma unroll
  for (int step = 1; step < Traits::kHeadDim / 16; ++step) {
    wgmma_ss<Element, true>(s, keys.descriptor(warpgroup * kSquare, step * 16),
                            queries.descriptor(square * kSquare, step * 16));
  }
  wgmma_commit();
}

// dV += P^T dO, or dK += dS'^T Q: this warpgroup's 64 keys, all columns.
template <class Traits>
__device__ __forceinline__ void issue_gradient(float (&gradient)[Traits::kHeadDim / 2], const SquareOperand& scores,
                                               const typename Traits::QueryTile& queries, int square) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSquare / 16; ++step) {
    wgmma_rs_transposed<typename Traits::Element, true>(gradient, scores[step],
                                                        queries.descriptor_transposed(square * kSquare + step * 16));
  }
  wgmma_commit();
}

// dQ = dS' K: 64 queries, 64 columns from `column`, all keys of the block.
template <class Traits>
__device__ __forceinline__ void issue_dq(Square& dq, const typename Traits::ScoreTile& ds,
                                         const typename Traits::KeyTile& keys, int column) {
  using Element = typename Traits::Element;
  wgmma_fence();
  wgmma_ss<Element, false, true, true>(dq, ds.descriptor_transposed(0), keys.descriptor_transposed(0, column));
#pragma unroll
  for (int step = 1; step < Traits::kBlockK / 16; ++step) {
    wgmma_ss<Element, true, true, true>(dq, ds.descriptor_transposed(step * 16),
                                        keys.descriptor_transposed(step * 16, column));
  }
  wgmma_commit();
}

}  // namespace fcsa::sm90
