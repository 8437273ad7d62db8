// The warps of the Hopper backward that move data: one feeds TMA, one for each consumer warpgroup adds its dq to device memory.
#pragma once

#include "../common/launch.cuh"
#include "backward_dq.cuh"
#include "backward_order.cuh"
#include "backward_traits.cuh"
#include "load_tile.cuh"

namespace fcsa::sm90 {

// One thread. The tiles of a block of keys are loaded while the gradients of the one before are on their way out.
template <class Traits>
__device__ __forceinline__ void produce(const BackwardParams& p, const BackwardMaps& maps,
                                        const BlockOfKeys<Traits>& block, BackwardStorage<Traits>& smem,
                                        RingPosition<Traits::kStages>& ring, uint32_t& kv_phase) {
  const TileIndex& kv = block.index;
  wait(smem.empty_kv, kv_phase ^ 1);
  kv_phase ^= 1;
  arrive_and_expect(smem.full_kv, 2 * Traits::KeyTile::kBytes);
  load_tile(smem.loop.v, maps.v, block.first_key, kv.head, kv.b1, kv.b0, smem.full_kv);
  if (p.k_unit == nullptr) load_tile(smem.loop.k, maps.k, block.first_key, kv.head, kv.b1, kv.b0, smem.full_kv);
  wait_for_prologue();
  if (p.k_unit != nullptr) load_tile(smem.loop.k, maps.k, block.first_key, kv.head, kv.b1, kv.b0, smem.full_kv);
  for (int i = 0; i < block.group; ++i) {
    const TileIndex head = block.query_head(i);
    const float4* query_rows = p.query_rows + head.first_row(p.b1, p.heads, padded_queries(p.num_queries));
    for (int step = block.first_step; step < block.end_step; ++step) {
      const int query = step * Traits::kBlockQ, stage = ring.stage;
      wait(smem.empty_q[stage], ring.phase ^ 1);
      arrive_and_expect(smem.full_q[stage], Traits::QueryTile::kBytes);
      load_tile(smem.loop.q[stage], maps.q, query, head.head, head.b1, head.b0, smem.full_q[stage]);
      wait(smem.empty_dout[stage], ring.phase ^ 1);
      arrive_and_expect(smem.full_dout[stage], Traits::QueryTile::kBytes + sizeof(smem.query_rows[stage]));
      load_tile(smem.loop.dout[stage], maps.dout, query, head.head, head.b1, head.b0, smem.full_dout[stage]);
      bulk_load(smem.query_rows[stage], query_rows + query, sizeof(smem.query_rows[stage]), smem.full_dout[stage]);
      ring.advance();
    }
  }
}

// A warpgroup's part of dq of a step.
template <class Traits>
__device__ __forceinline__ void add_unit(const BackwardParams& p, const TileIndex& head, int step,
                                         BackwardStorage<Traits>& smem, int warpgroup, uint32_t& phase) {
  float* units = dq_units<Traits>(p, head, step * Traits::kBlockQ);
  wait(smem.full_dq[warpgroup], phase);
  phase ^= 1;
  bulk_reduce_add_f32(units + warpgroup * kUnitFloats, smem.dq[warpgroup], sizeof(smem.dq[warpgroup]));
  bulk_commit();
  bulk_wait_read<0>();
  arrive(smem.empty_dq[warpgroup]);
}

// One thread for each consumer warpgroup.
template <class Traits>
__device__ __forceinline__ void add_dq(const BackwardParams& p, const BlockOfKeys<Traits>& block,
                                       BackwardStorage<Traits>& smem, int warpgroup, uint32_t& phase) {
  for (int i = 0; i < block.group; ++i) {
    const TileIndex head = block.query_head(i);
    for (int step = block.first_step; step < block.end_step; ++step) {
      add_unit<Traits>(p, head, step, smem, warpgroup, phase);
    }
  }
}

// The same in the order of backward_order.cuh. A block without a visible key takes its turns too, and adds nothing.
template <class Traits>
__device__ __forceinline__ void add_dq_in_order(const BackwardParams& p, const BlockOfKeys<Traits>& block,
                                                BackwardStorage<Traits>& smem, int warpgroup, uint32_t& phase) {
  constexpr int kSteps = DqTurns<Traits>::kSteps;
  DqTurns<Traits> turns(p, block, warpgroup);
  const int num_steps = ceil_div(p.num_queries, Traits::kBlockQ);
  for (int i = 0; i < block.group; ++i) {
    const TileIndex head = block.query_head(i);
    for (int step = block.first_step; step < num_steps; ++step) {
      if (step == block.first_step || step % kSteps == 0) turns.wait_for(i, step / kSteps);
      if (step < block.end_step) add_unit<Traits>(p, head, step, smem, warpgroup, phase);
      if (step + 1 == num_steps || (step + 1) % kSteps == 0) turns.pass_on(i, step / kSteps);
    }
  }
}

}  // namespace fcsa::sm90
