// The Hopper forward: a producer warpgroup feeds TMA and takes the norms of the keys, consumer warpgroups multiply (wgmma).
//
//   q (kBlockM, d) stays, in registers where they suffice; k, v (kBlockN, d) stream through rings of kStages tiles
//   S (64, kBlockN) = q k^T       a warpgroup; two tiles of S, one being multiplied, one being exponentiated
//   P = exp2(S * k_factor_j * q_factor_i - shift)       one shift for the whole launch: no maximum, no rescaling
//   O (64, d) += P v              P goes from the accumulator layout straight into the A operand
//
// No value of a tile waits for its row: while the exponentials of one tile are taken, the tensor cores have the scores of
// the next one and the output of the one before in their queue, within the same warpgroup. Drawn in docs/kernels.md.
#pragma once

#include "exp2.cuh"
#include "forward_producer.cuh"
#include "forward_store.cuh"
#include "wgmma.cuh"

namespace fcsa::sm90 {

// The two rows of a block that this thread holds: `row` and row + 8 of its warp's sixteen.
struct ConsumerThread {
  int warpgroup;  // of the consumers
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

// The position of a consumer in all rings; it goes on from block to block.
template <class Traits>
struct ConsumerState {
  RingPosition<Traits::kStages> k_ring, v_ring;
  RingPosition<Traits::kFactorStages> slot;
  uint32_t q_phase = 0;
};

// What one block of queries needs at every tile.
struct RowFactors {
  float q_factor[2];  // scale * log2(e) / |q_i|
  float shift;        // base 2
  int limit[2];       // last key that the row sees
};

// One of the two tiles that are under way: S becomes P, whose registers are read until its product with V is done.
template <class Traits>
struct ScoreTile {
  float s[Traits::kBlockN / 2];
  uint32_t p[Traits::kBlockN / 16][4];
};

template <class Traits>
struct QueryOperand {
  uint32_t fragments[Traits::kQueriesInRegisters ? Traits::kHeadDim / 16 : 1][4];
};

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* smem) {  // four 8 x 8 matrices of 16-bit values
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(smem)))
               : "memory");
}

// The A operand of this warp's sixteen rows of q, and 1 / |q_i| of this thread's two.
template <class Traits>
__device__ __forceinline__ void load_queries(QueryOperand<Traits>& operand, float (&rnorm)[2],
                                             const typename Traits::QueryTile& q, int row) {
  const int lane = threadIdx.x % 32, first_row = row - lane / 4;
  float sum[2] = {0.0f, 0.0f};
#pragma unroll
  for (int step = 0; step < Traits::kHeadDim / 16; ++step) {
    uint32_t fragment[4];
    load_matrices(fragment, q.chunk(first_row + lane % 16, step * 16 + lane / 16 * 8));
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 pair = unpack<typename Traits::Element>(fragment[r]);
      sum[r % 2] = fmaf(pair.x, pair.x, fmaf(pair.y, pair.y, sum[r % 2]));
      if constexpr (Traits::kQueriesInRegisters) operand.fragments[step][r] = fragment[r];
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) rnorm[half] = reciprocal_norm(lane_sum<4>(sum[half]));
}

// Issues S = q k^T for this warpgroup's 64 rows; not waited for.
template <class Traits>
__device__ __forceinline__ void issue_scores(ScoreTile<Traits>& tile, const QueryOperand<Traits>& operand,
                                             const typename Traits::QueryTile& q, const typename Traits::KeyTile& k,
                                             int warpgroup) {
  using Element = typename Traits::Element;
  wgmma_fence();
  if constexpr (Traits::kQueriesInRegisters) {
    wgmma_rs<Element, false>(tile.s, operand.fragments[0], k.descriptor(0, 0));
#pragma unroll
    for (int step = 1; step < Traits::kHeadDim / 16; ++step) {
      wgmma_rs<Element, true>(tile.s, operand.fragments[step], k.descriptor(0, step * 16));
    }
  } else {
    wgmma_ss<Element, false>(tile.s, q.descriptor(warpgroup * 64, 0), k.descriptor(0, 0));
#pragma unroll
    for (int step = 1; step < Traits::kHeadDim / 16; ++step) {
      wgmma_ss<Element, true>(tile.s, q.descriptor(warpgroup * 64, step * 16), k.descriptor(0, step * 16));
    }
  }
  wgmma_commit();
}

// Issues O += P v; not waited for.
template <class Traits>
__device__ __forceinline__ void issue_output(float (&o)[Traits::kHeadDim / 2], const ScoreTile<Traits>& tile,
                                             const typename Traits::KeyTile& v) {
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Traits::kBlockN / 16; ++step) {
    wgmma_rs_transposed<typename Traits::Element, true>(o, tile.p[step], v.descriptor_transposed(step * 16));
  }
  wgmma_commit();
}

