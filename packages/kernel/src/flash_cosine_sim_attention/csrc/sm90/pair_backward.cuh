// The backward of a pair bias (sm80/pair_backward_row.cuh) with Hopper's products: a warpgroup owns 64 kM keys, whose k and v
// are operands in registers, and walks over the queries.
//
//   32 queries, 64 keys   S^T = bias * log2(e) - lse + K Q^T | dP^T - delta = V dO^T      issued, then waited for one after the other
//                         P^T = exp2(S^T)    dS^T = P^T (dP^T - delta) -> shared memory
//                         dv += P^T dO | dk += dS^T Q                             run beside the next square's
//   64 queries            dq = dS K over all keys, by the warpgroups in turn, while the others go on: dS has two tiles
//
// Results go from accumulators through the norm to device memory.
#pragma once

#include "../sm80/pair_backward_row.cuh"
#include "narrow_tile.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace fcsa::sm90::pair {

using sm80::pair::kHeadDim;
using sm80::pair::Unit;

template <class Element_, class BiasValue_, int kWarpgroups_, int kM_, int kMinBlocks_>
struct BackwardPairConfig {
  using Element = Element_;
  using BiasValue = BiasValue_;
  static constexpr int kWarpgroups = kWarpgroups_, kWarps = 4 * kWarpgroups;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kM = kM_;
  static constexpr int kKeys = 16 * kM * kWarps;
  static constexpr int kBlockQ = 64;
  static constexpr int kScoreTiles = 2;
  static constexpr int kMinBlocks = kMinBlocks_;
  static constexpr bool kStagesResults = false;
  static constexpr bool kKeepsV = kM > 1;  // an operand in shared memory: for that of two products there are not registers enough

  static __device__ __forceinline__ int first_key(int warp, int m) { return 64 * (warp / 4 * kM + m) + 16 * (warp % 4); }
};

template <class Config>
class BackwardPairBlock : public sm80::pair::BackwardPairRow<Config> {
  using Base = sm80::pair::BackwardPairRow<Config>;
  using typename Base::ElementTile;
  using typename Base::UnitTile;
  using Element = typename Config::Element;
  using BiasValue = typename Config::BiasValue;
  using Base::at_, Base::lane_, Base::warp_, Base::p_, Base::row_;
  using Base::inverse_ds_scale_, Base::key_factor_, Base::query_factor_, Base::scale_;
  using Base::delta_quads, Base::elements, Base::k_rnorms, Base::q_rnorms, Base::scores, Base::shifts, Base::units;
  using Base::visible_words;
  using Base::kBlockQ, Base::kKeys, Base::kM, Base::kRowBytes, Base::kSteps;
  static constexpr int kWarpgroups = Config::kWarpgroups;
  static constexpr int kChunkQ = 32, kScoreRowBytes = kBlockQ * 2, kScoreTileBytes = kKeys * kScoreRowBytes;
  static constexpr int kHeldV = Config::kKeepsV ? 1 : kM;
  using Scores = float[kChunkQ / 2];
  using Operand = uint32_t[kChunkQ / 16][4];
  using Rows = float[kHeadDim / 2];          // accumulators of 64 rows of a gradient
  using UnitRows = uint32_t[kSteps][4];      // what lies at the same places of unit vectors
  enum Barrier { kFull = 1, kFree = 3, kOwn = 5 };  // of tiles of dS; of a warpgroup

 public:
  using Base::Base;
  using Base::load_rows;

