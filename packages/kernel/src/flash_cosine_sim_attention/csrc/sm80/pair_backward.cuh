// The backward of a pair bias, without the gradient of the bias: a block of threads holds one whole row and head, so that
// dq, dk and dv are complete in it, deterministic and without a workspace.
//
//   start       k, q -> unit vectors; v, dout; delta of every query                              all in shared memory
//   16 queries  S^T = bias * log2(e) - lse_i + K Q^T       dP^T = V dO^T - delta_i      the subtrahends start the sums
//               P^T = exp2(S^T)      dv += P^T dO      dS^T = P^T dP^T      dk += dS^T Q      dS -> shared memory
//   a block     dq = dS K
//
// A warp owns 32 keys, whose k and v stay in registers as operands. dS is multiplied as half, so dout is held times a power
// of two that keeps |dP - delta| below 2^15.
#pragma once

#include "../common/backward_preprocess.cuh"
#include "../common/backward_project.cuh"
#include "../common/mask.cuh"
#include "backward_tiles.cuh"
#include "pair_rows.cuh"

namespace fcsa::sm80::pair {

template <class Element_, class BiasValue_, int kWarps_>
struct BackwardPairConfig {
  using Element = Element_;
  using BiasValue = BiasValue_;
  static constexpr int kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kKeys = 32 * kWarps;
  // dq of a block is divided into 16 queries x 16 columns a warp.
  static constexpr int kBlockQ = 8 * kWarps;
  static constexpr int kMinBlocks = kWarps <= 4 ? 3 : 1;
  static constexpr int kM = 2, kSteps = kHeadDim / 16, kColumns = kHeadDim / 8;
  static constexpr int kStride = kHeadDim + 4;  // of float tiles
};

template <class Config>
class BackwardPairBlock {
  using Element = typename Config::Element;
  using BiasValue = typename Config::BiasValue;
  using UnitTile = Tile<Unit>;
  using ElementTile = Tile<Element>;
  using ScoreTile = SmemTile<Unit, Config::kKeys, Config::kBlockQ>;
  static constexpr int kM = Config::kM, kBlockQ = Config::kBlockQ, kKeys = Config::kKeys, kStride = Config::kStride;
  static constexpr int kWarps = Config::kWarps, kThreads = Config::kThreads, kRowBytes = kHeadDim * 2;
  using Accumulator = float[kM][Config::kColumns][4];

  // Shared memory, in bytes from its start.
  struct Layout {
    int k, rnorms, visible, q, dout, ds, dq, records, bytes;

    __host__ __device__ explicit Layout(int num_queries) {
      const int queries = ceil_div(num_queries, kBlockQ) * kBlockQ;
      k = 0;
      rnorms = k + kKeys * kRowBytes;
      visible = rnorms + (kKeys + queries) * 4;
      q = visible + (kWarps + 2 * kWarps) * 4;
      q = (q + 127) / 128 * 128;
      dout = q + queries * kRowBytes;
      ds = dout + queries * kRowBytes;
      dq = ds + static_cast<int>(sizeof(ScoreTile));
      records = dq + kBlockQ * kStride * 4;
      bytes = records + 2 * queries * 4;
      const int with_epilogue = epilogue() + kKeys * kStride * 4;
      if (bytes < with_epilogue) bytes = with_epilogue;
    }
    __host__ __device__ int v() const { return ds; }         // until it is in registers
    __host__ __device__ int epilogue() const { return q; }  // dv, then dk: over all that is not needed any more
  };

  const BackwardParams& p_;
  const TileIndex row_;
  const Layout at_;
  char* const smem_;
  const int lane_, warp_, padded_queries_;
  float query_factor_, key_factor_, scale_, dout_scale_;

 public:
  __device__ __forceinline__ BackwardPairBlock(const BackwardParams& p, const TileIndex& row, char* smem)
      : p_(p),
        row_(row),
        at_(p.num_queries),
        smem_(smem),
        lane_(threadIdx.x % 32),
        warp_(threadIdx.x / 32),
        padded_queries_(ceil_div(p.num_queries, kBlockQ) * kBlockQ) {
    scale_ = head_scale(p, row.head);
    const ScaleFactors factors(scale_);
    query_factor_ = factors.query, key_factor_ = factors.key;
  }

  static __host__ int shared_bytes(int num_queries) { return Layout(num_queries).bytes; }

