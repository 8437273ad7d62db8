// The Hopper backward: dk and dv of a block of keys in registers, dq by bulk additions to a float accumulator.
//
//   S^T (keys x queries) = K Q^T          P^T  = exp2(S^T factors + shift)
//   dP^T                 = V dO^T         dS'^T = P^T (dP^T gradient + offset) k_factor
//   dV += P^T dO          dK += dS'^T Q          dQ (queries x d) = dS' K, dS' through shared memory
//
// Two consumer warpgroups own 64 keys each. P^T and dS'^T go from accumulators to operands in registers; for dQ, which
// needs the keys of both, dS' is exchanged through shared memory, and each warpgroup makes a part of dQ. While one group of
// products runs the warpgroup works on the scores of another: drawn in docs/kernels.md.
#pragma once

#include "backward_epilogue.cuh"
#include "backward_producer.cuh"
#include "backward_products.cuh"

namespace fcsa::sm90 {

template <class Traits>
struct BackwardState {
  float dk[Traits::kHeadDim / 2], dv[Traits::kHeadDim / 2];
  Square s;  // of the square that comes next: its product is done
  RingPosition<Traits::kStages> ring;
  uint32_t dq_phase = 1, kv_phase = 0;
  bool has_previous = false;  // a step is done, but for its dQ
};

constexpr int kConsumerBarrier = 1;  // where the consumer warpgroups meet

// Hands this warpgroup's part of dq of a step to the warp that adds it to device memory.
template <class Traits>
__device__ __forceinline__ void hand_over_dq(const Square& dq, const KeyThread<Traits>& thread,
                                             BackwardStorage<Traits>& smem, uint32_t& phase) {
  wait(smem.empty_dq[thread.warpgroup], phase);
  phase ^= 1;
  store_unit(smem.dq[thread.warpgroup], dq, thread.thread);
  fence_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(smem.full_dq[thread.warpgroup]);
}

// This warp's dS' of a step is in shared memory.
template <class Traits>
__device__ __forceinline__ void publish_scores(uint64_t& full_ds) {
  fence_async_shared();
  __syncwarp();
  if (threadIdx.x % 32 == 0) arrive(full_ds);
}

// S of the first square of the step at `ring`. Of the step behind the last one too, on whatever lies there: a branch here
// would serialise the products under way.
template <class Traits>
__device__ __forceinline__ void issue_first_scores(BackwardState<Traits>& state, BackwardStorage<Traits>& smem,
                                                   const RingPosition<Traits::kStages>& ring, int warpgroup, bool exists) {
  if (exists) wait(smem.full_q[ring.stage], ring.phase);
  issue_scores<Traits>(state.s, smem.loop.k, smem.loop.q[ring.stage], warpgroup, 0);
}

// dQ of the step before the one at state.ring, half of the columns: the other warpgroup makes the others. dS' of step t lies in
// buffer t % 2 until both are done: who has seen dS' of step t + 1 complete knows it, since each makes dQ of a step before it
// writes dS' of the next. Before the first step the result means nothing.
template <class Traits>
__device__ __forceinline__ void issue_previous_dq(Square& dq, const BackwardState<Traits>& state,
                                                  BackwardStorage<Traits>& smem, int warpgroup) {
  const int buffer = state.ring.stage ^ 1;
  if (state.has_previous) wait(smem.full_ds[buffer], state.ring.phase ^ buffer);
  issue_dq<Traits>(dq, smem.loop.ds[buffer][0], smem.loop.k, warpgroup * kSquare);
}

// A step of one square (head dim 128).
template <class Traits, bool kMasked, bool kWantsDq>
__device__ __forceinline__ void step_of_one(BackwardState<Traits>& state, BackwardStorage<Traits>& smem,
                                            const KeyThread<Traits>& thread, int query0, bool is_last) {
  using Element = typename Traits::Element;
  auto& loop = smem.loop;
  const bool releases = threadIdx.x % 32 == 0;
  const int stage = state.ring.stage;
  const float4* rows = smem.query_rows[stage];
  Square dp, dq;
  SquareOperand operand;  // of P, then of dS': registers are short

  if constexpr (kWantsDq) issue_previous_dq<Traits>(dq, state, smem, thread.warpgroup);
  wait(smem.full_dout[stage], state.ring.phase);
  probabilities<Traits, kMasked, 0, kSquare / 2>(operand, state.s, thread, rows, query0);
  if constexpr (kWantsDq) {  // out of the way before dP comes
    wgmma_wait<0>();
    wgmma_pin(dq);
    if (state.has_previous) hand_over_dq<Traits>(dq, thread, smem, state.dq_phase);
  }
  issue_scores<Traits>(dp, loop.v, loop.dout[stage], thread.warpgroup, 0);
  probabilities<Traits, kMasked, kSquare / 2, kSquare>(operand, state.s, thread, rows, query0);
  issue_gradient<Traits>(state.dv, operand, loop.dout[stage], 0);
  wgmma_wait<1>();
  wgmma_pin(dp);
  differentiate<Traits>(dp, state.s, thread, rows);
  wgmma_wait<0>();
  wgmma_pin(state.dv);
  wgmma_keep(operand);
  if (releases) arrive(smem.empty_dout[stage]);
  pack_square<Element>(operand, dp);

  state.ring.advance();
  issue_first_scores<Traits>(state, smem, state.ring, thread.warpgroup, !is_last);
  issue_gradient<Traits>(state.dk, operand, loop.q[stage], 0);
  if constexpr (kWantsDq) {
    store_square<Traits>(loop.ds[stage][0], operand);
    publish_scores<Traits>(smem.full_ds[stage]);
  }
  wgmma_wait<0>();
  wgmma_pin(state.s);
  wgmma_pin(state.dk);
  wgmma_keep(operand);
  if (releases) arrive(smem.empty_q[stage]);
}

// A step of two squares (head dim 64): dQ of the first is made by warpgroup 0, of the second by warpgroup 1, in the same step.
// Here it pays that the next scores are on their way while the warpgroups meet.
template <class Traits, bool kMasked, bool kWantsDq>
__device__ __forceinline__ void step_of_two(BackwardState<Traits>& state, BackwardStorage<Traits>& smem,
                                            const KeyThread<Traits>& thread, int query0, bool is_last) {
  using Element = typename Traits::Element;
  auto& loop = smem.loop;
  const bool releases = threadIdx.x % 32 == 0;
  const int stage = state.ring.stage;
  const float4* rows = smem.query_rows[stage];
  Square s, dp[2], dq;
  SquareOperand p_operand[2], ds_operand[2];

  wait(smem.full_dout[stage], state.ring.phase);
  issue_scores<Traits>(dp[0], loop.v, loop.dout[stage], thread.warpgroup, 0);
  issue_scores<Traits>(s, loop.k, loop.q[stage], thread.warpgroup, 1);
  probabilities<Traits, kMasked>(p_operand[0], state.s, thread, rows, query0);
  wgmma_wait<1>();
  wgmma_pin(dp[0]);
  issue_gradient<Traits>(state.dv, p_operand[0], loop.dout[stage], 0);
  issue_scores<Traits>(dp[1], loop.v, loop.dout[stage], thread.warpgroup, 1);
  differentiate<Traits>(dp[0], state.s, thread, rows);
  pack_square<Element>(ds_operand[0], dp[0]);
  if constexpr (kWantsDq) store_square<Traits>(loop.ds[stage][0], ds_operand[0]);
  wgmma_wait<2>();
  wgmma_pin(s);
  issue_gradient<Traits>(state.dk, ds_operand[0], loop.q[stage], 0);
  probabilities<Traits, kMasked>(p_operand[1], s, thread, rows + kSquare, query0 + kSquare);
  wgmma_wait<1>();
  wgmma_pin(dp[1]);
  wgmma_pin(state.dv);
  wgmma_keep(p_operand[0]);
  issue_gradient<Traits>(state.dv, p_operand[1], loop.dout[stage], 1);
  differentiate<Traits>(dp[1], s, thread, rows + kSquare);
  pack_square<Element>(ds_operand[1], dp[1]);

  state.ring.advance();
  issue_first_scores<Traits>(state, smem, state.ring, thread.warpgroup, !is_last);
  if constexpr (kWantsDq) {
    store_square<Traits>(loop.ds[stage][1], ds_operand[1]);
    fence_async_shared();
    named_barrier_sync(kConsumerBarrier, Traits::kConsumerThreads);
  }
  wgmma_wait<1>();
  wgmma_pin(state.dk);
  wgmma_pin(state.dv);
  wgmma_keep(ds_operand[0]);
  wgmma_keep(p_operand[1]);
  if (releases) arrive(smem.empty_dout[stage]);
  if constexpr (kWantsDq) issue_dq<Traits>(dq, loop.ds[stage][thread.warpgroup], loop.k, 0);
  issue_gradient<Traits>(state.dk, ds_operand[1], loop.q[stage], 1);
  wgmma_wait<1>();
  wgmma_pin(state.s);
  if constexpr (kWantsDq) {
    wgmma_pin(dq);
    hand_over_dq<Traits>(dq, thread, smem, state.dq_phase);
  }
  wgmma_wait<0>();
  wgmma_pin(state.dk);
  wgmma_keep(ds_operand[1]);
  if (releases) arrive(smem.empty_q[stage]);
}

// dQ of the last step of one square.
template <class Traits>
__device__ __forceinline__ void finish_dq(BackwardState<Traits>& state, BackwardStorage<Traits>& smem,
                                          const KeyThread<Traits>& thread) {
  Square dq;
  issue_previous_dq<Traits>(dq, state, smem, thread.warpgroup);
  wgmma_wait<0>();
  wgmma_pin(dq);
  hand_over_dq<Traits>(dq, thread, smem, state.dq_phase);
}

template <class Traits, bool kMasked, bool kWantsDq>
__device__ __forceinline__ void take_steps(BackwardState<Traits>& state, BackwardStorage<Traits>& smem,
                                           const KeyThread<Traits>& thread, int first, int end, int last) {
#pragma unroll 1
  for (int step = first; step < end; ++step) {
    if constexpr (Traits::kSquares == 1) {
      step_of_one<Traits, kMasked, kWantsDq>(state, smem, thread, step * Traits::kBlockQ, step == last);
    } else {
      step_of_two<Traits, kMasked, kWantsDq>(state, smem, thread, step * Traits::kBlockQ, step == last);
    }
    state.has_previous = true;
  }
}

// Zeros in the rows of keys that the mask hides: what they hold, NaN perhaps, would meet dS' = 0 in dQ.
template <class Traits>
__device__ __forceinline__ void clear_hidden_keys(BackwardStorage<Traits>& smem, const BackwardParams& p,
                                                  const BlockOfKeys<Traits>& block) {
  const uint8_t* mask = mask_row(p, block.index);
  if (mask == nullptr) return;
  constexpr int kChunks = Traits::kHeadDim / 8;
  for (int i = threadIdx.x - 128; i < block.num_keys * kChunks; i += Traits::kConsumerThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (mask[(block.first_key + row) * p.mask_key] != 0) continue;
    *reinterpret_cast<uint4*>(smem.loop.k.chunk(row, column)) = make_uint4(0, 0, 0, 0);
    *reinterpret_cast<uint4*>(smem.loop.v.chunk(row, column)) = make_uint4(0, 0, 0, 0);
  }
  fence_async_shared();
  named_barrier_sync(kConsumerBarrier, Traits::kConsumerThreads);
}

template <class Traits, bool kWantsDq>
__device__ __forceinline__ void consume(const BackwardParams& p, const BlockOfKeys<Traits>& block,
                                        BackwardStorage<Traits>& smem, BackwardState<Traits>& state) {
  const KeyThread<Traits> thread(p, block);
#pragma unroll
  for (int i = 0; i < Traits::kHeadDim / 2; ++i) state.dk[i] = state.dv[i] = 0.0f;
  wait(smem.full_kv, state.kv_phase);
  state.kv_phase ^= 1;
  state.has_previous = false;
  if (block.first_step < block.end_step) {
    clear_hidden_keys<Traits>(smem, p, block);
    issue_first_scores<Traits>(state, smem, state.ring, thread.warpgroup, true);
    wgmma_wait<0>();
    wgmma_pin(state.s);
#pragma unroll 1
    for (int head = 0; head < block.group; ++head) {
      const int last = head + 1 == block.group ? block.end_step - 1 : -1;
      take_steps<Traits, true, kWantsDq>(state, smem, thread, block.first_step, block.first_unmasked_step, last);
      take_steps<Traits, false, kWantsDq>(state, smem, thread, block.first_unmasked_step, block.end_step, last);
    }
    if constexpr (kWantsDq && Traits::kSquares == 1) finish_dq<Traits>(state, smem, thread);
  }
  write_gradients<Traits>(p, block, thread, smem, state.dk, state.dv);
}

template <class Traits>
__device__ __forceinline__ void initialize_barriers(BackwardStorage<Traits>& smem) {
  if (threadIdx.x == 0) {
    initialize(smem.full_kv, 1);
    initialize(smem.empty_kv, Traits::kConsumerWarps);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      initialize(smem.full_q[stage], 1);
      initialize(smem.full_dout[stage], 1);
      initialize(smem.empty_q[stage], Traits::kConsumerWarps);
      initialize(smem.empty_dout[stage], Traits::kConsumerWarps);
      initialize(smem.full_ds[stage], Traits::kConsumerWarps);
    }
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      initialize(smem.full_dq[warpgroup], 4);
      initialize(smem.empty_dq[warpgroup], 1);
    }
    fence_barrier_initialization();
  }
  __syncthreads();
}

