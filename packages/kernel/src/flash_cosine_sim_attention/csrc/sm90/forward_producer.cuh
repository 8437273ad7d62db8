// The producer warpgroup of the Hopper forward: warp 0 feeds TMA, warps 1 to 3 take the norms of the keys.
//
// Rings: tile t of K and V lies in stage t % kStages, its factors in slot t % kFactorStages. A slot is free for tile t once
// the exponentials of tile t - kFactorStages are done. Nobody waits for that explicitly: K of tile t was loaded after the
// scores of tile t - kStages were released, which a consumer does behind the exponentials of tile t - kStages - 1.
#pragma once

#include "../common/reduce.cuh"
#include "../common/vectorized.cuh"
#include "../norm/l2norm_forward.cuh"
#include "forward_traits.cuh"

namespace fcsa::sm90 {

template <class Tile>
__device__ __forceinline__ void load_tile(Tile& tile, const TensorMap& source, int first_row, int head, int b1, int b0,
                                          uint64_t& barrier) {
  arrive_and_expect(barrier, Tile::kBytes);
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    const int32_t coordinates[5] = {panel * Tile::kPanelCols, first_row, head * source.head_step, b1 * source.b1_step,
                                    b0 * source.b0_step};
    load_box(tile.data + panel * Tile::kPanelElements, source.map, coordinates, barrier);
  }
}

// One thread. K runs ahead of V by the two tiles whose scores the consumers keep under way.
template <class Traits>
__device__ __forceinline__ void load_tiles(const ForwardParams& p, const ForwardMaps& maps, const Schedule& schedule,
                                           ForwardStorage<Traits>& smem) {
  RingPosition<Traits::kStages> k_ring, v_ring;
  uint32_t q_phase = 0;
  for (uint32_t index = blockIdx.x; index < schedule.num_items; index += gridDim.x) {
    const auto block = BlockOfQueries<Traits>::from(p, schedule, index);
    if (block.num_tiles == 0) continue;
    wait(smem.empty_q, q_phase ^ 1);
    q_phase ^= 1;
    load_tile(smem.q, maps.q, block.first_query, block.head, block.b1, block.b0, smem.full_q);
    for (int step = 0; step < block.num_tiles + 2; ++step) {
      const int k_tile = block.num_tiles - 1 - step, v_tile = k_tile + 2;
      if (k_tile >= 0) {
        wait(smem.empty_k[k_ring.stage], k_ring.phase ^ 1);
        load_tile(smem.k[k_ring.stage], maps.k, k_tile * Traits::kBlockN, block.kv_head, block.b1, block.b0,
                  smem.full_k[k_ring.stage]);
        k_ring.advance();
      }
      if (step >= 2) {
        wait(smem.empty_v[v_ring.stage], v_ring.phase ^ 1);
        load_tile(smem.v[v_ring.stage], maps.v, v_tile * Traits::kBlockN, block.kv_head, block.b1, block.b0,
                  smem.full_v[v_ring.stage]);
        v_ring.advance();
      }
    }
  }
}

// 1 / |k_j| of one tile, rows from `first` in steps of `stride` groups of four; eight lanes a row. The permutation of the
// chunks within a row does not matter to a sum.
template <class Traits>
__device__ __forceinline__ void key_norms(float* factor, const typename Traits::KeyTile& k, float* k_rnorm, int num_keys,
                                          int warp) {
  const int lane = threadIdx.x % 32;
  for (int group = warp; group < Traits::kBlockN / 4; group += Traits::kNormWarps) {
    const int row = group * 4 + lane / 8;
    float sum = 0.0f;
#pragma unroll
    for (int panel = 0; panel < Traits::KeyTile::kPanels; ++panel) {
      float x[8];
      load8(x, k.data + panel * Traits::KeyTile::kPanelElements + row * 64 + lane % 8 * 8);
#pragma unroll
      for (int c = 0; c < 8; ++c) sum = fmaf(x[c], x[c], sum);
    }
    const float rnorm = reciprocal_norm(lane_sum<8>(sum));
    if (lane % 8 == 0) {
      factor[row] = rnorm;
      if (k_rnorm != nullptr && row < num_keys) k_rnorm[row] = rnorm;
    }
  }
}

// Three warps: the factors of every tile of keys, 1 where the keys come normalised. The last block of the first query head
// of each kv head writes them out for the backward.
template <class Traits>
__device__ __forceinline__ void find_key_factors(const ForwardParams& p, const Schedule& schedule,
                                                 ForwardStorage<Traits>& smem, int warp) {
  const bool folded = p.l2norm_qk && p.k_unit == nullptr;
  const int lane = threadIdx.x % 32;
  RingPosition<Traits::kStages> ring;
  RingPosition<Traits::kFactorStages> slot;
  for (uint32_t index = blockIdx.x; index < schedule.num_items; index += gridDim.x) {
    const auto block = BlockOfQueries<Traits>::from(p, schedule, index);
    const bool writes = folded && block.is_last && block.head % (p.heads / p.kv_heads) == 0;
    for (int tile = block.num_tiles - 1; tile >= 0; --tile) {
      wait(smem.full_k[ring.stage], ring.phase);
      float* factor = smem.k_factor[slot.stage];
      const int first_key = tile * Traits::kBlockN;
      if (folded) {
        float* k_rnorm = writes ? p.k_rnorm + block.first_key(p) + first_key : nullptr;
        key_norms<Traits>(factor, smem.k[ring.stage], k_rnorm, p.num_keys - first_key, warp);
      } else {
        for (int key = warp * 32 + lane; key < Traits::kBlockN; key += Traits::kNormWarps * 32) factor[key] = 1.0f;
      }
      __syncwarp();
      if (lane == 0) {
        arrive(smem.full_factor[slot.stage]);
        arrive(smem.empty_k[ring.stage]);
      }
      ring.advance();
      slot.advance();
    }
  }
}

}  // namespace fcsa::sm90