  __device__ __forceinline__ void run(const BiasValue* bias, int query_fragments) {
    load_rows();
    const uint32_t visible = tile<uint32_t>(at_.visible)[warp_];
    uint32_t k[Config::kSteps][kM][4], v[Config::kSteps][kM][4];
    const RowsReader<UnitTile> k_reader(units(at_.k), 32 * warp_, 0);
    const RowsReader<ElementTile> v_reader(elements(at_.v()), 32 * warp_, 0);
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
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
  template <class T>
  __device__ __forceinline__ T* tile(int offset) const {
    return reinterpret_cast<T*>(smem_ + offset);
  }
  __device__ __forceinline__ UnitTile& units(int offset) const { return *tile<UnitTile>(offset); }
  __device__ __forceinline__ ElementTile& elements(int offset) const { return *tile<ElementTile>(offset); }
  __device__ __forceinline__ ScoreTile& scores() const { return *tile<ScoreTile>(at_.ds); }
  __device__ __forceinline__ float* shifts() const { return tile<float>(at_.records); }
  __device__ __forceinline__ float* deltas() const { return tile<float>(at_.records) + padded_queries_; }
  __device__ __forceinline__ float* k_rnorms() const { return tile<float>(at_.rnorms); }
  __device__ __forceinline__ float* q_rnorms() const { return tile<float>(at_.rnorms) + kKeys; }

  // ---- start ----

  __device__ __forceinline__ void load_rows() {
    constexpr int kStep = kThreads / 4;  // rows between those of a thread
    const int first = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    RowChunks<4, Element> k, v;
    k.load(static_cast<const Element*>(p_.k) + row_.offset(p_.k_strides), p_.k_strides.row, first, kStep, p_.num_keys, column, p_.head_dim);
    v.load(static_cast<const Element*>(p_.v) + row_.offset(p_.v_strides), p_.v_strides.row, first, kStep, p_.num_keys, column, p_.head_dim);
    float dout_largest = 0.0f, v_largest = 0.0f;
    for (int query = first; query < padded_queries_; query += 4 * kStep) dout_largest = fmaxf(dout_largest, load_queries(query, column));
    load_keys(k, v, first, column, v_largest);

    float* largest = tile<float>(at_.visible) + kWarps;
    v_largest = lane_max<32>(v_largest), dout_largest = lane_max<32>(dout_largest);
    if (lane_ == 0) largest[2 * warp_] = v_largest, largest[2 * warp_ + 1] = dout_largest;
    __syncthreads();
    float v_max = 0.0f, dout_max = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) v_max = fmaxf(v_max, largest[2 * w]), dout_max = fmaxf(dout_max, largest[2 * w + 1]);
    // |dP|, |delta| <= d max|v| max|dout|; dout itself has to stay in the range of half too.
    const float bound = 2.0f * kHeadDim * v_max;
    dout_scale_ = split_scale(dout_max) * fminf(1.0f, exp2f(-ceilf(log2f(fmaxf(bound, 1e-30f)))));
    scale_dout();
    write_records();
    __syncthreads();
  }

  // Of four rows: q as unit vectors, dout as it is, delta and -lse; -> the largest |dout|.
  __device__ __forceinline__ float load_queries(int first, int column) {
    constexpr int kStep = kThreads / 4;
    const int64_t row0 = row_.first_row(p_.b1, p_.heads, p_.num_queries);
    RowChunks<4, Element> q, dout, out;
    q.load(static_cast<const Element*>(p_.q) + row_.offset(p_.q_strides), p_.q_strides.row, first, kStep, p_.num_queries, column, p_.head_dim);
    dout.load(static_cast<const Element*>(p_.dout) + row_.offset(p_.dout_strides), p_.dout_strides.row, first, kStep, p_.num_queries, column, p_.head_dim);
    out.load(static_cast<const Element*>(p_.out) + row_.offset(p_.out_strides), p_.out_strides.row, first, kStep, p_.num_queries, column, p_.head_dim);
    float lse[4], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) lse[i] = p_.lse[row0 + min(first + i * kStep, p_.num_queries - 1)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = first + i * kStep;
      if (query >= padded_queries_) break;  // whole warps
      float x[8], y[8], product = 0.0f;
      q.get(x, i);
      const float rnorm = store_unit(units(at_.q), query, column, x, p_.l2norm_qk, query_factor_);
      dout.get(x, i);
      out.get(y, i);
      largest = largest_of(x, largest);
#pragma unroll
      for (int c = 0; c < 8; ++c) product += x[c] * y[c];
      *reinterpret_cast<uint4*>(elements(at_.dout).data + ElementTile::chunk_offset(query, column / 8)) = dout.raw[i];
      const float delta = lane_sum<4>(product);
      if (column != 0) continue;
      const bool sees_keys = query < p_.num_queries && lse[i] != -INFINITY;
      q_rnorms()[query] = rnorm;
      deltas()[query] = sees_keys ? -delta : 0.0f;
      shifts()[query] = sees_keys ? -lse[i] * kLog2e : -INFINITY;
    }
    return largest;
  }

