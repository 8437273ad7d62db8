// The gradient of a bias (sm80/backward_dbias.cuh) for head dims up to 32, with Hopper's products: a block of threads owns
// 128 x 128 of it and walks over the rows that share it; a warpgroup owns 64 queries, whose sums, bias, q and dO are in
// registers.
//
//   32 keys   S = Q K^T | dP = dO V^T      under way while the exponentials of the 32 keys before are taken
//             P = exp2(S factors + bias + shift)      dbias += P (dP - delta)
#pragma once

#include "../sm80/backward_dbias.cuh"
#include "narrow_tile.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace fcsa::sm90 {

template <class Traits>
struct NarrowDbiasConfig : sm80::DbiasConfig<Traits, false> {
  using Traits::kPlanes;
  static_assert(Traits::kHeadDim == 32);
  static constexpr int kQueries = 128, kKeys = 128, kTileFloats = kQueries * kKeys;
  static constexpr int kM = 1, kN = 16, kKeyWarps = 1;  // a warp has its 16 queries of all keys
  static constexpr int kThreads = 256, kMinBlocks = 1;
  static constexpr int kStages = kPlanes == 1 ? 4 : 3;
  static constexpr int kStageAlignment = 1024;

  static __device__ __forceinline__ int first_row(int warp) { return 16 * warp; }
  static __device__ __forceinline__ int first_column(int) { return 0; }
};

template <class Config, class Value>
class NarrowDbiasWarp : public sm80::DbiasWarp<Config, Value> {
  using Base = sm80::DbiasWarp<Config, Value>;
  using typename Base::QueryReader;
  using typename Base::RowValues;
  using typename Base::Stage;
  using Base::lane_, Base::row0_, Base::sum_, Base::bias_;
  static constexpr int kChunkKeys = 32, kChunks = Config::kKeys / kChunkKeys, kSteps = Base::kSteps;
  static constexpr int kPlanes = Config::kPlanes, kPlane = Config::kKeys * kNarrowRowStep;  // kPlane: from one to the next
  static constexpr int kBuffers = kPlanes == 1 ? 2 : 1;  // chunks of scores; two of them and four operands are not to be held
  using Scores = float[kChunkKeys / 2];
  using Rows = uint32_t[kPlanes * kSteps][4];

 public:
  __device__ __forceinline__ void add(const Stage& smem, const BackwardParams& p, const sm80::DbiasStep& step) {
    bool is_hidden = false;
#pragma unroll
    for (int word = 0; word < Config::kKeys / 32; ++word) is_hidden |= smem.visible[word] != 0xffffffffu;
    if (is_hidden) {
      add_visible<true>(smem, p, step);
    } else {
      add_visible<false>(smem, p, step);
    }
  }

 private:
  template <bool kHidden>
  __device__ __forceinline__ void add_visible(const Stage& smem, const BackwardParams& p, const sm80::DbiasStep& step) {
    Rows q, dout;
    const QueryReader q_reader(smem.q, row0_, 0), dout_reader(smem.dout, row0_, 0);
#pragma unroll
    for (int i = 0; i < kPlanes * kSteps; ++i) {
      q_reader.load(q[i], i / kSteps * Config::kQueries, i % kSteps * 2);
      dout_reader.load(dout[i], i / kSteps * Config::kQueries, i % kSteps * 2);
    }
    const uint32_t k = operand_address(sm80::ptx::smem_address(smem.k.data));
    const uint32_t v = operand_address(sm80::ptx::smem_address(smem.v.data));
    const RowValues rows = Base::rows_of(smem, p, step);
    Scores s[kBuffers], dp[kBuffers];
    multiply(s[0], dp[0], q, dout, k, v);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int own = chunk % kBuffers;
      const uint32_t ahead = (chunk + 1) * kChunkKeys * kNarrowRowStep;
      const bool is_ahead = kBuffers == 2 && chunk + 1 < kChunks;
      if (is_ahead) multiply(s[(chunk + 1) % kBuffers], dp[(chunk + 1) % kBuffers], q, dout, k + ahead, v + ahead);
      is_ahead ? wgmma_wait<1>() : wgmma_wait<0>();
      wgmma_pin(s[own]);
      wgmma_pin(dp[own]);
      add_chunk<kHidden>(s[own], dp[own], smem, rows, chunk);
      if (kBuffers == 1 && chunk + 1 < kChunks) multiply(s[0], dp[0], q, dout, k + ahead, v + ahead);
    }
    wgmma_keep(q);
    wgmma_keep(dout);
  }

  // 64 queries x 32 keys: one group.
  __device__ __forceinline__ static void multiply(Scores& s, Scores& dp, const Rows& q, const Rows& dout, uint32_t k, uint32_t v) {
    wgmma_fence();
    multiply_rows(s, q, k);
    multiply_rows(dp, dout, v);
    wgmma_commit();
  }

  // x = rows keys^T; of operands in two planes the small products first.
  __device__ __forceinline__ static void multiply_rows(Scores& x, const Rows& rows, uint32_t keys) {
    using Operand = typename Config::Operand;
    if constexpr (kPlanes == 2) {
      wgmma_rs<Operand, false>(x, rows[0], narrow_descriptor(keys + kPlane));
      wgmma_rs<Operand, true>(x, rows[1], narrow_descriptor(keys + kPlane + kNarrowColumnStep));
      wgmma_rs<Operand, true>(x, rows[kSteps], narrow_descriptor(keys));
      wgmma_rs<Operand, true>(x, rows[kSteps + 1], narrow_descriptor(keys + kNarrowColumnStep));
    }
    wgmma_rs<Operand, kPlanes == 2>(x, rows[0], narrow_descriptor(keys));
    wgmma_rs<Operand, true>(x, rows[1], narrow_descriptor(keys + kNarrowColumnStep));
  }

  template <bool kHidden>
  __device__ __forceinline__ void add_chunk(const Scores& s, const Scores& dp, const Stage& smem, const RowValues& rows,
                                            int chunk) {
#pragma unroll
    for (int n = 0; n < kChunkKeys / 8; ++n) {
      const int column = chunk * kChunkKeys + 8 * n + lane_ % 4 * 2;
      const float2 factors = *reinterpret_cast<const float2*>(smem.key_factor + column);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int half = r / 2;
        const float2 pair = Base::values_of(bias_[0][chunk * (kChunkKeys / 8) + n][half]);
        const float t = Config::kFoldsNorm ? s[4 * n + r] * (r % 2 == 0 ? factors.x : factors.y) : s[4 * n + r];
        float x = fmaf(t, rows.score[0][half], fmaf(r % 2 == 0 ? pair.x : pair.y, kLog2e, rows.shift[0][half]));
        if constexpr (kHidden) x = smem.visible[chunk] >> (8 * n + lane_ % 4 * 2 + r % 2) & 1 ? x : -INFINITY;
        float& sum = sum_[0][chunk * (kChunkKeys / 8) + n][r];
        sum = fmaf(sm80::ptx::exp2_approx(x), dp[4 * n + r] + rows.delta[0][half], sum);
      }
    }
  }
};

