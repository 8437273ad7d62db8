// The gradient of a bias (sm80/backward_dbias.cuh) for head dims up to 32, with Hopper's products: a block of threads owns
// 128 x 128 of it and walks over the rows that share it; a warpgroup owns 64 x 64, whose sums and bias are in registers. Four
// warpgroups: with two, of twice the keys, each instruction of a warp waited four cycles.
//
//   32 keys   S = Q K^T | dP = dO V^T        P = exp2(S factors + bias + shift)        dbias += P (dP - delta)
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
  static constexpr int kM = 1, kN = 8, kThreads = 512, kMinBlocks = 1;
  static constexpr int kStages = kPlanes == 1 ? 4 : 3;
  static constexpr int kStageAlignment = 1024;
  static constexpr bool kHoldsRows = kPlanes == 1;  // q and dO of a row as operands in registers, else in shared memory

  static __device__ __forceinline__ int first_row(int warp) { return warp / 8 * 64 + warp % 4 * 16; }
  static __device__ __forceinline__ int first_column(int warp) { return warp / 4 % 2 * 64; }
};

// What a thread copies of a row that shares the tile: four 16-byte chunks of one of q, dout, k and v, a plane.
template <class Config>
class NarrowDbiasLoader {
  using Operand = typename Config::Operand;
  using Stage = typename sm80::DbiasStorage<Config>::Stage;
  using Tile = typename sm80::DbiasStorage<Config>::QueryTile;
  static constexpr int kTileBytes = sizeof(Tile), kRowStep = 32, kRounds = 128 / kRowStep, kRowBytes = 64;

  // Steps in bytes: launch_narrow_dbias sees to it that they fit.
  const char *source_, *extra_;  // extra_: of the threads 0 ... 127 a query's factors, of the others a key's norm
  int stride_, step_, extra_step_, limit_;  // limit_: rows from the thread's first to the last
  uint32_t target_;

 public:
  __device__ __forceinline__ NarrowDbiasLoader(const BackwardParams& p, const sm80::DbiasStep& step,
                                               const sm80::DbiasRowStep& row) {
    const int query0 = step.head.tile * Config::kQueries, key0 = step.key_block * Config::kKeys;
    const TileIndex kv_head = kv_head_of(p, step.head);
    const int tensor = threadIdx.x / 128, own_row = threadIdx.x % 128 / 4, column = threadIdx.x % 4 * 8;
    sm80::Rows<Operand> rows;
    int64_t sharer = 0;
    if (tensor == 0) rows = sm80::query_operand<Config>(p, step.head).from(query0), sharer = row.q;
    if (tensor == 1) rows = sm80::dout_operand<Config>(p, step.head).from(query0), sharer = row.dout;
    if (tensor == 2) rows = sm80::key_operand<Config>(p, kv_head).from(key0), sharer = row.k;
    if (tensor == 3) rows = sm80::value_operand<Config>(p, kv_head).from(key0), sharer = row.v;
    source_ = reinterpret_cast<const char*>(rows.base + own_row * rows.stride + column);
    stride_ = static_cast<int>(kRowStep * rows.stride * sizeof(Operand)), step_ = static_cast<int>(sharer * sizeof(Operand));
    target_ = tensor * kTileBytes + Tile::chunk_offset(own_row, column / 8) * 2;
    limit_ = column < p.head_dim ? (tensor < 2 ? p.num_queries - query0 : p.num_keys - key0) - own_row : 0;
    const int own = threadIdx.x % 128;
    if (tensor == 0) {
      const int64_t first = step.head.first_row(p.b1, p.heads, padded_queries(p.num_queries)) + query0;
      extra_ = reinterpret_cast<const char*>(p.query_rows + first + own);
      extra_step_ = static_cast<int>(row.query_row * sizeof(float4));
    } else {
      extra_ = reinterpret_cast<const char*>(p.k_rnorm + kv_head.first_row(p.b1, p.kv_heads, p.num_keys) + key0 + own);
      extra_step_ = static_cast<int>(row.k_rnorm * sizeof(float));
    }
  }

  __device__ __forceinline__ void advance() { source_ += step_, extra_ += extra_step_; }

