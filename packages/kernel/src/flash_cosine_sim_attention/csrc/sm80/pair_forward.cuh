// The forward of a pair bias. A block of threads holds all keys of a row, and 32 queries a warp:
//
//   start     k -> unit vectors, v, in shared memory        q -> unit vectors times scale * log2(e), in registers
//   16 keys   s = bias * log2(e) - shift + q k^T            the bias starts the accumulators
//             P = exp2(s)        out += P v
//   end       out / sum P, lse
//
// What is left to do a logit is one fused multiply-add (the start), a comparison, an exponential and a sum.
#pragma once

#include "../common/mask.cuh"
#include "../common/softmax.cuh"
#include "pair_rows.cuh"

namespace fcsa::sm80::pair {

template <class Element_, class BiasValue_, int kWarps_>
struct ForwardPairConfig {
  using Element = Element_;
  using BiasValue = BiasValue_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kQueries = kWarpQueries * kWarps;
  static constexpr int kM = 2, kSteps = kHeadDim / 16, kColumns = kHeadDim / 8;
  static constexpr int kMinBlocks = kWarps <= 4 ? 4 : kWarps <= 8 ? 2 : 1;
};

template <class Config>
class ForwardPairBlock {
  using Element = typename Config::Element;
  using BiasValue = typename Config::BiasValue;
  using UnitTile = Tile<Unit>;
  using ValueTile = Tile<Element>;
  using Scratch = SmemTile<Element, kWarpQueries, kHeadDim>;  // of a warp: its queries on their way in, its output out
  using Chunks = RowChunks<4, Element>;
  static constexpr int kM = Config::kM, kRowBytes = kHeadDim * 2;

  // Shared memory, in bytes from its start.
  struct Layout {
    int keys, values, scratch, visible, bytes;

    __host__ __device__ explicit Layout(int padded_keys) {
      keys = 0;
      values = keys + padded_keys * kRowBytes;
      scratch = values + padded_keys * kRowBytes;
      visible = scratch + Config::kWarps * static_cast<int>(sizeof(Scratch));
      bytes = visible + kMaxKeys / 8;
    }
  };

  const ForwardParams& p_;
  const TileIndex row_;
  const int lane_, warp_, first_query_;  // of the warp
  const int padded_keys_;
  const Layout at_;
  char* const smem_;

  uint32_t query_[kM][Config::kSteps][4];
  float out_[kM][Config::kColumns][4];
  SoftmaxRows<Softmax::kRunningMax, kM> softmax_;

 public:
  // row.tile: a block of kQueries queries
  __device__ __forceinline__ ForwardPairBlock(const ForwardParams& p, const TileIndex& row, char* smem)
      : p_(p),
        row_(row),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        first_query_(row.tile * Config::kQueries + threadIdx.x / 32 * kWarpQueries),
        padded_keys_(padded(p.num_keys)),
        at_(padded(p.num_keys)),
        smem_(smem) {}

  static __host__ __device__ int shared_bytes(int num_keys) { return Layout(padded(num_keys)).bytes; }

  __device__ __forceinline__ void run(const PackedBias& packed, const BiasValue* bias) {
    const int fragment = first_query_ / kWarpQueries;
    const bool has_queries = fragment < packed.row_fragments;
    load_rows();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (!has_queries) return;
    start_queries();
    uint32_t k = TileReader<UnitTile, LanePattern::kChunksFirst>(keys(), 0, 0).base;
    uint32_t v = TileReader<ValueTile, LanePattern::kRowsFirst>(values(), 0, 0).base;
    const BiasValue* source = bias + packed.at(row_, fragment, 0, lane_);
    BiasFragment<BiasValue> values, next;
    next.load(source);
#pragma unroll 1
    for (int chunk = 0; chunk < packed.column_fragments; ++chunk) {
      values = next;
      source += kFragment;
      if (chunk + 1 < packed.column_fragments) next.load(source);
      const uint32_t visible = visible_words()[chunk / 2] >> (chunk % 2 * 16) & 0xffffu;
      if (visible != 0) process(k, v, values, visible);
      k += kChunkKeys * kRowBytes, v += kChunkKeys * kRowBytes;
    }
    finish();
  }

