// The forward of a pair bias on Hopper: short rows of a small head dim, hundreds of which share one bias.
//
// A block of threads owns 64 * kQueryTiles queries of a head. Their bias lies in shared memory while it walks through the
// batch rows that share it, two at a time; of each row the block holds all keys. A warpgroup has 64 queries of a row:
//
//   64 keys     s = bias * log2(e) - shift, s += q k^T      wgmma, q in registers: the bias starts the accumulators
//               P = exp2(s), sum += P, out += P v           wgmma, P in registers
//
// |q k^T| <= scale, so the largest bias of a query bounds its logits: the shift is known before the walk, and no maximum is
// tracked. Where the keys of a row that are visible have much smaller biases, so that a sum is too small to be exact, the
// warpgroup finds the maxima of its logits and takes the row once more.
#pragma once

#include "../common/launch.cuh"
#include "forward_store.cuh"
#include "pair_bias.cuh"
#include "pair_rows.cuh"
#include "wgmma.cuh"

namespace fcsa::sm90::pair {

template <class Element_, class BiasValue_, int kKeyTiles_>
struct PairForwardTraits {
  using Element = Element_;
  using BiasValue = BiasValue_;
  static constexpr int kHeadDim = pair::kHeadDim;
  static constexpr int kKeyTiles = kKeyTiles_, kMaxKeys = kTileKeys * kKeyTiles;
  // What has room: the keys of two rows are 16 KB a tile of keys, the bias of 64 queries 8 KB, as float 16.
  using StoredBias = std::conditional_t<(kKeyTiles <= 4), float, BiasValue>;
  static constexpr int kQueryTiles = kKeyTiles * (16 + 8 * sizeof(StoredBias)) <= 224 ? 2 : 1;
  static constexpr int kBlockQueries = kQueries * kQueryTiles;
  static constexpr int kRowsAtOnce = 2, kRowThreads = 128 * kQueryTiles, kThreads = kRowThreads * kRowsAtOnce;

  // P <= 2^kHeadroom. A sum of at least least_sum(keys) holds a P that is exact, and so are all that count beside it: P
  // in half is normal from 2^-14 on.
  static constexpr bool kHalf = std::is_same_v<Element, __half>;
  static constexpr float kHeadroom = kHalf ? 15.0f : 8.0f;
  __device__ static float least_sum(int num_keys) { return kHalf ? num_keys * 0x1p-14f : 0x1p-90f; }
};

template <class Traits>
struct PairForwardSmem {
  KeyRows<Traits::kMaxKeys> rows[Traits::kRowsAtOnce];
  BiasTiles<typename Traits::StoredBias, Traits::kQueryTiles, Traits::kKeyTiles> bias;
  uint32_t visible[Traits::kRowsAtOnce][Traits::kMaxKeys / 32];
  int repeated[Traits::kRowsAtOnce][Traits::kQueryTiles];  // the row, counted, that a warpgroup takes once more
};

// One warpgroup's part of a block.
template <class Traits>
class PairForwardWarpgroup {
  using Element = typename Traits::Element;
  static constexpr int kSteps = kTileKeys / 16;
  static constexpr int kWords = ceil_div(Traits::kMaxKeys, Traits::kRowThreads);  // of a warp

  const ForwardParams& p_;
  PairForwardSmem<Traits>& smem_;
  const int slot_, query_tile_, thread_;  // of the rows at once; of the block's queries; in the threads of the slot
  const int num_key_tiles_;
  int query_, counted_rows_;  // this thread's first query, rows so far
  float bound_[2];            // the largest bias of its two queries

  uint32_t q_[kHeadDim / 16][4];
  float shift_[2], sum_[2], o_[kHeadDim / 2];

 public:
  __device__ __forceinline__ PairForwardWarpgroup(const ForwardParams& p, PairForwardSmem<Traits>& smem)
      : p_(p),
        smem_(smem),
        slot_(threadIdx.x / Traits::kRowThreads),
        query_tile_(threadIdx.x % Traits::kRowThreads / 128),
        thread_(threadIdx.x % Traits::kRowThreads),
        num_key_tiles_(ceil_div(p.num_keys, kTileKeys)),
        counted_rows_(0) {
    if (threadIdx.x % 128 == 0) smem.repeated[slot_][query_tile_] = 0;
  }