// Of a part of the sharers, rows of one batch dim; grid: tiles, then parts.
template <class Config, class Value>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    narrow_dbias_kernel(const __grid_constant__ BackwardParams p, const sm80::DbiasParts parts) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared_memory[];
  using Storage = sm80::DbiasStorage<Config>;
  constexpr int kStages = Config::kStages;
  Storage& storage = *reinterpret_cast<Storage*>(shared_memory);
  const sm80::DbiasOwner<Config> owner(p, blockIdx.x % parts.tiles);
  const int first = blockIdx.x / parts.tiles * parts.sharers_a_part;
  const int end = min(first + parts.sharers_a_part, owner.num_sharers());
  sm80::DbiasStep step = owner.sharer(first);
  sm80::DbiasSources<Config> from(p, step);
#pragma unroll
  for (int ahead = 0; ahead < kStages - 1; ++ahead) {
    if (first + ahead < end) sm80::load_step<Config>(storage.stage[ahead], p, from, step);
    from.advance(parts.row);
    sm80::ptx::cp_async_commit();
  }
  NarrowDbiasWarp<Config, Value> warp;
  warp.start(p, owner.sharer(0));
#pragma unroll 1
  for (int sharer = first, stage = 0; sharer < end; ++sharer) {
    sm80::ptx::cp_async_wait<kStages - 2>();
    fence_async_shared();
    __syncthreads();  // this row's operands are there; nobody reads those of the row before
    const int last = stage == 0 ? kStages - 1 : stage - 1;
    if (sharer + kStages - 1 < end) sm80::load_step<Config>(storage.stage[last], p, from, step);
    from.advance(parts.row);
    sm80::ptx::cp_async_commit();
    warp.add(storage.stage[stage], p, step);
    step.head.b0 += parts.row.b0, step.head.b1 += parts.row.b1;
    stage = stage + 1 < kStages ? stage + 1 : 0;
  }
  sm80::ptx::cp_async_wait<0>();
  sm80::finish_dbias(warp, storage, p, parts, owner);
#endif
}

// Whether this kernel serves the call on this device. Value: the type of the bias.
template <class Traits, class Value>
cudaError_t launch_narrow_dbias(const BackwardParams& p, bool* is_served, cudaStream_t stream) {
  using Config = NarrowDbiasConfig<Traits>;
  constexpr auto kKernel = narrow_dbias_kernel<Config, Value>;
  *is_served = false;
  if (!is_compiled_for_hopper<kKernel>()) return cudaSuccess;
  int multiprocessors = 1;
  cudaError_t error = multiprocessor_count(&multiprocessors);
  if (error != cudaSuccess) return error;
  const sm80::DbiasParts parts = sm80::dbias_parts<Config>(p, multiprocessors);
  if (parts.count == 0 || !parts.row.is_linear) return cudaSuccess;
  *is_served = true;
  error = launch_blocks<kKernel>(p, parts, int64_t{parts.tiles} * parts.count, Config::kThreads,
                                 sizeof(sm80::DbiasStorage<Config>), stream);
  return error != cudaSuccess ? error : sm80::launch_dbias_sum<Config>(p, parts, stream);
}

}  // namespace fcsa::sm90
