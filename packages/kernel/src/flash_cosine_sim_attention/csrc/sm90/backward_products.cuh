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
  const uint64_t a = opaque_descriptor(keys.descriptor(warpgroup * kSquare, 0));
  const uint64_t b = opaque_descriptor(queries.descriptor(square * kSquare, 0));
  wgmma_fence();
  wgmma_ss<Element, false>(s, a, b);
#pragma unroll
  for (int step = 1; step < Traits::kHeadDim / 16; ++step) {
    wgmma_ss<Element, true>(s, a + Traits::KeyTile::column_step(step * 16), b + Traits::QueryTile::column_step(step * 16));
  }
  wgmma_commit();
}

// dV += P^T dO, or dK += dS'^T Q: this warpgroup's 64 keys, all columns.
template <class Traits>
__device__ __forceinline__ void issue_gradient(float (&gradient)[Traits::kHeadDim / 2], const SquareOperand& scores,
                                               const typename Traits::QueryTile& queries, int square) {
  const uint64_t b = opaque_descriptor(queries.descriptor_transposed(square * kSquare));
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kSquare / 16; ++step) {
    wgmma_rs_transposed<typename Traits::Element, true>(gradient, scores[step], b + Traits::QueryTile::row_step(step * 16));
  }
  wgmma_commit();
}

// dQ = dS' K: 64 queries, 64 columns from `column`, all keys of the block.
template <class Traits>
__device__ __forceinline__ void issue_dq(Square& dq, const typename Traits::ScoreTile& ds,
                                         const typename Traits::KeyTile& keys, int column) {
  using Element = typename Traits::Element;
  const uint64_t a = opaque_descriptor(ds.descriptor_transposed(0));
  const uint64_t b = opaque_descriptor(keys.descriptor_transposed(0, column));
  wgmma_fence();
  wgmma_ss<Element, false, true, true>(dq, a, b);
#pragma unroll
  for (int step = 1; step < Traits::kBlockK / 16; ++step) {
    wgmma_ss<Element, true, true, true>(dq, a + Traits::ScoreTile::row_step(step * 16),
                                        b + Traits::KeyTile::row_step(step * 16));
  }
  wgmma_commit();
}

}  // namespace fcsa::sm90