  __device__ __forceinline__ int slot() const { return slot_; }

  // The bias in shared memory is that of the queries from first_query on.
  __device__ __forceinline__ void start_bias(int first_query) {
    query_ = first_query + query_tile_ * kQueries + threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    smem_.bias.row_maxima(bound_, query_tile_, num_key_tiles_);
  }

  __device__ __forceinline__ void process(const TileIndex& row) {
    const float scale = p_.scale == nullptr ? p_.scale_value : p_.scale[row.head];
    float q_rnorm[2];
    load(row, scale, q_rnorm);
    ++counted_rows_;
    set_bounded_shift(scale);
    bool exact = !p_.l2norm_qk;  // the caller's promise is not relied on
#pragma unroll 1
    while (true) {
      if (exact) find_maxima();
      walk();
      if (exact || !needs_maxima()) break;
      exact = true;
    }
    store(row, q_rnorm);
  }

 private:
  // This warp's words of the bits of the row's visible keys.
  __device__ __forceinline__ void key_bits(uint32_t (&visible)[kWords], const TileIndex& row) const {
    const uint8_t* mask = mask_row(p_, row);
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int key = thread_ + i * Traits::kRowThreads;
      visible[i] = __ballot_sync(0xffffffffu, key < p_.num_keys && (mask == nullptr || mask[key * p_.mask_key] != 0));
    }
  }

  // k and v to shared memory, q to registers.
  __device__ __forceinline__ void load(const TileIndex& row, float scale, float (&q_rnorm)[2]) {
    const ScaleFactors factors(scale);
    KeyLoader<Element, Traits::kMaxKeys, Traits::kRowThreads> keys;
    QueryLoader<Element> queries;
    keys.load(p_, row, thread_);
    queries.load(static_cast<const Element*>(p_.q) + row.offset(p_.q_strides), p_.q_strides.row, query_, p_.num_queries,
                 p_.head_dim);
    const int padded_keys = num_key_tiles_ * kTileKeys;
    uint32_t visible[kWords];
    key_bits(visible, row);
    named_barrier_sync(1 + slot_, Traits::kRowThreads);  // the row before is done with
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const int word = thread_ / 32 + i * (Traits::kRowThreads / 32);
      if (threadIdx.x % 32 == 0 && word < padded_keys / 32) smem_.visible[slot_][word] = visible[i];
    }
    float* k_rnorms = p_.l2norm_qk && row.tile == 0 ? p_.k_rnorm + row.first_row(p_.b1, p_.kv_heads, p_.num_keys) : nullptr;
    keys.store(smem_.rows[slot_], p_.num_keys, padded_keys, p_.mask != nullptr, p_.l2norm_qk, factors.key, k_rnorms, thread_);
    queries.normalize(q_, q_rnorm, p_.l2norm_qk, factors.query);
    fence_async_shared();
    named_barrier_sync(1 + slot_, Traits::kRowThreads);
  }

  __device__ __forceinline__ void set_bounded_shift(float scale) {
    const float bound = fabsf(scale) * (kLog2e * (1.0f + 0x1p-9f));  // unit vectors in half, rounded
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      shift_[half] = bound_[half] == -INFINITY ? 0.0f : fmaf(bound_[half], kLog2e, bound - Traits::kHeadroom);
    }
  }

  // s = the logits of the tile's keys in base 2, less the shift; -inf for hidden keys.
  __device__ __forceinline__ void scores(float (&s)[kLaneValues], int tile, uint2 visible) {
    smem_.bias.start(s, query_tile_, tile, shift_);
    wgmma_pin(s);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kHeadDim / 16; ++step) {
      wgmma_rs<Unit, true>(s, q_[step], smem_.rows[slot_].keys(tile * kTileKeys, 16 * step));
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(s);
    if ((visible.x & visible.y) == 0xffffffffu) return;
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const uint32_t word = (i / 16 == 0 ? visible.x : visible.y) >> (threadIdx.x % 4 * 2);
      s[i] = word >> (i / 4 % 4 * 8 + i % 2) & 1 ? s[i] : -INFINITY;
    }
  }

  __device__ __forceinline__ uint2 visible(int tile) const {
    return reinterpret_cast<const uint2*>(smem_.visible[slot_])[tile];
  }

  __device__ __forceinline__ void walk() {
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) o_[i] = 0.0f;
    sum_[0] = sum_[1] = 0.0f;
