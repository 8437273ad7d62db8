// The Hopper forward: one producer warp feeds TMA, two or three consumer warpgroups multiply with wgmma.
//
//   q (kBlockM, d) stays; k, v (kBlockN, d) stream through rings of kStages tiles
//   S (64, kBlockN) = q k^T       a warpgroup, in registers
//   P = exp2(S * k_factor_j * q_factor_i - shift)       bounded logits: one shift for the whole launch, no maximum, no
//                                                       rescaling; else the shift of a row follows its maximum
//   O (64, d) += P v              P goes from the accumulator layout straight into the A operand
//
// While the tensor cores multiply P of one tile with V, and the next tile's S is on its way, the same warpgroup
// takes the exponentials of that next tile; the other warpgroups fill what is left. Drawn in docs/kernels.md.
#pragma once

#include "forward_producer.cuh"
#include "forward_queries.cuh"
#include "forward_store.cuh"
#include "wgmma.cuh"

namespace fcsa::sm90 {

// Issues O += P v, and with kSumsByProducts the row sums += P 1; not waited for.
template <class Traits>
__device__ __forceinline__ void issue_output(float (&o)[Traits::kOutColumns / 2],
                                             const uint32_t (&probabilities)[Traits::kBlockN / 16][4],
                                             const ForwardStorage<Traits>& smem, int stage) {
  using Element = typename Traits::Element;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < Traits::kBlockN / 16; ++step) {
    if constexpr (Traits::kSumsByProducts) {
      wgmma_rs_transposed<Element, true>(o, probabilities[step], smem.v[stage].descriptor_transposed(step * 16, smem.ones));
    } else {
      wgmma_rs_transposed<Element, true>(o, probabilities[step], smem.v[stage].descriptor_transposed(step * 16));
    }
  }
  wgmma_commit();
}

// Which of a thread's scores of one tile are visible, where that is not all.
template <class Traits>
struct VisiblePairs {
  int limit[2];  // of the keys of the tile, the last that each row sees
  uint32_t words[Traits::kKeyMask ? 2 : 1][Traits::kBlockN / 32];  // with a key mask: both together, from the thread's column on

  __device__ __forceinline__ VisiblePairs(const int (&row_limit)[2], int first_key, const KeyBits<Traits::kBlockN>& keys,
                                          int column) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      limit[half] = row_limit[half] - first_key - column;
      if constexpr (Traits::kKeyMask) {
#pragma unroll
        for (int w = 0; w < Traits::kBlockN / 32; ++w) {
          const int last = row_limit[half] - first_key - w * 32;
          const uint32_t seen = last >= 31 ? 0xffffffffu : last < 0 ? 0u : (2u << last) - 1;
          words[half][w] = (keys.words[w] & seen) >> column;
        }
      }
    }
  }

  // key: its distance from the thread's column, a compile-time constant
  __device__ __forceinline__ bool operator()(int half, int key) const {
    if constexpr (Traits::kKeyMask) return words[half][key / 32] >> key % 32 & 1;
    return key <= limit[half];
  }
};

// S of the keys from `first` of a tile -> P in place, and this thread's part of the row sums. k_factor: 1 / |k_j| of these
// keys. kMasked: some pairs are hidden; the choice comes behind the exponential, since a branch would serialise the
// products that are under way, and since the score of a masked key may be NaN.
template <class Traits, bool kMasked>
__device__ __forceinline__ void exponentiate(float (&s)[Traits::kPartN / 2], float (&sum)[2], const float* k_factor,
                                             const float (&q_factor)[2], float shift, int column, int first,
                                             const VisiblePairs<Traits>& visible) {
#pragma unroll
  for (int i = 0; i < Traits::kPartN / 8; i += 2) {
    float factor[2][2];
    load_factors(factor, k_factor + i * 8, column);
#pragma unroll
    for (int next = 0; next < 2; ++next) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float p[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          p[c] = exp2_approx(fmaf(s[(i + next) * 4 + half * 2 + c] * factor[next][c], q_factor[half], -shift));
          if (kMasked && !visible(half, first + (i + next) * 8 + c)) p[c] = 0.0f;
          s[(i + next) * 4 + half * 2 + c] = p[c];
        }
        if constexpr (!Traits::kSumsByProducts) sum[half] += p[0] + p[1];
      }
    }
  }
}