  // With cp.async, not committed. step: the sharer.
  __device__ __forceinline__ void load(Stage& smem, const BackwardParams& p, const sm80::DbiasStep& step) const {
    const int tensor = threadIdx.x / 128;
    const uint8_t* mask = mask_row(p, kv_head_of(p, step.head));
    if (mask != nullptr) mask += step.key_block * Config::kKeys * p.mask_key;
    const uint32_t target = sm80::ptx::smem_address(&smem) + target_;
    const char* source = source_;
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      bool valid = i * kRowStep < limit_;
      if (mask != nullptr && tensor >= 2 && valid) valid = mask[(threadIdx.x % 128 / 4 + i * kRowStep) * p.mask_key] != 0;
#pragma unroll
      for (int plane = 0; plane < Config::kPlanes; ++plane) {
        const char* from = source + plane * p.head_dim * static_cast<int>(sizeof(Operand));
        sm80::ptx::cp_async_16(target + (plane * 128 + i * kRowStep) * kRowBytes, from, valid);
      }
      source += stride_;
    }
    if (tensor == 0) {
      sm80::ptx::cp_async_16(sm80::ptx::smem_address(&smem.query_rows[threadIdx.x]), extra_, true);
    } else if (tensor == 1) {
      load_key(smem, p, mask, threadIdx.x - 128, p.num_keys - step.key_block * Config::kKeys);
    }
  }

 private:
  __device__ __forceinline__ void load_key(Stage& smem, const BackwardParams& p, const uint8_t* mask, int key,
                                           int num_keys) const {
    const float* rnorm = reinterpret_cast<const float*>(extra_);
    const bool visible = key < num_keys && (mask == nullptr || mask[key * p.mask_key] != 0);
    const uint32_t bits = __ballot_sync(0xffffffffu, visible);
    if (key % 32 == 0) smem.visible[key / 32] = bits;
    const bool folded = Config::kFoldsNorm && norm_is_folded<Config>(p);
    if (folded && (!Config::kExactCopies || p.q_unit == nullptr)) {
      sm80::ptx::cp_async_4(sm80::ptx::smem_address(&smem.key_factor[key]), visible ? rnorm : p.k_rnorm, visible);
    } else {
      smem.key_factor[key] = !visible ? 0.0f : folded ? folded_factor<Config>(*rnorm) : 1.0f;
    }
  }
};

template <class Config, class Value>
class NarrowDbiasWarp : public sm80::DbiasWarp<Config, Value> {
  using Base = sm80::DbiasWarp<Config, Value>;
  using typename Base::QueryReader;
  using typename Base::RowValues;
  using typename Base::Stage;
  using Base::lane_, Base::row0_, Base::column0_, Base::sum_, Base::bias_;
  static constexpr int kChunkKeys = 32, kChunks = 8 * Config::kN / kChunkKeys, kSteps = Base::kSteps;
  static constexpr int kPlanes = Config::kPlanes, kPlane = Config::kKeys * kNarrowRowStep;  // kPlane: from one to the next
  using Scores = float[kChunkKeys / 2];
  using Rows = uint32_t[Config::kHoldsRows ? kPlanes * kSteps : 1][4];

