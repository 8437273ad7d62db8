// The backward of a pair bias, without the gradient of the bias: a block of threads holds one whole row and head, so that
// dq, dk and dv are complete in it, deterministic and without a workspace.
//
//   start       k, q -> unit vectors; v, dout; delta of every query                              all in shared memory
//   16 queries  S^T = bias * log2(e) - lse_i + K Q^T       dP^T = V dO^T - delta_i      the subtrahends start the sums
//               P^T = exp2(S^T)      dv += P^T dO      dS^T = P^T dP^T      dk += dS^T Q      dS -> shared memory
//   a block     dq = dS K
//
// A warp owns 32 keys, whose k and v stay in registers as operands.
#pragma once

#include "pair_backward_row.cuh"

namespace fcsa::sm80::pair {

template <class Element_, class BiasValue_, int kWarps_>
struct BackwardPairConfig {
  using Element = Element_;
  using BiasValue = BiasValue_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kM = 2;  // tiles of 16 keys of a warp
  static constexpr int kKeys = 16 * kM * kWarps;
  // dq of a block is divided into 16 queries x 16 columns a warp.
  static constexpr int kBlockQ = 8 * kWarps;
  static constexpr int kScoreTiles = 1;
  static constexpr int kMinBlocks = kWarps <= 4 ? 3 : 1;
  static constexpr bool kKeepsV = false;        // in shared memory, when the products have begun
  static constexpr bool kStagesResults = true;  // through shared memory

  static __device__ __forceinline__ int first_key(int warp, int m) { return 32 * warp + 16 * m; }  // of 16
};

// The products by mma.sync.
template <class Config>
class BackwardPairBlock : public BackwardPairRow<Config> {
  using Base = BackwardPairRow<Config>;
  using typename Base::Accumulator;
  using typename Base::ElementTile;
  using typename Base::ScoreTile;
  using typename Base::UnitTile;
  using Element = typename Config::Element;
  using BiasValue = typename Config::BiasValue;
  using Base::at_, Base::lane_, Base::warp_, Base::p_;
  using Base::delta_quads, Base::elements, Base::scores, Base::shifts, Base::units, Base::visible_words;
  using Base::dq, Base::load_rows, Base::write_dk, Base::write_dq, Base::write_dv;
  using Base::kBlockQ, Base::kColumns, Base::kKeys, Base::kM, Base::kRowBytes, Base::kSteps, Base::kStride, Base::kWarps;

 public:
  using Base::Base;

  __device__ __forceinline__ void run(const BiasValue* bias, int query_fragments) {
    load_rows();
    const uint32_t visible = visible_words()[warp_];
    uint32_t k[kSteps][kM][4], v[kSteps][kM][4];
    const RowsReader<UnitTile> k_reader(units(at_.k), 32 * warp_, 0);
    const RowsReader<ElementTile> v_reader(elements(at_.v), 32 * warp_, 0);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        k_reader.load(k[step][m], 16 * m, 2 * step);
        v_reader.load(v[step][m], 16 * m, 2 * step);
      }
    }
    Accumulator dk, dv;
    set_zero(dk);
    set_zero(dv);
    const Addresses addresses(*this);
    __syncthreads();  // v is in registers: its memory is free for dS