#pragma unroll 1
    for (int tile = 0; tile < num_key_tiles_; ++tile) {
      const uint2 bits = visible(tile);
      if ((bits.x | bits.y) == 0) continue;
      float s[kLaneValues];
      scores(s, tile, bits);
      uint32_t p[kSteps][4];
      exponentials(p, s);
      wgmma_pin(o_);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; ++i) {
        wgmma_rs_transposed<Element, true>(o_, p[i], smem_.rows[slot_].values(tile * kTileKeys + 16 * i));
      }
      wgmma_commit();
      wgmma_wait<0>();  // the accumulators of s may not be started while a product is under way (ptxas)
      wgmma_pin(o_);
      wgmma_keep(p);
    }
    sum_[0] = lane_sum<4>(sum_[0]);
    sum_[1] = lane_sum<4>(sum_[1]);
  }

  __device__ __forceinline__ void exponentials(uint32_t (&p)[kSteps][4], const float (&s)[kLaneValues]) {
#pragma unroll
    for (int i = 0; i < kLaneValues / 4; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float low = exp2_approx(s[4 * i + 2 * half]), high = exp2_approx(s[4 * i + 2 * half + 1]);
        sum_[half] += low + high;
        p[i / 2][i % 2 * 2 + half] = pack<Element>(low, high);
      }
    }
  }

  // Whether some query of the warpgroup has a sum too small to be exact, or none at all (NaN).
  __device__ __forceinline__ bool needs_maxima() {
    const float least = Traits::least_sum(num_key_tiles_ * kTileKeys);
    bool low = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      low |= query_ + 8 * half < p_.num_queries && bound_[half] != -INFINITY && !(sum_[half] >= least);
    }
    int& repeated = smem_.repeated[slot_][query_tile_];
    if (__any_sync(0xffffffffu, low) && has_visible_key() && threadIdx.x % 32 == 0) repeated = counted_rows_;
    named_barrier_sync(1 + Traits::kRowsAtOnce + threadIdx.x / 128, 128);
    return repeated == counted_rows_;
  }

  __device__ __forceinline__ bool has_visible_key() const {
    uint32_t any = 0;
    for (int word = 0; word < num_key_tiles_ * (kTileKeys / 32); ++word) any |= smem_.visible[slot_][word];
    return any != 0;
  }

  // The shift from the maxima of this row's logits.
  __device__ __forceinline__ void find_maxima() {
    float largest[2] = {-INFINITY, -INFINITY};
    shift_[0] = shift_[1] = 0.0f;
#pragma unroll 1
    for (int tile = 0; tile < num_key_tiles_; ++tile) {
      float s[kLaneValues];
      scores(s, tile, visible(tile));
#pragma unroll
      for (int i = 0; i < kLaneValues; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], s[i]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float maximum = lane_max<4>(largest[half]);
      shift_[half] = maximum == -INFINITY ? 0.0f : maximum - 8.0f;
    }
  }

  __device__ __forceinline__ void store(const TileIndex& row, const float (&q_rnorm)[2]) {
    const int64_t first_row = row.first_row(p_.b1, p_.heads, p_.num_queries);
    Element* out = static_cast<Element*>(p_.out) + row.offset(p_.out_strides);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float reciprocal = sum_[half] == 0.0f ? 0.0f : reciprocal_approx(sum_[half]);
      const int query = query_ + half * 8;
      const bool valid = query < p_.num_queries;
      if (valid && threadIdx.x % 4 == 0) {
        p_.lse[first_row + query] = sum_[half] == 0.0f ? -INFINITY : (shift_[half] + log2_approx(sum_[half])) * kLn2;
        if (p_.l2norm_qk) p_.q_rnorm[first_row + query] = q_rnorm[half];
      }
      uint32_t words[kHeadDim / 8];
#pragma unroll
      for (int i = 0; i < kHeadDim / 8; ++i) {
        words[i] = pack<Element>(o_[i * 4 + half * 2] * reciprocal, o_[i * 4 + half * 2 + 1] * reciprocal);
      }
      store_row<Traits>(out + query * p_.out_strides.row, words, p_.head_dim, valid);
    }
  }
};

}  // namespace fcsa::sm90::pair