// exp2(s * k_factor * q_factor - shift) of one pair of columns.
template <class Traits, bool kPolynomial>
__device__ __forceinline__ float2 exponentials(float low, float high, float2 k_factor, float q_factor, float shift) {
  if constexpr (kPolynomial) {
    using Element = typename Traits::Element;
    return {exp2_polynomial<Element>(low * k_factor.x, q_factor, -shift),
            exp2_polynomial<Element>(high * k_factor.y, q_factor, -shift)};
  } else {
    return {exp2_approx(fmaf(low * k_factor.x, q_factor, -shift)), exp2_approx(fmaf(high * k_factor.y, q_factor, -shift))};
  }
}

// S -> P, and this thread's part of the row sums. kMasked is a template argument and the mask a selection: a branch while
// wgmma are under way makes the compiler serialise them.
template <class Traits, bool kMasked>
__device__ __forceinline__ void exponentiate(ScoreTile<Traits>& tile, float (&sum)[2], const float* k_factor,
                                             const RowFactors& rows, int first_key, int column) {
#pragma unroll
  for (int i = 0; i < Traits::kBlockN / 8; ++i) {
    const float2 factor = *reinterpret_cast<const float2*>(k_factor + i * 8 + column);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      constexpr int kEvery = Traits::kPolynomialEvery;
      const float low = tile.s[i * 4 + half * 2], high = tile.s[i * 4 + half * 2 + 1];
      float2 p;
      if (kEvery > 0 && (2 * i + half) % (kEvery > 0 ? kEvery : 1) == 0) {
        p = exponentials<Traits, true>(low, high, factor, rows.q_factor[half], rows.shift);
      } else {
        p = exponentials<Traits, false>(low, high, factor, rows.q_factor[half], rows.shift);
      }
      if constexpr (kMasked) {
        const int key = first_key + i * 8 + column;
        p.x = key <= rows.limit[half] ? p.x : 0.0f;
        p.y = key + 1 <= rows.limit[half] ? p.y : 0.0f;
      }
      sum[half] += p.x + p.y;
      tile.p[i / 2][i % 2 * 2 + half] = pack<typename Traits::Element>(p.x, p.y);
    }
  }
}

// One consumer warpgroup's work on one block of queries.
template <class Traits>
struct Attention {
  ForwardStorage<Traits>& smem;
  const ConsumerThread& thread;
  const RowFactors& rows;
  const QueryOperand<Traits>& queries;
  ConsumerState<Traits>& state;
  float (&o)[Traits::kHeadDim / 2];
  float (&sum)[2];

  __device__ __forceinline__ void begin_scores(ScoreTile<Traits>& tile) {
    wait(smem.full_k[state.k_ring.stage], state.k_ring.phase);
    issue_scores<Traits>(tile, queries, smem.q, smem.k[state.k_ring.stage], thread.warpgroup);
    state.k_ring.advance();
  }

  __device__ __forceinline__ void begin_output(const ScoreTile<Traits>& tile) {
    wait(smem.full_v[state.v_ring.stage], state.v_ring.phase);
    issue_output<Traits>(o, tile, smem.v[state.v_ring.stage]);
    state.v_ring.advance();
  }

  template <bool kMasked>
  __device__ __forceinline__ void take_exponentials(ScoreTile<Traits>& tile, int index) {
    wait(smem.full_factor[state.slot.stage], state.slot.phase);
    exponentiate<Traits, kMasked>(tile, sum, smem.k_factor[state.slot.stage], rows, index * Traits::kBlockN,
                                  thread.column);
    state.slot.advance();
  }

  // The stage `back` positions behind a ring's next one.
  __device__ __forceinline__ static int stage_behind(const RingPosition<Traits::kStages>& ring, int back) {
    const int stage = ring.stage - back % Traits::kStages;
    return stage < 0 ? stage + Traits::kStages : stage;
  }

  __device__ __forceinline__ void release_k(int back) {
    if (thread.releases) arrive(smem.empty_k[stage_behind(state.k_ring, back)]);
  }

  __device__ __forceinline__ void release_v(int back) {
    if (thread.releases) arrive(smem.empty_v[stage_behind(state.v_ring, back)]);
  }