    const BiasValue* source = bias + static_cast<int64_t>(warp_) * query_fragments * kFragment + lane_ * (kFragment / 32);
    const bool has_keys = 32 * warp_ < p_.num_keys;
    BiasFragment<BiasValue> fragment;
    if (has_keys) fragment.load(source);
#pragma unroll 1
    for (int block = 0; block * kBlockQ < p_.num_queries; ++block) {
      const int chunks = min(kBlockQ / 16, query_fragments - block * (kBlockQ / 16));
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
        if (has_keys) {
          process(block * kBlockQ + chunk * 16, addresses, addresses.scores_at(chunk), k, v, dk, dv, fragment, source,
                  block * (kBlockQ / 16) + chunk + 1 < query_fragments, visible);
        } else {
          const uint32_t zeros[kM][4] = {};
          store_ds(addresses.scores_at(chunk), zeros);
        }
      }
      __syncthreads();  // dS of all keys is there
      multiply_ds();
      __syncthreads();  // dq is there; nobody reads dS any more
      write_dq(block * kBlockQ);
    }
    write_dv(dv);
    write_dk(dk);
  }

 private:
  // ---- 32 keys of a warp x 16 queries ----

  // Where a lane finds query 0: as ldmatrix wants it, of q; dout lies `dout` bytes further. And its place in dS.
  struct Addresses {
    uint32_t chunks, rows, dout, scores;

    __device__ __forceinline__ explicit Addresses(const BackwardPairBlock& block)
        : chunks(ChunksReader<UnitTile>(block.units(block.at_.q), 0, 0).base),
          rows(RowsReader<UnitTile>(block.units(block.at_.q), 0, 0).base),
          dout(block.at_.dout - block.at_.q),
          scores(block.scores().chunk_address(32 * block.warp_ + block.lane_ / 4, 0) + block.lane_ % 4 * 4) {}

    // For the 16 queries of a chunk of the block; the swizzle is an XOR within a panel.
    __device__ __forceinline__ uint32_t scores_at(int chunk) const {
      constexpr int kInPanel = ScoreTile::kPanelCols / 16;
      return (scores ^ (chunk % kInPanel * 32)) + chunk / kInPanel * (kKeys * ScoreTile::kPanelCols * 2);
    }
  };

  __device__ __forceinline__ static void store_ds(uint32_t address, const uint32_t (&ds)[kM][4]) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        ptx::store_shared(address ^ (r / 2 * 16), (16 * m + r % 2 * 8) * ScoreTile::kPanelCols * 2, ds[m][r]);
      }
    }
  }

  __device__ __forceinline__ void process(int query, const Addresses& addresses, uint32_t scores, const uint32_t (&k)[kSteps][kM][4],
                                          const uint32_t (&v)[kSteps][kM][4], Accumulator& dk, Accumulator& dv,
                                          BiasFragment<BiasValue>& bias, const BiasValue*& source, bool has_next,
                                          uint32_t visible) {
    float x[kM][2][4], dp[kM][2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int own = query + 8 * n + lane_ % 4 * 2;
      const float2 shift = *reinterpret_cast<const float2*>(shifts() + own);
      const float4 delta = delta_quads()[own / 2];
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 pair = bias.pair(m, n, half);
          x[m][n][2 * half] = fmaf(pair.x, kLog2e, shift.x), x[m][n][2 * half + 1] = fmaf(pair.y, kLog2e, shift.y);
          dp[m][n][2 * half] = half == 0 ? delta.x : delta.z, dp[m][n][2 * half + 1] = half == 0 ? delta.y : delta.w;
        }
      }
    }
    source += kFragment;
    if (has_next) bias.load(source);
    const uint32_t chunks = addresses.chunks + query * kRowBytes, rows = addresses.rows + query * kRowBytes;
    multiply_rows<Unit>(x, k, chunks);
    multiply_rows<Element>(dp, v, chunks + addresses.dout);
    if (visible != 0xffffffffu) hide(x, visible >> (lane_ / 4));
    uint32_t p_operand[kM][4], ds_operand[kM][4];
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float low = ptx::exp2_approx(x[m][n][2 * half]), high = ptx::exp2_approx(x[m][n][2 * half + 1]);
          p_operand[m][2 * n + half] = pack<Element>(low, high);
          ds_operand[m][2 * n + half] = pack<Unit>(low * dp[m][n][2 * half], high * dp[m][n][2 * half + 1]);
        }
      }
    }
    store_ds(scores, ds_operand);
    add_product<Element>(dv, p_operand, rows + addresses.dout);
    add_product<Unit>(dk, ds_operand, rows);
  }

  // acc += a b^T over the head dim, for 16 rows of b.
  template <class Operand>
  __device__ __forceinline__ static void multiply_rows(float (&acc)[kM][2][4],
                                                       const uint32_t (&a)[kSteps][kM][4], uint32_t b) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t fragment[4];
      ptx::ldmatrix_x4(fragment, b ^ (2 * step * 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_16816<Operand>(acc[m][0], a[step][m], fragment[0], fragment[1]);
        ptx::mma_16816<Operand>(acc[m][1], a[step][m], fragment[2], fragment[3]);
      }
    }
  }

  // acc += a b for the 16 rows of b that are a's columns.
  template <class Operand>
  __device__ __forceinline__ static void add_product(Accumulator& acc, const uint32_t (&a)[kM][4], uint32_t b) {
#pragma unroll
    for (int n = 0; n < kColumns; n += 2) {
      uint32_t fragment[4];
      ptx::ldmatrix_x4_trans(fragment, b ^ (n * 16));
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        ptx::mma_16816<Operand>(acc[m][n], a[m], fragment[0], fragment[1]);
        ptx::mma_16816<Operand>(acc[m][n + 1], a[m], fragment[2], fragment[3]);
      }
    }
  }

  __device__ __forceinline__ static void hide(float (&x)[kM][2][4], uint32_t visible) {
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool keeps = visible >> (16 * m + 8 * half) & 1;
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          if (!keeps) x[m][n][2 * half] = x[m][n][2 * half + 1] = -INFINITY;
        }
      }
    }
  }

  // dq of the block of queries: 16 queries x 16 columns a warp, over all keys.
  __device__ __forceinline__ void multiply_ds() {
    for (int unit = warp_; unit < kBlockQ / 16 * (kHeadDim / 16); unit += kWarps) {
      const int m = unit / (kHeadDim / 16), n = unit % (kHeadDim / 16);
      const ChunksReader<ScoreTile> ds(scores(), 0, 2 * m);
      const RowsReader<UnitTile> k(units(at_.k), 0, 2 * n);
      float acc[2][4] = {}, odd[2][4] = {};  // sums of their own: a product does not wait for the one before
#pragma unroll 4
      for (int key = 0; key < kKeys; key += 32) {
        uint32_t a[2][4], b[2][4];
        ds.load_transposed(a[0], key, 0);
        k.load_transposed(b[0], key, 0);
        ds.load_transposed(a[1], key + 16, 0);
        k.load_transposed(b[1], key + 16, 0);
        ptx::mma_16816<Unit>(acc[0], a[0], b[0][0], b[0][1]);
        ptx::mma_16816<Unit>(acc[1], a[0], b[0][2], b[0][3]);
        ptx::mma_16816<Unit>(odd[0], a[1], b[1][0], b[1][1]);
        ptx::mma_16816<Unit>(odd[1], a[1], b[1][2], b[1][3]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[i / 4][i % 4] += odd[i / 4][i % 4];
      float* target = dq() + (16 * m + lane_ / 4) * kStride + 16 * n + lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<float2*>(target + 8 * i) = make_float2(acc[i][0], acc[i][1]);
        *reinterpret_cast<float2*>(target + 8 * kStride + 8 * i) = make_float2(acc[i][2], acc[i][3]);
      }
    }
  }
};

}  // namespace fcsa::sm80::pair