 private:
  static __host__ __device__ int padded(int num_keys) { return ceil_div(num_keys, kChunkKeys) * kChunkKeys; }
  __device__ __forceinline__ UnitTile& keys() const { return *reinterpret_cast<UnitTile*>(smem_ + at_.keys); }
  __device__ __forceinline__ ValueTile& values() const { return *reinterpret_cast<ValueTile*>(smem_ + at_.values); }
  __device__ __forceinline__ char* scratch() const { return smem_ + at_.scratch + warp_ * sizeof(Scratch); }
  __device__ __forceinline__ uint32_t* visible_words() const {
    return reinterpret_cast<uint32_t*>(smem_ + at_.visible);
  }
  __device__ __forceinline__ int query_of(int m, int half) const { return first_query_ + m * 16 + half * 8 + lane_ / 4; }

  // k as unit vectors, v by cp.async, a bit a key; the warp's own queries through its scratch. Four threads a row.
  __device__ __forceinline__ void load_rows() {
    const uint8_t* mask = mask_row(p_, row_);
    const int64_t mask_step = p_.mask_key;
    const int num_keys = p_.num_keys, column = threadIdx.x % 4 * 8;
    const auto visible = [=](int key) { return key < num_keys && (mask == nullptr || mask[key * mask_step] != 0); };
    const ScaleFactors factors(p_.scale == nullptr ? p_.scale_value : p_.scale[row_.head]);
    constexpr int kStep = Config::kThreads / 4;
    const int first = threadIdx.x / 4;

    Chunks queries;
    const int num_queries = p_.num_queries - first_query_;
    queries.load(static_cast<const Element*>(p_.q) + row_.offset(p_.q_strides) +
                     min(first_query_, p_.num_queries - 1) * p_.q_strides.row,
                 p_.q_strides.row, lane_ / 4, 8, num_queries, column, p_.head_dim);
    load_values(visible, first, column);
    for (int word = warp_; word * 32 < padded_keys_; word += Config::kWarps) {
      const uint32_t bits = __ballot_sync(0xffffffffu, visible(32 * word + lane_));
      if (lane_ == 0) visible_words()[word] = bits;
    }

    const Element* k = static_cast<const Element*>(p_.k) + row_.offset(p_.k_strides);
    float* k_rnorms = p_.l2norm_qk ? p_.k_rnorm + row_.first_row(p_.b1, p_.kv_heads, num_keys) : nullptr;
#pragma unroll 1
    for (int batch = first; batch < padded_keys_; batch += 4 * kStep) {
      Chunks chunks;
      chunks.load(k, p_.k_strides.row, batch, kStep, num_keys, column, p_.head_dim);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = batch + i * kStep;
        if (key >= padded_keys_) break;  // whole warps
        chunks.hide(i, visible(key));
        float x[8];
        chunks.get(x, i);
        const float rnorm = store_unit(keys(), key, column, x, p_.l2norm_qk, factors.key);
        if (k_rnorms != nullptr && column == 0 && key < num_keys) k_rnorms[key] = rnorm;
      }
    }
    UnitTile& tile = *reinterpret_cast<UnitTile*>(scratch());
    float* q_rnorms =
        p_.l2norm_qk ? p_.q_rnorm + row_.first_row(p_.b1, p_.heads, p_.num_queries) + first_query_ : nullptr;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = lane_ / 4 + 8 * i;
      float x[8];
      queries.get(x, i);
      const float rnorm = store_unit(tile, query, column, x, p_.l2norm_qk, factors.query);
      if (q_rnorms != nullptr && column == 0 && query < num_queries) q_rnorms[query] = rnorm;
    }
  }

  template <class Visible>
  __device__ __forceinline__ void load_values(Visible visible, int first, int column) {
    const Element* v = static_cast<const Element*>(p_.v) + row_.offset(p_.v_strides) + column;
    uint32_t target = values().chunk_address(first, column / 8);  // rows 8 apart have the same swizzle
#pragma unroll 1
    for (int key = first; key < padded_keys_; key += Config::kThreads / 4) {
      const bool valid = column < p_.head_dim && visible(key);
      ptx::cp_async_16(target, valid ? v + key * p_.v_strides.row : v, valid);
      target += Config::kThreads / 4 * kRowBytes;
    }
    ptx::cp_async_commit();
  }

  __device__ __forceinline__ void start_queries() {
    const TileReader<UnitTile, LanePattern::kRowsFirst> reader(*reinterpret_cast<UnitTile*>(scratch()), 0, 0);
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int step = 0; step < Config::kSteps; ++step) reader.load(query_[m][step], 16 * m, 2 * step);
#pragma unroll
      for (int n = 0; n < Config::kColumns; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) out_[m][n][e] = 0.0f;
      }
    }
    softmax_.start(0.0f);
  }

  // 16 keys, of which `visible` has a bit each. k, v: where this lane finds their first row.
  __device__ __forceinline__ void process(uint32_t k, uint32_t v, const BiasFragment<BiasValue>& bias,
                                          uint32_t visible) {
    float x[kM][2][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float subtrahend = softmax_.subtrahend(m, half);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float2 pair = bias.pair(m, n, half);
          x[m][n][2 * half] = fmaf(pair.x, kLog2e, -subtrahend);
          x[m][n][2 * half + 1] = fmaf(pair.y, kLog2e, -subtrahend);
        }
      }
    }
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      uint32_t b[4];
      ptx::ldmatrix_x4(b, k ^ (2 * step * 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_16816<Unit>(x[m][0], query_[m][step], b[0], b[1]);
        ptx::mma_16816<Unit>(x[m][1], query_[m][step], b[2], b[3]);
      }
    }
    if (visible != 0xffffu) hide(x, visible >> (lane_ % 4 * 2));
    follow_maximum(x);

    uint32_t weights[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sums[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const float low = ptx::exp2_approx(x[m][n][2 * half]), high = ptx::exp2_approx(x[m][n][2 * half + 1]);
          sums[n] = low + high;
          weights[m][2 * n + half] = pack<Element>(low, high);
        }
        softmax_.sum[m][half] += sums[0] + sums[1];
      }
    }
