// The Hopper forward: one producer warp feeds TMA, two or three consumer warpgroups multiply with wgmma.
//
//   q (kBlockM, d) stays; k, v (kBlockN, d) stream through rings of kStages tiles
//   S (64, kBlockN) = q k^T       a warpgroup, in registers
//   P = exp2(S * k_factor_j * q_factor_i - shift)       one shift for the whole launch: no maximum, no rescaling
//   O (64, d) += P v              P goes from the accumulator layout straight into the A operand
//
// While the tensor cores multiply P of one tile with V, and the next tile's S is on its way, the same warpgroup
// takes the exponentials of that next tile; the other warpgroups fill what is left. Drawn in docs/kernels.md.
#pragma once

#include "../norm/l2norm_forward.cuh"
#include "forward_producer.cuh"
#include "forward_store.cuh"
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
    warpgroup = thread / 128;
    row = thread / 32 * 16 + lane / 4;
    column = lane % 4 * 2;
    releases = lane == 0;
  }
};

// 1 / |q_i| of this thread's two rows from the tile in shared memory. A quad shares a row; the permutation of the chunks
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

// Issues S = q k^T for this warpgroup's 64 rows; not waited for.
template <class Traits>
__device__ __forceinline__ void issue_scores(float (&s)[Traits::kBlockN / 2], const typename Traits::QueryTile& q,
                                             const typename Traits::KeyTile& k, int warpgroup) {
  wgmma_fence();
  wgmma_ss<typename Traits::Element, false>(s, q.descriptor(warpgroup * 64, 0), k.descriptor(0, 0));
#pragma unroll
  for (int step = 1; step < Traits::kHeadDim / 16; ++step) {
    wgmma_ss<typename Traits::Element, true>(s, q.descriptor(warpgroup * 64, step * 16), k.descriptor(0, step * 16));
  }
  wgmma_commit();
}

// Issues O += P v; not waited for.
template <class Traits>
__device__ __forceinline__ void issue_output(float (&o)[Traits::kHeadDim / 2],
                                             const uint32_t (&probabilities)[Traits::kBlockN / 16][4],
                                             const typename Traits::KeyTile& v) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Traits::kBlockN / 16; ++step) {
    wgmma_rs_transposed<typename Traits::Element, true>(o, probabilities[step], v.descriptor_transposed(step * 16));
  }
  wgmma_commit();
}

// S -> P in place, and this thread's part of the row sums. k_factor: 1 / |k_j| of the tile's keys.
template <class Traits>
__device__ __forceinline__ void exponentiate(float (&s)[Traits::kBlockN / 2], float (&sum)[2], const float* k_factor,
                                             const float (&q_factor)[2], float shift, int column) {
#pragma unroll
  for (int i = 0; i < Traits::kBlockN / 8; ++i) {
    const float2 factor = *reinterpret_cast<const float2*>(k_factor + i * 8 + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& low = s[i * 4 + half * 2];
      float& high = s[i * 4 + half * 2 + 1];
      low = exp2_approx(fmaf(low * factor.x, q_factor[half], -shift));
      high = exp2_approx(fmaf(high * factor.y, q_factor[half], -shift));
      sum[half] += low + high;
    }
  }
}

// The same where some pairs are hidden: key > limit of the row.
template <class Traits>
__device__ __forceinline__ void exponentiate_masked(float (&s)[Traits::kBlockN / 2], float (&sum)[2],
                                                    const float* k_factor, const float (&q_factor)[2], float shift,
                                                    int column, const int (&limit)[2]) {
#pragma unroll
  for (int i = 0; i < Traits::kBlockN / 8; ++i) {
    const float2 factor = *reinterpret_cast<const float2*>(k_factor + i * 8 + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float& low = s[i * 4 + half * 2];
      float& high = s[i * 4 + half * 2 + 1];
      // first the exponential, then the choice: a branch here would serialise the products that are under way
      const float low_p = exp2_approx(fmaf(low * factor.x, q_factor[half], -shift));
      const float high_p = exp2_approx(fmaf(high * factor.y, q_factor[half], -shift));
      low = i * 8 + column <= limit[half] ? low_p : 0.0f;
      high = i * 8 + column + 1 <= limit[half] ? high_p : 0.0f;
      sum[half] += low + high;
    }
  }
}