namespace fcsa::sm80 {

// A block a row and head; the bias is packed with keys in rows (pack_bias_kernel, kTransposed).
template <class Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kMinBlocks)
    backward_pair_kernel(const __grid_constant__ BackwardParams p, const pair::Rows rows, const PackedBias packed) {
  extern __shared__ __align__(128) char shared_memory[];
  uint32_t block = blockIdx.x;
  const int inner = block % rows.inner;
  block /= rows.inner;
  const int head = block % p.heads, outer = block / p.heads;
  const TileIndex row = rows.at(outer, inner, head, 0);
  pair::BackwardPairBlock<Config> work(p, row, shared_memory);
  work.run(static_cast<const typename Config::BiasValue*>(p.packed_bias) + packed.at(row, 0, 0, 0),
           packed.column_fragments);
}

template <class Config>
cudaError_t launch_backward_pair_kernel(const BackwardParams& p, const pair::Rows& rows, cudaStream_t stream) {
  using Block = pair::BackwardPairBlock<Config>;
  const int64_t blocks = static_cast<int64_t>(rows.inner) * rows.outer * p.heads;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr auto kKernel = &backward_pair_kernel<Config>;
  const int bytes = Block::shared_bytes(p.num_queries);
  const cudaError_t error = allow_all_shared_memory<kKernel>(bytes);
  if (error != cudaSuccess) return error;
  kKernel<<<static_cast<uint32_t>(blocks), Config::kThreads, bytes, stream>>>(
      p, rows, PackedBias(p, true));
  return cudaGetLastError();
}

template <class Element, class BiasValue>
cudaError_t launch_backward_pair(const BackwardParams& p, cudaStream_t stream) {
  const pair::Rows rows = pair::rows_of(p);
  if (p.num_keys <= 128)
    return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 4>>(p, rows, stream);
  if (p.num_keys <= 256)
    return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 8>>(p, rows, stream);
  return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 12>>(p, rows, stream);
}

}  // namespace fcsa::sm80