  // Of a row and head that a later block of threads will load. Five threads, a tensor each.
  static __device__ __forceinline__ void prefetch(const BackwardParams& p, const TileIndex& row) {
    const int tensor = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0 || tensor >= 5) return;
    const void* const tensors[] = {p.k, p.v, p.q, p.dout, p.out};
    const Strides* const strides[] = {&p.k_strides, &p.v_strides, &p.q_strides, &p.dout_strides, &p.out_strides};
#pragma unroll
    for (int i = 0; i < 5; ++i) {
      if (tensor != i || strides[i]->row < 0 || strides[i]->row > 2 * kHeadDim) continue;  // rows far apart are left alone
      const int64_t last = strides[i]->row * ((i < 2 ? p.num_keys : p.num_queries) - 1);
      bulk_prefetch(static_cast<const Element*>(tensors[i]) + row.offset(*strides[i]), (last + p.head_dim) * sizeof(Element));
    }
  }

  __device__ __forceinline__ void run(const BiasValue* bias, const sm80::PackedBias& packed) {
    uint32_t k[kM][kSteps][4], v[kHeldV][kSteps][4];
    const sm80::RowsReader<UnitTile> k_reader(units(at_.k), Config::first_key(warp_, 0), 0);
    const sm80::RowsReader<ElementTile> v_reader(elements(at_.v), Config::first_key(warp_, 0), 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int m = 0; m < kM; ++m) k_reader.load(k[m][step], 64 * m, 2 * step);
      if constexpr (!Config::kKeepsV) v_reader.load(v[0][step], 0, 2 * step);
    }
    Rows dk[kM], dv[kM];
#pragma unroll
    for (int i = 0; i < kM * kHeadDim / 2; ++i) dk[i % kM][i / kM] = dv[i % kM][i / kM] = 0.0f;
    const Addresses addresses(*this);
    fence_async_shared();
    __syncthreads();  // v is in registers: its memory is free for dS; q, dout and k are there for wgmma

    uint32_t visible = 0;  // 16 bits of each product
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const int key = Config::first_key(warp_, m);
      visible |= (visible_words()[key / 32] >> key % 32 & 0xffffu) << 16 * m;
    }
    const BiasRows bias_rows(bias, packed, warp_, lane_);
    Bias next;
    next.load(bias_rows, 0, 0);
    Operand p_operand, ds_operand;
    const int blocks = ceil_div(p_.num_queries, kBlockQ), warpgroup = warp_ / 4;
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
      const int tile = block % 2;
      if (block >= 2 && (block - 2) % kWarpgroups != warpgroup) named_barrier_sync(kFree + tile, Config::kThreads);
      const int end = min(kBlockQ, p_.num_queries - block * kBlockQ);