  // k as unit vectors, v as it is, a bit a key.
  __device__ __forceinline__ void load_keys(RowChunks<4, Element>& k, RowChunks<4, Element>& v, int first, int column,
                                            float& largest) {
    const uint8_t* mask = mask_row(p_, row_);
    const int64_t mask_step = p_.mask_key;
    const int num_keys = p_.num_keys;
    const auto visible = [=](int key) { return key < num_keys && (mask == nullptr || mask[key * mask_step] != 0); };
    const uint32_t bits = __ballot_sync(0xffffffffu, visible(32 * warp_ + lane_));
    if (lane_ == 0) tile<uint32_t>(at_.visible)[warp_] = bits;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first + i * (kThreads / 4);
      const bool is_visible = visible(key);
      k.hide(i, is_visible);
      v.hide(i, is_visible);
      float x[8];
      v.get(x, i);
      largest = largest_of(x, largest);
      *reinterpret_cast<uint4*>(elements(at_.v()).data + ElementTile::chunk_offset(key, column / 8)) = v.raw[i];
      k.get(x, i);
      const float rnorm = store_unit(units(at_.k), key, column, x, p_.l2norm_qk, key_factor_);
      if (column == 0) k_rnorms()[key] = rnorm;
    }
  }

  // By the power of two; every thread its own chunks.
  __device__ __forceinline__ void scale_dout() {
    const int column = threadIdx.x % 4 * 8;
    for (int query = threadIdx.x / 4; query < padded_queries_; query += kThreads / 4) {
      Element* chunk = elements(at_.dout).data + ElementTile::chunk_offset(query, column / 8);
      float x[8];
      load8(x, chunk);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] *= dout_scale_;
      store8(chunk, x);
    }
  }

  // Scales delta as dout is. For the gradient of the bias: the records that its kernel reads.
  __device__ __forceinline__ void write_records() {
    const int padded = fcsa::padded_queries(p_.num_queries);
    float* records = reinterpret_cast<float*>(p_.query_rows + row_.first_row(p_.b1, p_.heads, padded));
    for (int query = threadIdx.x; query < max(padded, padded_queries_); query += kThreads) {
      const bool is_held = query < padded_queries_;
      const float shift = is_held ? shifts()[query] : -INFINITY, delta = is_held ? deltas()[query] : 0.0f;
      const bool sees_keys = shift != -INFINITY;
      if (is_held) deltas()[query] = delta * dout_scale_;
      if (query >= padded || p_.dbias == nullptr) continue;
      float* target = records + query / 2 * 8 + query % 2;
      target[0] = sees_keys ? scale_ * q_rnorms()[query] * kLog2e : 0.0f, target[2] = shift;
      target[4] = sees_keys ? 1.0f : 0.0f, target[6] = delta;
    }
  }

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

  __device__ __forceinline__ void process(int query, const Addresses& addresses, uint32_t scores, const uint32_t (&k)[Config::kSteps][kM][4],
                                          const uint32_t (&v)[Config::kSteps][kM][4], Accumulator& dk, Accumulator& dv,
                                          BiasFragment<BiasValue>& bias, const BiasValue*& source, bool has_next,
                                          uint32_t visible) {
    float x[kM][2][4], dp[kM][2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int own = query + 8 * n + lane_ % 4 * 2;
      const float2 shift = *reinterpret_cast<const float2*>(shifts() + own);
      const float2 delta = *reinterpret_cast<const float2*>(deltas() + own);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float2 pair = bias.pair(m, n, half);
          x[m][n][2 * half] = fmaf(pair.x, kLog2e, shift.x), x[m][n][2 * half + 1] = fmaf(pair.y, kLog2e, shift.y);
          dp[m][n][2 * half] = delta.x, dp[m][n][2 * half + 1] = delta.y;
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
                                                       const uint32_t (&a)[Config::kSteps][kM][4], uint32_t b) {
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
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
    for (int n = 0; n < Config::kColumns; n += 2) {
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

  // ---- results ----

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
      float* target = tile<float>(at_.dq) + (16 * m + lane_ / 4) * kStride + 16 * n + lane_ % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        *reinterpret_cast<float2*>(target + 8 * i) = make_float2(acc[i][0], acc[i][1]);
        *reinterpret_cast<float2*>(target + 8 * kStride + 8 * i) = make_float2(acc[i][2], acc[i][3]);
      }
    }
  }

  // Eight columns of a row of products `a` to a row of a gradient: factor * rnorm * (a - (a . xn) xn), where the unit vector
  // xn is the tile's row over unit_factor.
  __device__ __forceinline__ void project(float (&a)[8], const UnitTile& tile, int row, int column, float unit_factor,
                                          float rnorm, float factor) const {
    if (!p_.l2norm_qk) {
#pragma unroll
      for (int c = 0; c < 8; ++c) a[c] *= factor;
      return;
    }
    float x[8], product = 0.0f;
    load8(x, tile.data + UnitTile::chunk_offset(row, column / 8));
    const float inverse = unit_factor != 0.0f ? 1.0f / unit_factor : 0.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c) product += a[c] * (x[c] *= inverse);
    const float dot = lane_sum<4>(product);