// The blocks of keys of one block of threads: one, or, where blocks persist, one after another, dealt out in turns.
// kOrdered: see backward_order.cuh.
template <class Traits, bool kOrdered>
struct BlockWalk {
  uint32_t num_blocks, turn = 0;

  __device__ __forceinline__ explicit BlockWalk(const Problem& p)
      : num_blocks(ceil_div(p.num_keys, Traits::kBlockK) * p.kv_heads * p.b1 * p.b0) {}

  // The next block; num_blocks or more: there is none.
  __device__ __forceinline__ uint32_t next(const Problem& p) {
    const uint32_t block = turn++ * gridDim.x + blockIdx.x;
    if (!kOrdered || !p.causal || block >= num_blocks) return block;
    const uint32_t num_tiles = ceil_div(p.num_keys, Traits::kBlockK), tile = block % num_tiles;
    return block - tile + (num_tiles - 1 - tile);
  }
};

// kOrdered: the additions to dq in a fixed order.
template <class Traits, bool kWantsDq, bool kOrdered>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    backward_kernel(const __grid_constant__ BackwardParams p, const __grid_constant__ BackwardMaps maps) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<BackwardStorage<Traits>*>(raw);
  let_next_kernel_start();
  if (threadIdx.x == 0) {
    for (const TensorMap* map : {&maps.v, &maps.k, &maps.q, &maps.dout}) prefetch_map(map->map);
  }
  initialize_barriers<Traits>(smem);
  BlockWalk<Traits, kOrdered> walk(p);
  if (threadIdx.x < 128) {
    shrink_registers<Traits::kProducerRegisters>();
    const int warp = threadIdx.x / 32;
    const bool leads = threadIdx.x % 32 == 0;
    RingPosition<Traits::kStages> ring;
    uint32_t phase = 0;  // of the keys, or of dq
    if (warp > (kWantsDq ? Traits::kConsumerWarpgroups : 0)) return;
    if (warp != 0) wait_for_prologue();
    for (uint32_t index = walk.next(p); index < walk.num_blocks; index = walk.next(p)) {
      const BlockOfKeys<Traits> block(p, index);
      if (leads) {
        if (warp == 0) {
          produce<Traits>(p, maps, block, smem, ring, phase);
        } else if constexpr (kOrdered) {
          add_dq_in_order<Traits>(p, block, smem, warp - 1, phase);
        } else {
          add_dq<Traits>(p, block, smem, warp - 1, phase);
        }
      }
      __syncwarp();
    }
    if (leads && warp != 0) bulk_wait<0>();
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    BackwardState<Traits> state;
    wait_for_prologue();
    for (uint32_t index = walk.next(p); index < walk.num_blocks; index = walk.next(p)) {
      consume<Traits, kWantsDq>(p, BlockOfKeys<Traits>(p, index), smem, state);
    }
  }
}

}  // namespace fcsa::sm90