 public:
  __device__ __forceinline__ void add(const Stage& smem, const BackwardParams& p, const sm80::DbiasStep& step) {
    bool is_hidden = false;
#pragma unroll
    for (int word = 0; word < kChunks; ++word) is_hidden |= smem.visible[column0_ / 32 + word] != 0xffffffffu;
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
    if constexpr (Config::kHoldsRows) {
      const QueryReader q_reader(smem.q, row0_, 0), dout_reader(smem.dout, row0_, 0);
#pragma unroll
      for (int i = 0; i < kPlanes * kSteps; ++i) {
        q_reader.load(q[i], i / kSteps * Config::kQueries, i % kSteps * 2);
        dout_reader.load(dout[i], i / kSteps * Config::kQueries, i % kSteps * 2);
      }
    }
    const uint32_t stage = operand_address(sm80::ptx::smem_address(&smem));
    const uint32_t queries = threadIdx.x / 256 * (64 * kNarrowRowStep), keys = column0_ * kNarrowRowStep;
    constexpr uint32_t kTile = sizeof(smem.q) / 16;
    const RowValues rows = Base::rows_of(smem, p, step);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Scores s, dp;
      const uint32_t k = stage + 2 * kTile + keys + chunk * kChunkKeys * kNarrowRowStep;
      wgmma_fence();
      multiply(s, q, stage + queries, k);
      multiply(dp, dout, stage + kTile + queries, k + kTile);
      wgmma_commit();
      wgmma_wait<0>();
      wgmma_pin(s);
      wgmma_pin(dp);
      add_chunk<kHidden>(s, dp, smem, rows, chunk);
    }
  }

  // x = queries keys^T, 64 x 32; of operands in two planes the small products first.
  __device__ __forceinline__ static void multiply(Scores& x, const Rows& held, uint32_t queries, uint32_t keys) {
    if constexpr (kPlanes == 2) {
      multiply_planes<false>(x, held, queries, 0, keys, 1);
      multiply_planes<true>(x, held, queries, 1, keys, 0);
    }
    multiply_planes<kPlanes == 2>(x, held, queries, 0, keys, 0);
  }

  template <bool kAdds>
  __device__ __forceinline__ static void multiply_planes(Scores& x, const Rows& held, uint32_t queries, int query_plane,
                                                         uint32_t keys, int key_plane) {
    using Operand = typename Config::Operand;
    const uint32_t a = queries + query_plane * kPlane, b = keys + key_plane * kPlane;
    if constexpr (Config::kHoldsRows) {
      wgmma_rs<Operand, kAdds>(x, held[query_plane * kSteps], narrow_descriptor(b));
      wgmma_rs<Operand, true>(x, held[query_plane * kSteps + 1], narrow_descriptor(b + kNarrowColumnStep));
    } else {
      wgmma_ss<Operand, kAdds>(x, narrow_descriptor(a), narrow_descriptor(b));
      wgmma_ss<Operand, true>(x, narrow_descriptor(a + kNarrowColumnStep), narrow_descriptor(b + kNarrowColumnStep));
    }
  }

  template <bool kHidden>
  __device__ __forceinline__ void add_chunk(const Scores& s, const Scores& dp, const Stage& smem, const RowValues& rows,
                                            int chunk) {
#pragma unroll
    for (int n = 0; n < kChunkKeys / 8; ++n) {
      const int column = column0_ + chunk * kChunkKeys + 8 * n + lane_ % 4 * 2;
      const float2 factors = *reinterpret_cast<const float2*>(smem.key_factor + column);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int half = r / 2;
        const float2 pair = Base::values_of(bias_[0][chunk * (kChunkKeys / 8) + n][half]);
        const float t = Config::kFoldsNorm ? s[4 * n + r] * (r % 2 == 0 ? factors.x : factors.y) : s[4 * n + r];
        float x = fmaf(t, rows.score[0][half], fmaf(r % 2 == 0 ? pair.x : pair.y, kLog2e, rows.shift[0][half]));
        if constexpr (kHidden) {
          x = smem.visible[column0_ / 32 + chunk] >> (8 * n + lane_ % 4 * 2 + r % 2) & 1 ? x : -INFINITY;
        }
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
  sm80::DbiasStep step = owner.sharer(first), ahead = step;
  NarrowDbiasLoader<Config> from(p, step, parts.row);
  const auto load = [&](auto& stage) {
    if (ahead.index < end) from.load(stage, p, ahead);
    from.advance();
    ++ahead.index, ahead.head.b0 += parts.row.b0, ahead.head.b1 += parts.row.b1;
    sm80::ptx::cp_async_commit();
  };
#pragma unroll 1
  for (int stage = 0; stage < kStages - 1; ++stage) load(storage.stage[stage]);
  NarrowDbiasWarp<Config, Value> warp;
  warp.start(p, owner.sharer(0));
#pragma unroll 1
  for (int stage = 0; step.index < end; stage = stage + 1 < kStages ? stage + 1 : 0) {
    sm80::ptx::cp_async_wait<kStages - 2>();
    fence_async_shared();
    __syncthreads();  // this row's operands are there; nobody reads those of the row before
    load(storage.stage[stage == 0 ? kStages - 1 : stage - 1]);
    warp.add(storage.stage[stage], p, step);
    ++step.index, step.head.b0 += parts.row.b0, step.head.b1 += parts.row.b1;
  }
  sm80::ptx::cp_async_wait<0>();
  sm80::finish_dbias(warp, storage, p, parts, owner);
#endif
}

// Whether the steps of NarrowDbiasLoader fit: bytes from a row that shares the tile to the next, and of 32 rows of a tensor.
template <class Traits>
bool fits_loader(const BackwardParams& p, const sm80::DbiasRowStep& row) {
  const auto fits = [](int64_t elements) { return elements < (1 << 26) && elements > -(1 << 26); };
  const bool rows_fit = fits(32 * p.q_strides.row) && fits(32 * p.dout_strides.row) && fits(32 * p.k_strides.row) &&
                        fits(32 * p.v_strides.row);
  return rows_fit && fits(row.q) && fits(row.dout) && fits(row.k) && fits(row.v) && fits(row.query_row) && fits(row.k_rnorm);
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
  if (parts.count == 0 || !parts.row.is_linear || !fits_loader<Traits>(p, parts.row)) return cudaSuccess;
  *is_served = true;
  error = launch_blocks<kKernel>(p, parts, int64_t{parts.tiles} * parts.count, Config::kThreads,
                                 sizeof(sm80::DbiasStorage<Config>), stream);
  return error != cudaSuccess ? error : sm80::launch_dbias_sum<Config>(p, parts, stream);
}

}  // namespace fcsa::sm90