#pragma unroll 1
      for (int query = 0; query < end; query += kChunkQ) {
#pragma unroll
        for (int m = 0; m < kM; ++m) {
          const int chunk = (block * kBlockQ + query) / kChunkQ;
          Scores x, dp;
          start(x, dp, next, block * kBlockQ + query);
          next.load(bias_rows, (m + 1) % kM, chunk + (m + 1) / kM);
          multiply(x, dp, k[m], v[Config::kKeepsV ? 0 : m], addresses, block * kBlockQ + query, m);
          wgmma_wait<1>();  // and the gradients of the square before: their operands are free
          wgmma_pin(x);
          wgmma_keep(p_operand);
          wgmma_keep(ds_operand);
          differentiate(x, dp, p_operand, ds_operand, visible >> 16 * m);
          store_ds(addresses.scores + tile * kScoreTileBytes + 64 * m * kScoreRowBytes, query, ds_operand);
          add_gradients(dk[m], dv[m], p_operand, ds_operand, addresses, block * kBlockQ + query);
        }
      }
      fence_async_shared();
      if (block % kWarpgroups != warpgroup) {
        named_barrier_arrive(kFull + tile, Config::kThreads);
      } else {
        named_barrier_sync(kFull + tile, Config::kThreads);  // dS of all keys is there
        Rows dq;
        multiply_ds(dq, addresses.ds + tile * (kScoreTileBytes / 16), addresses.k);
        if (block + 2 < blocks) {
          named_barrier_arrive(kFree + tile, Config::kThreads);
          named_barrier_sync(kOwn + warpgroup, 128);  // its own warps may write the tile again, too
        }
        write_dq(dq, block * kBlockQ + 16 * (warp_ % 4));
      }
    }
    wgmma_wait<0>();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      wgmma_pin(dk[m]);
      wgmma_pin(dv[m]);
      write_dv(dv[m], Config::first_key(warp_, m));
      write_dk(dk[m], k[m], Config::first_key(warp_, m));
    }
  }

 private:
  // Of query 0 and key 0, of v the warpgroup's first; where the warp's own keys lie in dS, as stmatrix wants it.
  struct Addresses {
    uint32_t q, dout, k, v, ds;
    uint32_t scores;  // in bytes

    __device__ __forceinline__ explicit Addresses(const BackwardPairBlock& block) {
      const uint32_t smem = sm80::ptx::smem_address(block.smem_);
      const int warpgroup_key = block.warp_ / 4 * 64 * kM;
      q = operand_address(smem + block.at_.q), dout = operand_address(smem + block.at_.dout);
      k = operand_address(smem + block.at_.k);
      v = operand_address(smem + block.at_.v + warpgroup_key * kRowBytes);
      ds = operand_address(smem + block.at_.ds);
      scores = block.scores().chunk_address(Config::first_key(block.warp_, 0) + block.lane_ % 16, block.lane_ / 16);
    }
  };

  // Where a lane finds the bias of its keys. Queries and keys that do not exist read others, and are hidden.
  struct BiasRows {
    const uint4* rows[kM];
    int fragments;  // of 16 queries

    __device__ __forceinline__ BiasRows(const BiasValue* bias, const sm80::PackedBias& packed, int warp, int lane)
        : fragments(packed.column_fragments) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const int key = Config::first_key(warp, m), row = min(key / 32, packed.row_fragments - 1);
        rows[m] = reinterpret_cast<const uint4*>(bias + row * fragments * sm80::kFragment + lane * (sm80::kFragment / 32) +
                                                 key % 32 / 16 * 8);
      }
    }
  };

  // The values of a lane for 16 keys x 32 queries, as they lie in memory.
  struct Bias {
    static constexpr int kWords = sizeof(BiasValue) / 2, kStep = sm80::kFragment * sizeof(BiasValue) / 16;
    uint4 words[kChunkQ / 16][kWords];

    __device__ __forceinline__ void load(const BiasRows& bias, int m, int chunk) {
      const int last = bias.fragments - 1, first = min(2 * chunk, last), second = min(2 * chunk + 1, last);
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        words[0][j] = bias.rows[m][first * kStep + j];
        words[1][j] = bias.rows[m][second * kStep + j];
      }
    }

    // Registers 2 r and 2 r + 1 of the n8 tile n.
    __device__ __forceinline__ float2 pair(int n, int r) const {
      const uint32_t* all = reinterpret_cast<const uint32_t*>(words[n / 2]);
      const int i = n % 2 * 2 + r;
      if constexpr (sizeof(BiasValue) == 4) {
        return make_float2(__uint_as_float(all[2 * i]), __uint_as_float(all[2 * i + 1]));
      } else {
        return unpack<BiasValue>(all[i]);
      }
    }
  };

  __device__ __forceinline__ void start(Scores& x, Scores& dp, const Bias& bias, int query) {
#pragma unroll
    for (int n = 0; n < kChunkQ / 8; ++n) {
      const float4 delta = delta_quads()[query / 2 + 4 * n + lane_ % 4];
      dp[4 * n] = delta.x, dp[4 * n + 1] = delta.y, dp[4 * n + 2] = delta.z, dp[4 * n + 3] = delta.w;
      const float2 shift = *reinterpret_cast<const float2*>(shifts() + query + 8 * n + lane_ % 4 * 2);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 pair = bias.pair(n, r);
        x[4 * n + 2 * r] = fmaf(pair.x, kLog2e, shift.x), x[4 * n + 2 * r + 1] = fmaf(pair.y, kLog2e, shift.y);
      }
    }
  }

  // S^T and dP^T of 64 keys and 32 queries, a group each.
  __device__ __forceinline__ static void multiply(Scores& x, Scores& dp, const uint32_t (&k)[kSteps][4],
                                                  const uint32_t (&v)[kSteps][4], const Addresses& addresses, int query,
                                                  int m) {
    const uint32_t q = addresses.q + query * kNarrowRowStep, dout = addresses.dout + query * kNarrowRowStep;
    wgmma_fence();
    wgmma_rs<Unit, true>(x, k[0], narrow_descriptor(q));
    wgmma_rs<Unit, true>(x, k[1], narrow_descriptor(q + kNarrowColumnStep));
    wgmma_commit();
    wgmma_fence();
    if constexpr (Config::kKeepsV) {
      const uint32_t keys = addresses.v + 64 * m * kNarrowRowStep;
      wgmma_ss<Element, true>(dp, narrow_descriptor(keys), narrow_descriptor(dout));
      wgmma_ss<Element, true>(dp, narrow_descriptor(keys + kNarrowColumnStep), narrow_descriptor(dout + kNarrowColumnStep));
    } else {
      wgmma_rs<Element, true>(dp, v[0], narrow_descriptor(dout));
      wgmma_rs<Element, true>(dp, v[1], narrow_descriptor(dout + kNarrowColumnStep));
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void differentiate(Scores& x, Scores& dp, Operand& p_operand, Operand& ds_operand,
                                                uint32_t visible) {
    if ((visible & 0xffffu) != 0xffffu) hide(x, visible >> (lane_ / 4));  // whole warps
#pragma unroll
    for (int i = 0; i < kChunkQ / 2; i += 2) {
      x[i] = sm80::ptx::exp2_approx(x[i]), x[i + 1] = sm80::ptx::exp2_approx(x[i + 1]);
      p_operand[i / 8][i % 8 / 2] = pack<Element>(x[i], x[i + 1]);
    }
    wgmma_wait<0>();
    wgmma_pin(dp);
#pragma unroll
    for (int i = 0; i < kChunkQ / 2; i += 2) ds_operand[i / 8][i % 8 / 2] = pack<Unit>(x[i] * dp[i], x[i + 1] * dp[i + 1]);
  }

  __device__ __forceinline__ static void hide(Scores& x, uint32_t visible) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool keeps = visible >> 8 * half & 1;
#pragma unroll
      for (int n = 0; n < kChunkQ / 8; ++n) {
        if (!keeps) x[4 * n + 2 * half] = x[4 * n + 2 * half + 1] = -INFINITY;
      }
    }
  }

  // The warp's 16 keys x 32 queries, from `query` of the block on.
  __device__ __forceinline__ static void store_ds(uint32_t address, int query, const Operand& ds) {
#pragma unroll
    for (int step = 0; step < kChunkQ / 16; ++step) {  // chunks of a row are permuted by XOR: so are the steps to them
      store_matrix_x4(address ^ (query * 2 + step * 32), ds[step]);
    }
  }

  __device__ __forceinline__ static void add_gradients(float (&dk)[kHeadDim / 2], float (&dv)[kHeadDim / 2],
                                                       const Operand& p_operand, const Operand& ds_operand,
                                                       const Addresses& addresses, int query) {
    const uint32_t q = addresses.q + query * kNarrowRowStep, dout = addresses.dout + query * kNarrowRowStep;
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kChunkQ / 16; ++step) {
      wgmma_rs_transposed<Element, true>(dv, p_operand[step], narrow_descriptor(dout + 16 * step * kNarrowRowStep));
    }