// The shift of the rows that this thread holds a part of, which follows their maxima.
struct RunningMaximum {
  float shift[2];   // base 2; -inf: no visible key so far
  float factor[2];  // what a raised shift makes of the sums so far; 1 where it stays

  // S of a tile -> logits in place, -inf where hidden, in base 2; and the shift of rows whose maximum has climbed too high
  // above it is raised. No branch: products are under way.
  template <class Traits, bool kMasked>
  __device__ __forceinline__ void follow(float (&s)[Traits::kBlockN / 2], const float* k_factor,
                                         const float (&q_factor)[2], int column, const VisiblePairs<Traits>& visible) {
    float maximum[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < Traits::kBlockN / 8; i += 2) {
      float key_factor[2][2];
      load_factors(key_factor, k_factor + i * 8, column);
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int next = e / 4, half = e / 2 % 2, c = e % 2;
        float& x = s[(i + next) * 4 + half * 2 + c];
        x = x * key_factor[next][c] * q_factor[half];
        if (kMasked && !visible(half, (i + next) * 8 + c)) x = -INFINITY;
        maximum[half] = fmaxf(maximum[half], x);
      }
    }
    raise(maximum);
  }

  // maximum: of the thread's columns, base 2.
  __device__ __forceinline__ void raise(const float (&maximum)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float of_row = lane_max<4>(maximum[half]);
      const bool raised = of_row > shift[half] + kRescaleThreshold;
      factor[half] = raised ? exp2_approx(shift[half] - of_row) : 1.0f;
      shift[half] = raised ? of_row : shift[half];
    }
  }

  // What to subtract: where nothing but -inf has been met, -inf - 0 gives P = 0.
  __device__ __forceinline__ float subtrahend(int half) const { return shift[half] == -INFINITY ? 0.0f : shift[half]; }

  __device__ __forceinline__ bool any_raised() const {
    return __any_sync(0xffffffffu, factor[0] != 1.0f || factor[1] != 1.0f);
  }
};

// Logits (base 2; with a bias in natural units) -> P in place, and the sums.
template <class Traits>
__device__ __forceinline__ void exponentiate_logits(float (&s)[Traits::kBlockN / 2], float (&sum)[2],
                                                    const RunningMaximum& maximum) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (!Traits::kSumsByProducts) sum[half] *= maximum.factor[half];
    const float shift = maximum.subtrahend(half);
#pragma unroll
    for (int i = 0; i < Traits::kBlockN / 8; ++i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float& x = s[i * 4 + half * 2 + c];
        x = exp2_approx(Traits::kBias ? fmaf(x, kLog2e, -shift) : x - shift);
        if constexpr (!Traits::kSumsByProducts) sum[half] += x;
      }
    }
  }
}

template <class Traits>
__device__ __forceinline__ void pack_probabilities(uint32_t (&probabilities)[Traits::kBlockN / 16][4],
                                                   const float (&s)[Traits::kParts][Traits::kPartN / 2]) {
  constexpr int kStepsPerPart = Traits::kPartN / 16;
#pragma unroll
  for (int step = 0; step < Traits::kBlockN / 16; ++step) {
    const float(&part)[Traits::kPartN / 2] = s[step / kStepsPerPart];
    const int first = step % kStepsPerPart * 8;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      probabilities[step][r] = pack<typename Traits::Element>(part[first + r * 2], part[first + r * 2 + 1]);
    }
  }
}

// What one block of queries needs at every tile.
template <class Traits>
struct RowFactors {
  float q_factor[2];  // scale * log2(e) / |q_i|
  float shift;        // base 2; of every row, where the logits are bounded
  int limit[2];       // last key that the row sees
  BiasReader<typename Traits::BiasTile> bias;
};

// The position of a consumer in all rings; it goes on from block to block.
template <class Traits>
struct ConsumerState {
  RingPosition<Traits::kStages> ring;
  RingPosition<Traits::kFactorStages> factors;
  uint32_t q_phase = 0;
  bool next_k_is_there = false, v_is_there = false;  // seen by look_ahead()