template <class Traits>
__device__ __forceinline__ void pack_probabilities(uint32_t (&probabilities)[Traits::kBlockN / 16][4],
                                                   const float (&s)[Traits::kBlockN / 2]) {
#pragma unroll
  for (int step = 0; step < Traits::kBlockN / 16; ++step) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      probabilities[step][r] = pack<typename Traits::Element>(s[step * 8 + r * 2], s[step * 8 + r * 2 + 1]);
    }
  }
}

// What one block of queries needs at every tile.
template <class Traits>
struct RowFactors {
  float q_factor[2];  // scale * log2(e) / |q_i|
  float shift;        // base 2
  int limit[2];       // last key that the row sees
};

// S of one tile -> P. kMasked is a template argument, not a branch: a branch between the issue of a wgmma and its wait
// makes the compiler serialise them.
template <class Traits, bool kMasked>
__device__ __forceinline__ void exponentiate_tile(float (&s)[Traits::kBlockN / 2], float (&sum)[2],
                                                  const float* k_factor, const RowFactors<Traits>& rows, int first_key,
                                                  int column) {
  if constexpr (kMasked) {
    const int limit[2] = {rows.limit[0] - first_key, rows.limit[1] - first_key};
    exponentiate_masked<Traits>(s, sum, k_factor, rows.q_factor, rows.shift, column, limit);
  } else {
    exponentiate<Traits>(s, sum, k_factor, rows.q_factor, rows.shift, column);
  }
}

// The position of a consumer in all rings; it goes on from block to block.
template <class Traits>
struct ConsumerState {
  RingPosition<Traits::kStages> ring;
  RingPosition<Traits::kFactorStages> factors;
  uint32_t q_phase = 0;
};

// What a consumer holds of one block of queries.
template <class Traits>
struct Accumulators {
  float o[Traits::kHeadDim / 2];
  float s[Traits::kBlockN / 2];
  uint32_t probabilities[Traits::kBlockN / 16][4];
  float sum[2];
};

// S of tile `tile` beside O of the tile before: the products overlap with the exponentials, here and in the other
// warpgroups.
template <class Traits, bool kMasked>
__device__ __forceinline__ void attend_tile(Accumulators<Traits>& acc, ForwardStorage<Traits>& smem,
                                            const ConsumerThread& thread, const RowFactors<Traits>& rows,
                                            ConsumerState<Traits>& state, int tile) {
  const auto previous = state.ring;
  state.ring.advance();
  state.factors.advance();
  wait(smem.full_k[state.ring.stage], state.ring.phase);
  issue_scores<Traits>(acc.s, smem.q, smem.k[state.ring.stage], thread.warpgroup);
  wait(smem.full_v[previous.stage], previous.phase);
  issue_output<Traits>(acc.o, acc.probabilities, smem.v[previous.stage]);
  wgmma_wait<1>();
  wgmma_pin(acc.s);
  if (thread.releases) arrive(smem.empty_k[state.ring.stage]);
  exponentiate_tile<Traits, kMasked>(acc.s, acc.sum, smem.k_factor[state.factors.stage], rows,
                                     tile * Traits::kBlockN, thread.column);
  wgmma_wait<0>();
  wgmma_pin(acc.o);
  if (thread.releases) arrive(smem.empty_v[previous.stage]);
  pack_probabilities<Traits>(acc.probabilities, acc.s);
}