#pragma unroll
    for (int n = 0; n < Config::kColumns; n += 2) {
      uint32_t b[4];
      ptx::ldmatrix_x4_trans(b, v ^ (n * 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_16816<Element>(out_[m][n], weights[m], b[0], b[1]);
        ptx::mma_16816<Element>(out_[m][n + 1], weights[m], b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ static void hide(float (&x)[kM][2][4], uint32_t visible) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) x[m][n][e] = visible >> (8 * n + e % 2) & 1 ? x[m][n][e] : -INFINITY;
      }
    }
  }

  // x comes with the present shift already taken off. Where some row has climbed more than 2^8 above it, or has its first
  // key, the shifts of the warp's rows go up to their maxima.
  __device__ __forceinline__ void follow_maximum(float (&x)[kM][2][4]) {
    float maximum[kM][2];
    bool any = false;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        maximum[m][half] = fmaxf(fmaxf(x[m][0][2 * half], x[m][0][2 * half + 1]),
                                 fmaxf(x[m][1][2 * half], x[m][1][2 * half + 1]));
        any |= maximum[m][half] > (softmax_.shift[m][half] == -INFINITY ? -INFINITY : kRescaleThreshold);
      }
    }
    if (!__any_sync(0xffffffffu, any)) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float old_shift = softmax_.shift[m][half], taken_off = softmax_.subtrahend(m, half);
        const float highest = lane_max<4>(maximum[m][half]) + taken_off;
        if (!(highest > old_shift)) continue;
        const float factor = ptx::exp2_approx(old_shift - highest);
        softmax_.shift[m][half] = highest;
        softmax_.sum[m][half] *= factor;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          x[m][n][2 * half] += taken_off - highest;
          x[m][n][2 * half + 1] += taken_off - highest;
        }