  __device__ __forceinline__ void advance() {
    ring.advance();
    factors.advance();
  }

  // Looks, while products are under way, at the barriers that the next of them wait for: that wait then costs no time.
  __device__ __forceinline__ void look_ahead(ForwardStorage<Traits>& smem) {
    if constexpr (!Traits::kLooksAhead) return;
    auto next = ring;
    next.advance();
    next_k_is_there = has_ended(smem.full_k[next.stage], next.phase);
    v_is_there = has_ended(smem.full_v[ring.stage], ring.phase);
  }

  __device__ __forceinline__ void wait_for_k(ForwardStorage<Traits>& smem) {
    if (!next_k_is_there) wait(smem.full_k[ring.stage], ring.phase);
    next_k_is_there = false;
  }

  // v: of the tile that was looked at last, the one before `ring` in the middle of a walk.
  __device__ __forceinline__ void wait_for_v(ForwardStorage<Traits>& smem, const RingPosition<Traits::kStages>& v) {
    if (!v_is_there) wait(smem.full_v[v.stage], v.phase);
  }
};

// The tile of keys that a consumer works on, from when its keys are there.
template <class Traits>
struct KeyTileView {
  int first_key;
  bool last;  // with a key mask only, as the next
  KeyBits<Traits::kBlockN> visible;

  __device__ __forceinline__ static KeyTileView first(ForwardStorage<Traits>& smem, ConsumerState<Traits>& state,
                                                      const BlockOfQueries<Traits>& block) {
    return at(smem, state, (block.num_tiles - 1) * Traits::kBlockN);
  }

  __device__ __forceinline__ static KeyTileView next(ForwardStorage<Traits>& smem, ConsumerState<Traits>& state,
                                                     const KeyTileView& previous) {
    return at(smem, state, previous.first_key - Traits::kBlockN);
  }

  __device__ __forceinline__ bool is_cut(const BlockOfQueries<Traits>& block) const {  // some pair is hidden
    return first_key + Traits::kBlockN - 1 > block.first_limit || !visible.all();
  }

 private:
  __device__ __forceinline__ static KeyTileView at(ForwardStorage<Traits>& smem, ConsumerState<Traits>& state, int first_key) {
    state.wait_for_k(smem);
    if constexpr (!Traits::kKeyMask) return {first_key, false, {}};
    const KeyTileRecord<Traits>& record = smem.records[state.factors.stage];
    return {record.tile * Traits::kBlockN, record.last, record.visible};
  }
};

// What a consumer holds of one block of queries.
template <class Traits>
struct Accumulators {
  QueryFragments<Traits> q;
  float o[Traits::kOutColumns / 2];
  float s[Traits::kParts][Traits::kPartN / 2];
  uint32_t probabilities[Traits::kBlockN / 16][4];
  float sum[2];            // this lane's part, where they are not columns of o
  RunningMaximum maximum;  // where Traits::kFollows
};

// The shifts of the rows, from the biases of a tile whose S may still be under way.
template <class Traits, bool kMasked>
__device__ __forceinline__ void follow_bias(Accumulators<Traits>& acc, const RowFactors<Traits>& rows,
                                            const typename Traits::BiasView& bias, const VisiblePairs<Traits>& visible) {
  float maximum[2];
  largest_bias<kMasked>(maximum, bias, visible);
#pragma unroll
  for (int half = 0; half < 2; ++half) maximum[half] *= kLog2e;
  acc.maximum.raise(maximum);
#pragma unroll
  for (int half = 0; half < 2; ++half) acc.sum[half] *= acc.maximum.factor[half];
}