namespace fcsa::sm90 {

// A block of threads takes a stretch of all (queries, head, outer row, inner row), inner rows fastest: those that share a bias.
template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    pair_forward_kernel(const __grid_constant__ ForwardParams p, const pair::Rows rows) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || !defined(__CUDACC__)
  extern __shared__ __align__(1024) uint8_t shared_memory[];
  auto& smem = *reinterpret_cast<pair::PairForwardSmem<Traits>*>(shared_memory);
  const int query_blocks = ceil_div(p.num_queries, Traits::kBlockQueries);
  const int64_t items = static_cast<int64_t>(query_blocks) * p.heads * rows.outer * rows.inner;
  int item = static_cast<int>(items * blockIdx.x / gridDim.x);
  const int end = static_cast<int>(items * (blockIdx.x + 1) / gridDim.x);
  pair::PairForwardWarpgroup<Traits> warpgroup(p, smem);
  while (item < end) {
    const int inner = item % rows.inner, count = min(rows.inner - inner, end - item);
    int rest = item / rows.inner;
    const int query_block = rest % query_blocks;
    rest /= query_blocks;
    const int head = rest % p.heads, outer = rest / p.heads;
    const TileIndex first = rows.at(outer, inner, head, query_block);
    const int64_t offset = first.b0 * p.bias_b0 + first.b1 * p.bias_b1 + head * p.bias_head;
    __syncthreads();
    smem.bias.template load<Traits::kThreads>(p, static_cast<const typename Traits::BiasValue*>(p.bias) + offset,
                                              query_block * Traits::kBlockQueries);
    __syncthreads();
    warpgroup.start_bias(query_block * Traits::kBlockQueries);
#pragma unroll 1
    for (int i = warpgroup.slot(); i < count; i += Traits::kRowsAtOnce) {
      warpgroup.process(rows.at(outer, inner + i, head, query_block));
    }
    item += count;
  }
#endif
}

template <class Traits>
cudaError_t launch_pair_forward_kernel(const ForwardParams& p, cudaStream_t stream) {
  const pair::Rows rows = pair::rows_of(p);
  const int64_t items =
      static_cast<int64_t>(ceil_div(p.num_queries, Traits::kBlockQueries)) * p.heads * rows.outer * rows.inner;
  if (items > INT32_MAX) return cudaErrorInvalidConfiguration;
  int processors = 0;
  if (const cudaError_t error = multiprocessor_count(&processors); error != cudaSuccess) return error;
  const int blocks = static_cast<int>(items < processors ? items : processors);
  constexpr int kBytes = sizeof(pair::PairForwardSmem<Traits>);
  static_assert(kBytes <= 227 * 1024, "shared memory of a block on sm_90");
  return launch_blocks<pair_forward_kernel<Traits>>(p, rows, blocks, Traits::kThreads, kBytes, stream);
}

template <class Element, class BiasValue>
cudaError_t launch_pair_forward_of(const ForwardParams& p, cudaStream_t stream) {
  using pair::PairForwardTraits;
  if (p.num_keys <= 128) return launch_pair_forward_kernel<PairForwardTraits<Element, BiasValue, 2>>(p, stream);
  if (p.num_keys <= 256) return launch_pair_forward_kernel<PairForwardTraits<Element, BiasValue, 4>>(p, stream);
  if (p.num_keys <= 384) return launch_pair_forward_kernel<PairForwardTraits<Element, BiasValue, 6>>(p, stream);
  if constexpr (sizeof(BiasValue) == 2) {
    if (p.num_keys <= 512) return launch_pair_forward_kernel<PairForwardTraits<Element, BiasValue, 8>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <class Element>
cudaError_t launch_pair_forward(const ForwardParams& p, cudaStream_t stream) {
  const bool fits = p.bias != nullptr && !p.causal && p.groups == 1 && p.heads == p.kv_heads;
  if (!fits || p.head_dim > pair::kHeadDim || p.head_dim % 8 != 0) return cudaErrorInvalidValue;
  return p.bias_is_float32 ? launch_pair_forward_of<Element, float>(p, stream)
                           : launch_pair_forward_of<Element, Element>(p, stream);
}

}  // namespace fcsa::sm90