#pragma unroll
    for (int step = 0; step < kChunkQ / 16; ++step) {
      wgmma_rs_transposed<Unit, true>(dk, ds_operand[step], narrow_descriptor(q + 16 * step * kNarrowRowStep));
    }
    wgmma_commit();
  }

  // dq of 64 queries.
  __device__ __forceinline__ static void multiply_ds(Rows& dq, uint32_t ds, uint32_t k) {
    wgmma_fence();
    wgmma_ss<Unit, false, true, true>(dq, wide_descriptor(ds), narrow_descriptor(k));
#pragma unroll
    for (int step = 1; step < kKeys / 16; ++step) {
      wgmma_ss<Unit, true, true, true>(dq, wide_descriptor(ds + 16 * step * kWideRowStep),
                                       narrow_descriptor(k + 16 * step * kNarrowRowStep));
    }
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin(dq);
  }

  // ---- results: 16 rows of a warp, of which a lane has eight columns each of row lane / 4 and of the one eight below ----

  // The gradient of x from that of its unit vector xn: factor rnorm (a - (a . xn) xn); units: xn times unit_factor.
  __device__ __forceinline__ void project(Rows& a, const UnitRows& units, float unit_factor, const float* rnorms,
                                          float factor) {
    const float inverse = fabsf(unit_factor) > 1e-30f ? sm80::ptx::reciprocal_approx(unit_factor) : 0.0f;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float x[8], product = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = unpack<Unit>(units[i / 2][i % 2 * 2 + half]);
        x[2 * i] = pair.x * inverse, x[2 * i + 1] = pair.y * inverse;
        product += a[4 * i + 2 * half] * x[2 * i] + a[4 * i + 2 * half + 1] * x[2 * i + 1];
      }
      const float dot = p_.l2norm_qk ? lane_sum<4>(product) : 0.0f;
      const float row_factor = p_.l2norm_qk ? factor * rnorms[lane_ / 4 + 8 * half] : factor;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float& value = a[c / 2 * 4 + 2 * half + c % 2];
        value = row_factor * (value - dot * x[c]);
      }
    }
  }

  __device__ __forceinline__ float inverse_of_powers() const {  // that q and dS are held times
    return inverse_ds_scale_ * sm80::ptx::reciprocal_approx(key_factor_);
  }

  // Neighbouring lanes exchange, so that each stores four columns at a time.
  __device__ __forceinline__ void store_rows(const Rows& a, void* tensor, const Strides& strides, int first_row, int num_rows) {
    const bool odd = lane_ % 2 == 1;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + lane_ / 4 + 8 * half;
      Element* target = static_cast<Element*>(tensor) + row_.offset(strides) + row * strides.row + lane_ % 4 / 2 * 4;
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        const uint32_t first = pack<Element>(a[4 * i + 2 * half], a[4 * i + 2 * half + 1]);
        const uint32_t second = pack<Element>(a[4 * i + 4 + 2 * half], a[4 * i + 5 + 2 * half]);
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? first : second, 1);
        const int column = 8 * (i + odd);
        if (row >= num_rows || column >= p_.head_dim) continue;
        *reinterpret_cast<uint2*>(target + column) = odd ? make_uint2(other, second) : make_uint2(first, other);
      }
    }
  }

  __device__ __forceinline__ void write_dq(Rows& dq, int first_query) {
    if (p_.dscale_rows != nullptr) write_dscale(dq, first_query);
    if (p_.dq == nullptr) return;
    UnitRows x;
    const sm80::RowsReader<UnitTile> reader(units(at_.q), first_query, 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) reader.load(x[step], 0, 2 * step);
    project(dq, x, query_factor_, q_rnorms() + first_query, scale_ * inverse_of_powers());
    store_rows(dq, p_.dq, p_.dq_strides, first_query, p_.num_queries);
  }

  // From q as it was given: it has to be right for a scale of 0 too.
  __device__ __forceinline__ void write_dscale(const Rows& dq, int first_query) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = first_query + lane_ / 4 + 8 * half;
      const bool exists = query < p_.num_queries;
      const Element* q = static_cast<const Element*>(p_.q) + row_.offset(p_.q_strides);
      if (exists) q += query * p_.q_strides.row;
      float product = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * i + lane_ % 4 * 2;
        if (column >= p_.head_dim) continue;
        const float2 pair = unpack<Element>(*reinterpret_cast<const uint32_t*>(q + column));
        product += dq[4 * i + 2 * half] * pair.x + dq[4 * i + 2 * half + 1] * pair.y;
      }
      const float dot = lane_sum<4>(product) * q_rnorms()[query];
      if (exists && lane_ % 4 == 0) {
        p_.dscale_rows[row_.first_row(p_.b1, p_.heads, p_.num_queries) + query] = dot * inverse_of_powers();
      }
    }
  }

  __device__ __forceinline__ void write_dv(Rows& dv, int first_key) {
    if (p_.dv == nullptr) return;
    const float factor = inverse_ds_scale_;
#pragma unroll
    for (int i = 0; i < kHeadDim / 2; ++i) dv[i] *= factor;
    store_rows(dv, p_.dv, p_.dv_strides, first_key, p_.num_keys);
  }

  __device__ __forceinline__ void write_dk(Rows& dk, const UnitRows& k, int first_key) {
    if (p_.dk == nullptr) return;
    const float factor = key_factor_ * inverse_ds_scale_ * (1.0f / kLog2e);  // scale / query_factor_, also where the scale is 0
    project(dk, k, key_factor_, k_rnorms() + first_key, factor);
    store_rows(dk, p_.dk, p_.dk_strides, first_key, p_.num_keys);
  }
};

}  // namespace fcsa::sm90::pair