// S of one part of a tile -> P in place, and the sums.
template <class Traits, bool kMasked>
__device__ __forceinline__ void exponentiate_with_bias(Accumulators<Traits>& acc, int part, const float* k_factor,
                                                       const RowFactors<Traits>& rows, const typename Traits::BiasView& bias, int column,
                                                       const VisiblePairs<Traits>& visible) {
  if constexpr (Traits::kSoftmax == Softmax::kBounded) {
    const float subtrahend[2] = {acc.maximum.subtrahend(0), acc.maximum.subtrahend(1)};
    exponentiate_with_bias<Traits, kMasked>(acc.s[part], acc.sum, k_factor, rows.q_factor, subtrahend, bias, column,
                                            part * Traits::kPartN, visible);
  } else {
    float maximum[2];
    add_bias<Traits, kMasked>(acc.s[part], maximum, k_factor, rows.q_factor, bias, column, visible);
#pragma unroll
    for (int half = 0; half < 2; ++half) maximum[half] *= kLog2e;
    acc.maximum.raise(maximum);
    exponentiate_logits<Traits>(acc.s[part], acc.sum, acc.maximum);
  }
}

// Until S of a part is there; kBehind: groups of wgmma that were issued behind S.
template <class Traits, int kBehind>
__device__ __forceinline__ void wait_for_scores(Accumulators<Traits>& acc, int part) {
  if (part == Traits::kParts - 1) {
    wgmma_wait<kBehind>();
  } else {
    wgmma_wait<kBehind + 1>();
  }
  wgmma_pin(acc.s[part]);
}

// S -> P of one tile, part by part as they get ready; kBehind: groups of wgmma that were issued behind S.
template <class Traits, bool kMasked, int kBehind>
__device__ __forceinline__ void exponentiate_tile(Accumulators<Traits>& acc, ForwardStorage<Traits>& smem,
                                                  const ConsumerThread& thread, const RowFactors<Traits>& rows,
                                                  const ConsumerState<Traits>& state, const KeyTileView<Traits>& tile) {
  const VisiblePairs<Traits> visible(rows.limit, tile.first_key, tile.visible, thread.column);
  if constexpr (Traits::kBias) {
    const typename Traits::BiasView bias(rows.bias, smem.bias[state.ring.stage]);
    if constexpr (Traits::kSoftmax == Softmax::kBounded) follow_bias<Traits, kMasked>(acc, rows, bias, visible);
#pragma unroll
    for (int part = 0; part < Traits::kParts; ++part) {
      wait_for_scores<Traits, kBehind>(acc, part);
      const float* k_factor = smem.k_factor[state.factors.stage] + part * Traits::kPartN;
      exponentiate_with_bias<Traits, kMasked>(acc, part, k_factor, rows, bias, thread.column, visible);
      __syncwarp();
      // Sums are never of these bits: that ties the release, and with it the wait for O, to behind the exponentials.
      const bool is_read = (__float_as_uint(acc.sum[0]) | __float_as_uint(acc.sum[1])) != 0xffffffffu;
      if (part == Traits::kParts - 1 && thread.releases && is_read) arrive(smem.empty_k[state.ring.stage]);
    }
    return;
  }
#pragma unroll
  for (int part = 0; part < Traits::kParts; ++part) {
    wait_for_scores<Traits, kBehind>(acc, part);
    const bool last_part = part == Traits::kParts - 1;
    if (last_part && thread.releases) arrive(smem.empty_k[state.ring.stage]);
    const int first = part * Traits::kPartN;
    const float* k_factor = smem.k_factor[state.factors.stage] + first;
    if constexpr (Traits::kSoftmax == Softmax::kBounded) {
      exponentiate<Traits, kMasked>(acc.s[part], acc.sum, k_factor, rows.q_factor, rows.shift, thread.column, first, visible);
    } else {
      acc.maximum.template follow<Traits, kMasked>(acc.s[part], k_factor, rows.q_factor, thread.column, visible);
      exponentiate_logits<Traits>(acc.s[part], acc.sum, acc.maximum);
    }
  }
}