#pragma unroll
    for (int c = 0; c < 8; ++c) a[c] = factor * (rnorm * (a[c] - dot * x[c]));
  }

  __device__ __forceinline__ void write_dq(int query0) {
    if (p_.dscale_rows != nullptr) return write_dq_and_dscale(query0);
    if (p_.dq == nullptr) return;
    Element* target = static_cast<Element*>(p_.dq) + row_.offset(p_.dq_strides);
    const int column = threadIdx.x % 4 * 8;
    const float factor = scale_ / key_factor_ / dout_scale_;
    for (int row = threadIdx.x / 4; row < kBlockQ; row += kThreads / 4) {  // whole warps
      const int query = query0 + row;
      float a[8];
      load8(a, tile<float>(at_.dq) + row * kStride + column);
      project(a, units(at_.q), query, column, query_factor_, q_rnorms()[query], factor);
      if (query < p_.num_queries && column < p_.head_dim) store8(target + query * p_.dq_strides.row + column, a);
    }
  }

  // With the gradient of the scale, which has to be right for a scale of 0 too.
  __device__ __forceinline__ void write_dq_and_dscale(int query0) {
    const int64_t first = row_.first_row(p_.b1, p_.heads, p_.num_queries) + query0;
    backward::ProjectedRows rows = {};
    rows.x = static_cast<const Element*>(p_.q) + row_.offset(p_.q_strides) + query0 * p_.q_strides.row;
    rows.x_stride = p_.q_strides.row;
    rows.rnorm = p_.l2norm_qk ? p_.q_rnorm + first : nullptr;
    if (p_.dq != nullptr) {
      rows.target = static_cast<Element*>(p_.dq) + row_.offset(p_.dq_strides) + query0 * p_.dq_strides.row;
    }
    rows.target_stride = p_.dq_strides.row;
    rows.dscale_rows = p_.dscale_rows + first;
    rows.scale = scale_ / key_factor_, rows.dscale_factor = 1.0f / key_factor_;
    rows.operand_scale = dout_scale_, rows.unit = 1.0f;
    rows.num_rows = min(kBlockQ, p_.num_queries - query0), rows.head_dim = p_.head_dim, rows.groups = 1;
    backward::project_rows<Element, kHeadDim, kBlockQ, backward::BlockTeam<kThreads>>(tile<float>(at_.dq), kStride, rows);
  }

  // Accumulators of dk or dv into a tile of floats.
  __device__ __forceinline__ void stage(const Accumulator& acc) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kColumns; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = 32 * warp_ + 16 * m + 8 * half + lane_ / 4;
          *reinterpret_cast<float2*>(tile<float>(at_.epilogue()) + key * kStride + 8 * n + lane_ % 4 * 2) =
              make_float2(acc[m][n][2 * half], acc[m][n][2 * half + 1]);
        }
      }
    }
    __syncthreads();
  }

  template <class Finish>
  __device__ __forceinline__ void write_keys(const Accumulator& acc, void* tensor, const Strides& strides, Finish finish) {
    stage(acc);
    Element* target = static_cast<Element*>(tensor) + row_.offset(strides);
    const int column = threadIdx.x % 4 * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = threadIdx.x / 4 + i * (kThreads / 4);
      float x[8];
      load8(x, tile<float>(at_.epilogue()) + key * kStride + column);
      finish(x, key, column);
      if (key < p_.num_keys && column < p_.head_dim) store8(target + key * strides.row + column, x);
    }
  }

  __device__ __forceinline__ void write_dv(const Accumulator& dv) {
    if (p_.dv == nullptr) return;
    const float factor = 1.0f / dout_scale_;
    write_keys(dv, p_.dv, p_.dv_strides, [=](float (&x)[8], int, int) {
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] *= factor;
    });
  }

  __device__ __forceinline__ void write_dk(const Accumulator& dk) {
    if (p_.dk == nullptr) return;
    const float factor = key_factor_ / kLog2e / dout_scale_;  // scale / query_factor_, also where the scale is 0
    write_keys(dk, p_.dk, p_.dk_strides, [&](float (&x)[8], int key, int column) {
      project(x, units(at_.k), key, column, key_factor_, k_rnorms()[key], factor);
    });
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
  if (p.num_keys > pair::kMaxBackwardKeys) return cudaErrorInvalidValue;
  const pair::Rows rows = pair::rows_of(p);
  if (p.num_keys <= 128)
    return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 4>>(p, rows, stream);
  if (p.num_keys <= 256)
    return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 8>>(p, rows, stream);
  return launch_backward_pair_kernel<pair::BackwardPairConfig<Element, BiasValue, 12>>(p, rows, stream);
}

}  // namespace fcsa::sm80
