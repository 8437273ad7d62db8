// The producer warp of the Hopper forward: it feeds TMA and hands out the norm factors of the keys.
#pragma once

#include "forward_traits.cuh"
#include "load_tile.cuh"

namespace fcsa::sm90 {

// One warp. Its lanes write the norm factors of the keys; lane 0 issues the copies.
//
// A slot of k_factor is free when the product with V of the tile that used it is done. K of tile t is loaded after the
// wait for V's slot of tile t - 1, that is, after tile t - 1 - kStages is done: kFactorStages > kStages slots suffice.
template <class Traits>
__device__ __forceinline__ void produce(const ForwardParams& p, const ForwardMaps& maps, const Schedule& schedule,
                                        ForwardStorage<Traits>& smem) {
  const int lane = threadIdx.x % 32;
  RingPosition<Traits::kStages> ring;
  RingPosition<Traits::kFactorStages> factors;
  uint32_t q_phase = 0;
  for (uint32_t index = blockIdx.x; index < schedule.num_items; index += gridDim.x) {
    const auto block = BlockOfQueries<Traits>::from(p, schedule, index);
    if (block.num_tiles == 0) continue;
    const int kv_head = block.head / (p.heads / p.kv_heads);
    const int64_t first_key = ((static_cast<int64_t>(block.b0) * p.b1 + block.b1) * p.kv_heads + kv_head) * p.num_keys;
    const float* k_rnorm = p.k_rnorm != nullptr && p.k_unit == nullptr ? p.k_rnorm + first_key : nullptr;

    wait(smem.empty_q, q_phase ^ 1);
    q_phase ^= 1;
    if (lane == 0) {
      arrive_and_expect(smem.full_q, Traits::QueryTile::kBytes);
      load_tile(smem.q, maps.q, block.first_query, block.head, block.b1, block.b0, smem.full_q);
    }
    for (int tile = block.num_tiles - 1; tile >= 0; --tile) {
      float factor[Traits::kBlockN / 32];
#pragma unroll
      for (int i = 0; i < Traits::kBlockN / 32; ++i) {
        const int key = tile * Traits::kBlockN + i * 32 + lane;
        factor[i] = k_rnorm == nullptr ? 1.0f : key < p.num_keys ? k_rnorm[key] : 0.0f;
      }
      wait(smem.empty_k[ring.stage], ring.phase ^ 1);
#pragma unroll
      for (int i = 0; i < Traits::kBlockN / 32; ++i) smem.k_factor[factors.stage][i * 32 + lane] = factor[i];
      __syncwarp();
      if (lane == 0) {
        arrive_and_expect(smem.full_k[ring.stage], Traits::KeyTile::kBytes);
        load_tile(smem.k[ring.stage], maps.k, tile * Traits::kBlockN, kv_head, block.b1, block.b0, smem.full_k[ring.stage]);
      }
      wait(smem.empty_v[ring.stage], ring.phase ^ 1);
      if (lane == 0) {
        arrive_and_expect(smem.full_v[ring.stage], Traits::KeyTile::kBytes);
        load_tile(smem.v[ring.stage], maps.v, tile * Traits::kBlockN, kv_head, block.b1, block.b0, smem.full_v[ring.stage]);
      }
      ring.advance();
      factors.advance();
    }
  }
}

}  // namespace fcsa::sm90