// S of `tile` beside O of the tile before, whose V lies at `previous`: the products overlap with the exponentials, here and
// in the other warpgroups. kMasked is a template argument, not a branch: a branch between the issue of a wgmma and its
// wait makes the compiler serialise them.
template <class Traits, bool kMasked>
__device__ __forceinline__ void attend_tile(Accumulators<Traits>& acc, ForwardStorage<Traits>& smem,
                                            const ConsumerThread& thread, const RowFactors<Traits>& rows,
                                            const RingPosition<Traits::kStages>& previous,
                                            ConsumerState<Traits>& state, const KeyTileView<Traits>& tile) {
  state.wait_for_v(smem, previous);
  issue_scores<Traits>(acc.s, acc.q, smem.q[thread.warpgroup], smem.k[state.ring.stage]);
  issue_output<Traits>(acc.o, acc.probabilities, smem, previous.stage);
  state.look_ahead(smem);
  exponentiate_tile<Traits, kMasked, 1>(acc, smem, thread, rows, state, tile);
  if constexpr (Traits::kExponentialsFirst) {
    const float* last = acc.s[Traits::kParts - 1] + Traits::kPartN / 2 - 16;
    store_shared(smem.parked[threadIdx.x - 128], (last[15] + last[11]) + (last[7] + last[3]));
  }
  wgmma_wait<0>();
  wgmma_pin(acc.o);
  if (thread.releases) arrive(smem.empty_v[previous.stage]);
  if constexpr (Traits::kFollows) {
    if (acc.maximum.any_raised()) {
#pragma unroll
      for (int i = 0; i < Traits::kOutColumns / 2; ++i) acc.o[i] *= acc.maximum.factor[i / 2 % 2];
    }
  }
  pack_probabilities<Traits>(acc.probabilities, acc.s);
}

// O and the row sums of one block of queries over all its keys, from the last tile to the first (num_tiles >= 1).
template <class Traits>
__device__ __forceinline__ void attend(Accumulators<Traits>& acc, const BlockOfQueries<Traits>& block,
                                       ForwardStorage<Traits>& smem, const ConsumerThread& thread,
                                       const RowFactors<Traits>& rows, ConsumerState<Traits>& state) {
  auto tile = KeyTileView<Traits>::first(smem, state, block);
  issue_scores<Traits>(acc.s, acc.q, smem.q[thread.warpgroup], smem.k[state.ring.stage]);
  state.look_ahead(smem);
  exponentiate_tile<Traits, true, 0>(acc, smem, thread, rows, state, tile);
  pack_probabilities<Traits>(acc.probabilities, acc.s);

  if constexpr (Traits::kKeyMask) {
    while (!tile.last) {
      const auto previous = state.ring;
      state.advance();
      tile = KeyTileView<Traits>::next(smem, state, tile);
      if (tile.is_cut(block)) {
        attend_tile<Traits, true>(acc, smem, thread, rows, previous, state, tile);
      } else {
        attend_tile<Traits, false>(acc, smem, thread, rows, previous, state, tile);
      }
    }
  } else {
    int left = block.num_tiles - 1;
    for (; left > 0 && tile.first_key - 1 > block.first_limit; --left) {
      const auto previous = state.ring;
      state.advance();
      tile = KeyTileView<Traits>::next(smem, state, tile);
      attend_tile<Traits, true>(acc, smem, thread, rows, previous, state, tile);
    }
    for (; left > 0; --left) {
      const auto previous = state.ring;
      state.advance();
      tile = KeyTileView<Traits>::next(smem, state, tile);
      attend_tile<Traits, false>(acc, smem, thread, rows, previous, state, tile);
    }
  }

  if (!Traits::kQueriesInRegisters) arrive(smem.empty_q[thread.warpgroup]);
  state.wait_for_v(smem, state.ring);
  issue_output<Traits>(acc.o, acc.probabilities, smem, state.ring.stage);
  wgmma_wait<0>();
  wgmma_pin(acc.o);
  if (thread.releases) arrive(smem.empty_v[state.ring.stage]);
  state.advance();
}

