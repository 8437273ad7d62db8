// The queries of a consumer warpgroup of the Hopper forward: operands of S, their norms, and S itself.
#pragma once

#include "../norm/l2norm_forward.cuh"
#include "forward_traits.cuh"
#include "wgmma.cuh"

namespace fcsa::sm90 {

// The two rows of a block that this thread holds: `row` and row + 8 of its warp's sixteen.
struct ConsumerThread {
  int warpgroup;  // 0 .. kConsumerWarpgroups - 1
  int row;        // of the block, the first of the two
  int column;     // first of the two columns in every eight
  bool releases;  // arrives at barriers for its warp

  __device__ ConsumerThread() {
    const int thread = threadIdx.x - 128, lane = threadIdx.x % 32;
    // By votes, whose results the compiler knows to be equal within a warp: else what follows the wait for a warpgroup's
    // queries, the ring and the descriptors, leaves the uniform registers, 30 instructions a tile.
    warpgroup = __any_sync(0xffffffffu, thread >= 128) + __any_sync(0xffffffffu, thread >= 256);
    row = thread / 32 * 16 + lane / 4;
    column = lane % 4 * 2;
    releases = lane == 0;
  }
};

// The queries of this thread as operands of S = q k^T, where they stay in registers for the walk.
template <class Traits>
struct QueryFragments {
  uint32_t words[Traits::kHeadDim / 16][4];

  __device__ __forceinline__ void load(const typename Traits::QueryTile& q, const ConsumerThread& thread) {
    const int lane = threadIdx.x % 32, row = thread.row % 64 - lane / 4 + lane % 16;
#pragma unroll
    for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
      load_matrix_x4(words[step], q.chunk(row, step * 16 + lane / 16 * 8));
    }
  }

  __device__ __forceinline__ void row_norms(float (&rnorm)[2]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
#pragma unroll
      for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float2 x = unpack<typename Traits::Element>(words[step][i * 2 + half]);
          sum = fmaf(x.x, x.x, fmaf(x.y, x.y, sum));
        }
      }
      rnorm[half] = reciprocal_norm(lane_sum<4>(sum));
    }
  }
};

// 1 / |q_i| of rows `row` and row + 8 of a tile in shared memory. A quad shares a row; the permutation of the chunks
// within a row does not matter to a sum.
template <class Traits>
__device__ __forceinline__ void row_norms(float (&rnorm)[2], const typename Traits::QueryTile& q, int row) {
  using Element = typename Traits::Element;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 0.0f;
#pragma unroll
    for (int panel = 0; panel < Traits::QueryTile::kPanels; ++panel) {
      const Element* start = q.data + panel * Traits::QueryTile::kPanelElements + (row + half * 8) * 64;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float x[8];
        load8(x, start + (lane % 4 * 2 + i + lane / 4 & 7) * 8);
#pragma unroll
        for (int c = 0; c < 8; ++c) sum = fmaf(x[c], x[c], sum);
      }
    }
    rnorm[half] = reciprocal_norm(lane_sum<4>(sum));
  }
}

// Issues S = q k^T for this warpgroup's 64 rows and the keys of each part, a group of wgmma a part; not waited for.
template <class Traits>
__device__ __forceinline__ void issue_scores(float (&s)[Traits::kParts][Traits::kPartN / 2], const QueryFragments<Traits>& fragments,
                                             const typename Traits::QueryTile& q, const typename Traits::KeyTile& k) {
  using Element = typename Traits::Element;
#pragma unroll
  for (int part = 0; part < Traits::kParts; ++part) {
    wgmma_fence();
    const int key = part * Traits::kPartN;
    if constexpr (Traits::kQueriesInRegisters) {
      wgmma_rs<Element, false>(s[part], fragments.words[0], k.descriptor(key, 0));
#pragma unroll
      for (int step = 1; step < Traits::kHeadDim / 16; ++step) {
        wgmma_rs<Element, true>(s[part], fragments.words[step], k.descriptor(key, step * 16));
      }
    } else {
      wgmma_ss<Element, false>(s[part], q.descriptor(0, 0), k.descriptor(key, 0));
#pragma unroll
      for (int step = 1; step < Traits::kHeadDim / 16; ++step) {
        wgmma_ss<Element, true>(s[part], q.descriptor(0, step * 16), k.descriptor(key, step * 16));
      }
    }
    wgmma_commit();
  }
}

}  // namespace fcsa::sm90