#pragma unroll
        for (int n = 0; n < Config::kColumns; ++n) out_[m][n][2 * half] *= factor, out_[m][n][2 * half + 1] *= factor;
      }
    }
  }

  __device__ __forceinline__ void finish() {
    float* lses = p_.lse + row_.first_row(p_.b1, p_.heads, p_.num_queries);
    Scratch& tile = *reinterpret_cast<Scratch*>(scratch());
    __syncwarp();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float factor, lse;
        softmax_.finish(m, half, factor, lse);
        if (lane_ % 4 == 0 && query_of(m, half) < p_.num_queries) lses[query_of(m, half)] = lse;
        const int scratch_row = m * 16 + half * 8 + lane_ / 4;
#pragma unroll
        for (int n = 0; n < Config::kColumns; ++n) {
          reinterpret_cast<uint32_t&>(tile.at(scratch_row, n * 8 + lane_ % 4 * 2)) =
              pack<Element>(out_[m][n][2 * half] * factor, out_[m][n][2 * half + 1] * factor);
        }
      }
    }
    __syncwarp();
    Element* out = static_cast<Element*>(p_.out) + row_.offset(p_.out_strides);
    const int column = lane_ % 4 * 8;
#pragma unroll
    for (int step = 0; step < kWarpQueries / 8; ++step) {
      const int scratch_row = step * 8 + lane_ / 4;
      const int64_t query = first_query_ + scratch_row;
      if (query >= p_.num_queries || column >= p_.head_dim) continue;
      *reinterpret_cast<uint4*>(out + query * p_.out_strides.row + column) =
          *reinterpret_cast<const uint4*>(&tile.at(scratch_row, column));
    }
  }
};

}  // namespace fcsa::sm80::pair

namespace fcsa::sm80 {

// Tile of queries fastest, so that blocks that run together read the same keys, then the rows that share a bias.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    forward_pair_kernel(const __grid_constant__ ForwardParams p, const pair::Rows rows, const PackedBias packed) {
  extern __shared__ __align__(128) uint8_t shared_memory[];
  uint32_t block = blockIdx.x;
  const int tiles = ceil_div(p.num_queries, Config::kQueries), tile = block % tiles;
  block /= tiles;
  const int inner = block % rows.inner;
  block /= rows.inner;
  const TileIndex row = rows.at(block / p.heads, inner, block % p.heads, tile);
  pair::ForwardPairBlock<Config> work(p, row, reinterpret_cast<char*>(shared_memory));
  work.run(packed, static_cast<const typename Config::BiasValue*>(p.packed_bias));
}

template <class Config>
cudaError_t launch_forward_pair_kernel(const ForwardParams& p, const pair::Rows& rows, cudaStream_t stream) {
  using Block = pair::ForwardPairBlock<Config>;
  const int64_t blocks =
      static_cast<int64_t>(ceil_div(p.num_queries, Config::kQueries)) * rows.inner * rows.outer * p.heads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr auto kKernel = &forward_pair_kernel<Config>;
  const int bytes = Block::shared_bytes(p.num_keys);
  const cudaError_t error = allow_all_shared_memory<kKernel>(bytes);
  if (error != cudaSuccess) return error;
  kKernel<<<static_cast<uint32_t>(blocks), Config::kThreads, bytes, stream>>>(p, rows, PackedBias(p, false));
  return cudaGetLastError();
}

}  // namespace fcsa::sm80