// One block of queries. empty_q: every thread arrives for itself, once it reads neither smem.q nor smem.block any more.
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
  for (int i = 0; i < Traits::kOutColumns / 2; ++i) acc.o[i] = 0.0f;

  // Logits are in base 2 but where they are kept beside a bias, which comes in natural units.
  constexpr float kBase = Traits::kBias && Traits::kSoftmax == Softmax::kRunningMax ? 1.0f : kLog2e;
  RowFactors<Traits> rows;
  if constexpr (Traits::kBias) rows.bias = {thread.row, p.bias_query == 0};
  rows.shift = bounded_shift<typename Traits::Element>(p.bound) * kLog2e;
  acc.maximum.shift[0] = acc.maximum.shift[1] = -INFINITY;
  if (block.num_tiles > 0) {
    if constexpr (Traits::kQueriesInRegisters) {
      acc.q.load(smem.q[thread.warpgroup], thread);
      arrive(smem.empty_q[thread.warpgroup]);
      if (folded) acc.q.row_norms(rnorm);
    } else {
      if (folded) row_norms<Traits>(rnorm, smem.q[thread.warpgroup], thread.row % 64);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = block.first_query + thread.row + half * 8;
      rows.q_factor[half] = scale * kBase * rnorm[half];
      rows.limit[half] = p.causal ? min(query + p.num_keys - p.num_queries, p.num_keys - 1) : p.num_keys - 1;
    }
    attend<Traits>(acc, block, smem, thread, rows, state);
  } else {
    arrive(smem.empty_q[thread.warpgroup]);
  }
  constexpr bool kFollows = Traits::kFollows;
  const float shift[2] = {kFollows ? acc.maximum.shift[0] : rows.shift, kFollows ? acc.maximum.shift[1] : rows.shift};
  store_results<Traits>(p, block, thread.row, acc.o, acc.sum, rnorm, shift, folded && p.q_rnorm != nullptr);
}

template <class Traits>
__device__ __forceinline__ void consume(const ForwardParams& p, ForwardStorage<Traits>& smem) {
  const ConsumerThread thread;
  ConsumerState<Traits> state;
  for (;;) {
    wait(smem.full_q[thread.warpgroup], state.q_phase);
    const BlockOfQueries<Traits> block = smem.block[state.q_phase];
    state.q_phase ^= 1;
    if (block.num_tiles < 0) return;
    consume_block<Traits>(p, block, smem, thread, state);
  }
}

// What the row sums are made of; the tensor cores read it like a tile that TMA wrote.
template <class Traits>
__device__ __forceinline__ void write_ones(ForwardStorage<Traits>& smem) {
  if constexpr (Traits::kSumsByProducts) {
    using Element = typename Traits::Element;
    const uint32_t ones = pack<Element>(1.0f, 1.0f);
    for (int i = threadIdx.x; i < 16 * 64 / 2; i += Traits::kThreads) reinterpret_cast<uint32_t*>(smem.ones)[i] = ones;
    fence_async_shared();
  }
}

template <class Traits>
__device__ __forceinline__ void initialize_barriers(ForwardStorage<Traits>& smem) {
  if (threadIdx.x == 0) {
    constexpr int kMaskWarp = Traits::kKeyMask ? 32 : 0;  // the lanes of clean()
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      initialize(smem.full_q[warpgroup], 1);
      initialize(smem.empty_q[warpgroup], 128);
    }
    for (int stage = 0; stage < Traits::kStages; ++stage) {
      initialize(smem.full_k[stage], 33);  // the producer's lanes for their factors, and lane 0 for the copy
      initialize(smem.full_v[stage], Traits::kKeyMask ? kMaskWarp : 1);
      if (Traits::kKeyMask) initialize(smem.loaded_v[stage], 1);
      initialize(smem.empty_k[stage], Traits::kConsumerWarps + kMaskWarp);
      initialize(smem.empty_v[stage], Traits::kConsumerWarps);
    }
    fence_barrier_initialization();
  }
  __syncthreads();
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    forward_kernel(const __grid_constant__ ForwardParams p, const __grid_constant__ ForwardMaps maps,
                   const __grid_constant__ Schedule schedule) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<ForwardStorage<Traits>*>(raw);
  write_ones<Traits>(smem);
  initialize_barriers<Traits>(smem);
  if (threadIdx.x < 128) {
    shrink_registers<Traits::kProducerRegisters>();
    if (threadIdx.x < 32) produce<Traits>(p, maps, schedule, smem);
    if constexpr (Traits::kKeyMask) {
      if (threadIdx.x / 32 == 1) clean<Traits>(smem);
    }
  } else {
    grow_registers<Traits::kConsumerRegisters>();
    consume<Traits>(p, smem);
  }
}

}  // namespace fcsa::sm90