  // Tiles `index` (in `even`, its scores complete) and index - 1 (in `odd`). Begins the output of the pair before, unless
  // kFirst, and the scores of the pair after, unless kLast; leaves the output of `odd` to be begun. In the queue of the
  // tensor cores during either exponentiation: the scores of the next tile, the output of the one before. The queue is
  // empty at the end: the compiler cannot follow wgmma that are under way around a loop and would serialise them.
  template <bool kMasked, bool kFirst, bool kLast>
  __device__ __forceinline__ void pair(ScoreTile<Traits>& even, ScoreTile<Traits>& odd, int index) {
    begin_scores(odd);
    if constexpr (!kFirst) begin_output(odd);  // of the pair before: P of `odd` is still that
    take_exponentials<kMasked>(even, index);
    if constexpr (!kLast) begin_scores(even);
    begin_output(even);
    wgmma_wait<kLast ? 1 : 2>();
    wgmma_pin(odd.s);
    release_k(kLast ? 1 : 2);
    if constexpr (!kFirst) release_v(2);
    take_exponentials<kMasked>(odd, index - 1);
    wgmma_wait<0>();
    wgmma_pin(even.s);
    wgmma_pin(o);
    if constexpr (!kLast) release_k(1);
    release_v(1);
  }

  // All tiles from the last, num_tiles - 1, to tile 0; num_tiles is even and at least 2.
  __device__ __forceinline__ void run(int num_tiles, int first_limit) {
    ScoreTile<Traits> even, odd;
    begin_scores(even);
    wgmma_wait<0>();
    wgmma_pin(even.s);
    release_k(1);

    int index = num_tiles - 1;
    if (index == 1) {
      pair<true, true, true>(even, odd, index);
    } else {
      pair<true, true, false>(even, odd, index);
      index -= 2;
      for (; index > 1 && (index + 1) * Traits::kBlockN - 1 > first_limit; index -= 2) {
        pair<true, false, false>(even, odd, index);
      }
      for (; index > 1; index -= 2) pair<false, false, false>(even, odd, index);
      pair<true, false, true>(even, odd, index);
    }
    if (!Traits::kQueriesInRegisters && thread.releases) arrive(smem.empty_q);
    begin_output(odd);
    wgmma_wait<0>();
    wgmma_pin(o);
    release_v(1);
  }
};

template <class Traits>
__device__ __forceinline__ void consume_block(const ForwardParams& p, const BlockOfQueries<Traits>& block,
                                              ForwardStorage<Traits>& smem, const ConsumerThread& thread,
                                              ConsumerState<Traits>& state) {
  const bool folded = p.l2norm_qk && p.q_unit == nullptr;
  const float scale = p.scale != nullptr ? p.scale[block.head] : p.scale_value;
  float o[Traits::kHeadDim / 2], sum[2] = {0.0f, 0.0f}, rnorm[2] = {1.0f, 1.0f};
#pragma unroll
  for (int i = 0; i < Traits::kHeadDim / 2; ++i) o[i] = 0.0f;

  RowFactors rows;
  rows.shift = bounded_shift<typename Traits::Element>(p.bound) * kLog2e;
  if (block.num_tiles > 0) {
    QueryOperand<Traits> queries;
    wait(smem.full_q, state.q_phase);
    state.q_phase ^= 1;
    load_queries<Traits>(queries, rnorm, smem.q, thread.row);
    __syncwarp();
    if (Traits::kQueriesInRegisters && thread.releases) arrive(smem.empty_q);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = block.first_query + thread.row + half * 8;
      rows.q_factor[half] = scale * kLog2e * (folded ? rnorm[half] : 1.0f);
      rows.limit[half] = p.causal ? min(query + p.num_keys - p.num_queries, p.num_keys - 1) : p.num_keys - 1;
    }
    Attention<Traits>{smem, thread, rows, queries, state, o, sum}.run(block.num_tiles, block.first_limit);
  }
  store_results<Traits>(p, block, thread.row, o, sum, rnorm, rows.shift, folded && p.q_rnorm != nullptr);
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
      ptx::mbarrier_init(&smem.empty_k[stage], Traits::kConsumerWarps + Traits::kNormWarps);
      ptx::mbarrier_init(&smem.empty_v[stage], Traits::kConsumerWarps);
    }
    for (int slot = 0; slot < Traits::kFactorStages; ++slot) ptx::mbarrier_init(&smem.full_factor[slot], Traits::kNormWarps);
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
  const int warp = threadIdx.x / 32;
  if (warp < 4) {
    shrink_registers<Traits::kTile.producer_registers>();
    if (warp > 0) {
      find_key_factors<Traits>(p, schedule, smem, warp - 1);
    } else if (threadIdx.x == 0) {
      load_tiles<Traits>(p, maps, schedule, smem);
    }
  } else {
    grow_registers<Traits::kTile.consumer_registers>();
    consume<Traits>(p, schedule, smem);
  }
}

}  // namespace fcsa::sm90