namespace fcsa::sm90 {

// A block a row and head; the bias is packed with keys in rows. The block `ahead` of this one is the next one of some
// multiprocessor: what it loads comes to the L2 cache meanwhile.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    backward_pair_kernel(const __grid_constant__ BackwardParams p, const sm80::pair::Rows rows, const sm80::PackedBias packed,
                         int ahead) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  extern __shared__ __align__(1024) char shared_memory[];
  const auto row_of = [&](uint32_t block) {
    const int inner = block % rows.inner;
    block /= rows.inner;
    return rows.at(block / p.heads, inner, block % p.heads, 0);
  };
  const TileIndex row = row_of(blockIdx.x);
  pair::BackwardPairBlock<Config> work(p, row, shared_memory);
  work.load_rows();
  if (blockIdx.x + ahead < gridDim.x) work.prefetch(p, row_of(blockIdx.x + ahead));
  work.run(static_cast<const typename Config::BiasValue*>(p.packed_bias) + packed.at(row, 0, 0, 0), packed);
#endif
}

template <class Config>
cudaError_t launch_backward_pair_kernel(const BackwardParams& p, cudaStream_t stream) {
  const sm80::pair::Rows rows = sm80::pair::rows_of(p);
  const int64_t blocks = static_cast<int64_t>(rows.inner) * rows.outer * p.heads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr auto kKernel = &backward_pair_kernel<Config>;
  const int bytes = pair::BackwardPairBlock<Config>::shared_bytes(p.num_queries);
  cudaError_t error = sm80::allow_all_shared_memory<kKernel>(bytes);
  int multiprocessors = 1;
  if (error == cudaSuccess) error = multiprocessor_count(&multiprocessors);
  if (error != cudaSuccess) return error;
  const int ahead = multiprocessors * Config::kMinBlocks;
  kKernel<<<static_cast<uint32_t>(blocks), Config::kThreads, bytes, stream>>>(p, rows, sm80::PackedBias(p, true), ahead);
  return cudaGetLastError();
}

// Up to sm80::pair::kMaxBackwardKeys keys.
template <class Element, class BiasValue>
cudaError_t launch_backward_pair(const BackwardParams& p, cudaStream_t stream) {
  if (p.num_keys <= 128) return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 2, 1, 2>>(p, stream);
  if (p.num_keys <= 256) return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 4, 1, 1>>(p, stream);
  return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 3, 2, 1>>(p, stream);
}

// Whether the GPU would run the Hopper kernels: of code that was compiled for older ones alone nothing is in them.
template <class Element, class BiasValue>
bool serves_backward_pair() {
  return is_compiled_for_hopper<backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 3, 2, 1>>>();
}

}  // namespace fcsa::sm90