// O and the row sums of one block of queries over all its keys, from the last tile to the first (num_tiles >= 1).
template <class Traits>
__device__ __forceinline__ void attend(Accumulators<Traits>& acc, const BlockOfQueries<Traits>& block,
                                       ForwardStorage<Traits>& smem, const ConsumerThread& thread,
                                       const RowFactors<Traits>& rows, ConsumerState<Traits>& state) {
  int tile = block.num_tiles - 1;
  wait(smem.full_k[state.ring.stage], state.ring.phase);
  issue_scores<Traits>(acc.s, smem.q, smem.k[state.ring.stage], thread.warpgroup);
  wgmma_wait<0>();
  wgmma_pin(acc.s);
  if (thread.releases) arrive(smem.empty_k[state.ring.stage]);
  exponentiate_tile<Traits, true>(acc.s, acc.sum, smem.k_factor[state.factors.stage], rows, tile * Traits::kBlockN,
                                  thread.column);
  pack_probabilities<Traits>(acc.probabilities, acc.s);

  --tile;
  for (; tile >= 0 && (tile + 1) * Traits::kBlockN - 1 > block.first_limit; --tile) {
    attend_tile<Traits, true>(acc, smem, thread, rows, state, tile);
  }
  for (; tile >= 0; --tile) attend_tile<Traits, false>(acc, smem, thread, rows, state, tile);

  if (thread.releases) arrive(smem.empty_q);
  wait(smem.full_v[state.ring.stage], state.ring.phase);
  issue_output<Traits>(acc.o, acc.probabilities, smem.v[state.ring.stage]);
  wgmma_wait<0>();
  wgmma_pin(acc.o);
  if (thread.releases) arrive(smem.empty_v[state.ring.stage]);
  state.ring.advance();
  state.factors.advance();
}

template <class Traits>
__device__ __forceinline__ void consume_block(const ForwardParams& p, const BlockOfQueries<Traits>& block,
                                              ForwardStorage<Traits>& smem, const ConsumerThread& thread,
                                              ConsumerState<Traits>& state) {
  const bool folded = p.l2norm_qk && p.q_unit == nullptr;
  const float scale = p.scale != nullptr ? p.scale[block.head] : p.scale_value;
  float rnorm[2] = {1.0f, 1.0f};
  Accumulators<Traits> acc;
  acc.sum[0] = acc.sum[1] = 0.0f;
#pragma unroll
  for (int i = 0; i < Traits::kHeadDim / 2; ++i) acc.o[i] = 0.0f;

  RowFactors<Traits> rows;
  rows.shift = bounded_shift<typename Traits::Element>(p.bound) * kLog2e;
  if (block.num_tiles > 0) {
    wait(smem.full_q, state.q_phase);
    state.q_phase ^= 1;
    if (folded) row_norms<Traits>(rnorm, smem.q, thread.row);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = block.first_query + thread.row + half * 8;
      rows.q_factor[half] = scale * kLog2e * rnorm[half];
      rows.limit[half] = p.causal ? min(query + p.num_keys - p.num_queries, p.num_keys - 1) : p.num_keys - 1;
    }
    attend<Traits>(acc, block, smem, thread, rows, state);
  }
  store_results<Traits>(p, block, thread.row, acc.o, acc.sum, rnorm, rows.shift, folded && p.q_rnorm != nullptr);
}

template <class Traits>
__device__ __forceinline__ void consume(const ForwardParams& p, const Schedule& schedule, ForwardStorage<Traits>& smem) {
  const ConsumerThread thread;
  ConsumerState<Traits> state;
  for (uint32_t index = blockIdx.x; index < schedule.num_items; index += gridDim.x) {
    const auto block = BlockOfQueries<Traits>::from(p, schedule, index);
    consume_block<Traits>(p, block, smem, thread, state);
  }
}

template <class Traits>
__device__ __forceinline__ void initialize_barriers(ForwardStorage<Traits>& smem) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full_q, 1);
    ptx::mbarrier_init(&smem.empty_q, Traits::kConsumerWarps);
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      ptx::mbarrier_init(&smem.full_k[stage], 1);
      ptx::mbarrier_init(&smem.full_v[stage], 1);
      ptx::mbarrier_init(&smem.empty_k[stage], Traits::kConsumerWarps);
      ptx::mbarrier_init(&smem.empty_v[stage], Traits::kConsumerWarps);
    }
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ ForwardMaps maps,
                   const __grid_constant__ Schedule schedule) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<ForwardStorage<Traits>*>(raw);
  initialize_barriers<Traits>(smem);
  if (threadIdx.x < 128) {
    shrink_registers<Traits::kTile.producer_registers>();
    if (threadIdx.x < 32) produce<Traits>(p, maps, schedule, smem);
  } else {
    grow_registers<Traits::kTile.consumer_registers>();
    consume<Traits>(p, schedule, smem);
  }
}

}  // namespace fcsa::sm90
