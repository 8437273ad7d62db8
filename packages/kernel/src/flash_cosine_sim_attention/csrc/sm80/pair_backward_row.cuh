// The backward of a pair bias for one row and head, which a block of threads holds as a whole: what comes before the products
// and after them. The products: sm80/pair_backward.cuh, sm90/pair_backward.cuh.
//
//   start     k, q -> unit vectors; v, dout; delta of every query: all in shared memory
//   results   dq from tiles of floats, dk and dv from registers: through the norm, to device memory
//
// dS is multiplied as half, so P is held times a power of two that keeps |P (dP - delta)| below 2^15, or dout, where P is half
// too.
#pragma once

#include "../common/backward_preprocess.cuh"
#include "../common/backward_project.cuh"
#include "../common/mask.cuh"
#include "backward_tiles.cuh"
#include "pair_rows.cuh"

namespace fcsa::sm80::pair {

// What a block of threads does before and after the products.
template <class Config>
class BackwardPairRow {
 protected:
  using Element = typename Config::Element;
  using BiasValue = typename Config::BiasValue;
  using UnitTile = Tile<Unit>;
  using ElementTile = Tile<Element>;
  using ScoreTile = SmemTile<Unit, Config::kKeys, Config::kBlockQ>;
  static constexpr int kM = Config::kM, kBlockQ = Config::kBlockQ, kKeys = Config::kKeys;
  static constexpr int kWarps = Config::kWarps, kThreads = Config::kThreads, kRowBytes = kHeadDim * 2;
  static constexpr int kSteps = kHeadDim / 16, kColumns = kHeadDim / 8, kStride = kHeadDim + 4;  // kStride: of float tiles
  static constexpr int kRowStep = kThreads / 4, kKeyRows = kKeys / kRowStep;  // four threads a row; keys a thread loads
  static constexpr bool kScalesP = !std::is_same_v<Element, Unit>;  // bfloat16 has the range for it
  using Accumulator = float[kM][kColumns][4];

  // Shared memory, in bytes from its start; what wgmma reads starts on multiples of 1024.
  struct Layout {
    int k, rnorms, visible, q, dout, ds, v, dq, records, bytes;

    __host__ __device__ explicit Layout(int num_queries) {
      const int queries = ceil_div(num_queries, kBlockQ) * kBlockQ;
      k = 0;
      rnorms = k + kKeys * kRowBytes;
      visible = rnorms + (kKeys + queries) * 4;
      q = visible + (kWarps + 2 * kWarps) * 4;
      q = (q + 1023) / 1024 * 1024;
      dout = q + queries * kRowBytes;
      ds = dout + queries * kRowBytes;
      const int scores = Config::kScoreTiles * static_cast<int>(sizeof(ScoreTile));
      v = Config::kKeepsV ? ds + scores : ds;  // in the memory of dS until it is in registers
      dq = v + (Config::kKeepsV ? kKeys * kRowBytes : scores);
      records = dq + (Config::kStagesResults ? kBlockQ * kStride * 4 : 0);
      bytes = records + (1 + 2) * queries * 4;
      const int with_epilogue = epilogue() + kKeys * kStride * 4;
      if (Config::kStagesResults && bytes < with_epilogue) bytes = with_epilogue;
    }
    __host__ __device__ int epilogue() const { return q; }  // dv, then dk: over all that is not needed any more
  };

  const BackwardParams& p_;
  const TileIndex row_;
  const Layout at_;
  char* const smem_;
  const int lane_, warp_, padded_queries_;
  float query_factor_, key_factor_, scale_, ds_scale_, inverse_ds_scale_;

 public:
  __device__ __forceinline__ BackwardPairRow(const BackwardParams& p, const TileIndex& row, char* smem)
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

 protected:
  template <class T>
  __device__ __forceinline__ T* tile(int offset) const {
    return reinterpret_cast<T*>(smem_ + offset);
  }
  __device__ __forceinline__ UnitTile& units(int offset) const { return *tile<UnitTile>(offset); }
  __device__ __forceinline__ ElementTile& elements(int offset) const { return *tile<ElementTile>(offset); }
  __device__ __forceinline__ ScoreTile& scores() const { return *tile<ScoreTile>(at_.ds); }
  __device__ __forceinline__ uint32_t* visible_words() const { return tile<uint32_t>(at_.visible); }  // a bit a key
  __device__ __forceinline__ float* dq() const { return tile<float>(at_.dq); }
  __device__ __forceinline__ float* shifts() const { return tile<float>(at_.records); }
  // -delta of queries 2 i and 2 i + 1, twice: as four accumulators begin.
  __device__ __forceinline__ float4* delta_quads() const {
    return reinterpret_cast<float4*>(tile<float>(at_.records) + padded_queries_);
  }
  __device__ __forceinline__ float* delta(int query) const {  // and two floats behind it
    return reinterpret_cast<float*>(delta_quads() + query / 2) + query % 2;
  }
  __device__ __forceinline__ void set_delta(int query, float value) { delta(query)[0] = delta(query)[2] = value; }
  __device__ __forceinline__ float* k_rnorms() const { return tile<float>(at_.rnorms); }
  __device__ __forceinline__ float* q_rnorms() const { return tile<float>(at_.rnorms) + kKeys; }

  // ---- start ----

  __device__ __forceinline__ void load_rows() {
    constexpr int kStep = kRowStep;
    const int first = threadIdx.x / 4, column = threadIdx.x % 4 * 8;
    RowChunks<kKeyRows, Element> k, v;
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
    const int exponent = ds_exponent(v_max, dout_max);
    ds_scale_ = __int_as_float((127 + exponent) << 23), inverse_ds_scale_ = __int_as_float((127 - exponent) << 23);
    if constexpr (!kScalesP) scale_dout();
    write_records(static_cast<float>(exponent));
    __syncthreads();
  }

  // Of the power of two for dS: |dP|, |delta| <= d max|v| max|dout|; dout itself has to stay in the range of half too.
  __device__ __forceinline__ static int ds_exponent(float v_max, float dout_max) {
    const auto exponent_of = [](float x) { return (__float_as_int(x) >> 23) - 127; };
    const int dout_room = dout_max > 0.0f && dout_max < INFINITY ? 14 - exponent_of(dout_max) : 0;
    const int v_room = -1 - exponent_of(2.0f * kHeadDim * v_max);
    return max(-126, min(dout_room, kScalesP ? 60 : 126) + min(v_room, 0));
  }

  // Of four rows: q as unit vectors, dout as it is, delta and -lse; -> the largest |dout|.
  __device__ __forceinline__ float load_queries(int first, int column) {
    constexpr int kStep = kRowStep;
    const int64_t row0 = row_.first_row(p_.b1, p_.heads, p_.num_queries);
    RowChunks<4, Element> q, dout, out;
    q.load(static_cast<const Element*>(p_.q) + row_.offset(p_.q_strides), p_.q_strides.row, first, kStep, p_.num_queries, column, p_.head_dim);
    dout.load(static_cast<const Element*>(p_.dout) + row_.offset(p_.dout_strides), p_.dout_strides.row, first, kStep, p_.num_queries, column, p_.head_dim);
    out.load(static_cast<const Element*>(p_.out) + row_.offset(p_.out_strides), p_.out_strides.row, first, kStep, p_.num_queries, column, p_.head_dim);
    static_assert(kStep % 8 == 0, "the swizzle of a thread's rows is one constant");
    const int offset = UnitTile::chunk_offset(first, column / 8);
    float lse[4], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) lse[i] = p_.lse[row0 + min(first + i * kStep, p_.num_queries - 1)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = first + i * kStep;
      if (query >= padded_queries_) break;  // whole warps
      float x[8], y[8], product = 0.0f;
      q.get(x, i);
      const float rnorm = store_unit(units(at_.q).data + offset + i * (kStep * kHeadDim), x, p_.l2norm_qk, query_factor_);
      dout.get(x, i);
      out.get(y, i);
      largest = largest_of(x, largest);
#pragma unroll
      for (int c = 0; c < 8; ++c) product += x[c] * y[c];
      *reinterpret_cast<uint4*>(elements(at_.dout).data + offset + i * (kStep * kHeadDim)) = dout.raw[i];
      const float delta = lane_sum<4>(product);
      if (column != 0) continue;
      const bool sees_keys = query < p_.num_queries && lse[i] != -INFINITY;
      q_rnorms()[query] = rnorm;
      set_delta(query, sees_keys ? -delta : 0.0f);
      shifts()[query] = sees_keys ? -lse[i] * kLog2e : -INFINITY;
    }
    return largest;
  }

  // k as unit vectors, v as it is, a bit a key.
  __device__ __forceinline__ void load_keys(RowChunks<kKeyRows, Element>& k, RowChunks<kKeyRows, Element>& v, int first, int column,
                                            float& largest) {
    const uint8_t* mask = mask_row(p_, row_);
    const int64_t mask_step = p_.mask_key;
    const int num_keys = p_.num_keys;
    const auto visible = [=](int key) { return key < num_keys && (mask == nullptr || mask[key * mask_step] != 0); };
    const uint32_t bits = __ballot_sync(0xffffffffu, visible(32 * warp_ + lane_));
    if (lane_ == 0) visible_words()[warp_] = bits;
    const int offset = UnitTile::chunk_offset(first, column / 8);
#pragma unroll
    for (int i = 0; i < kKeyRows; ++i) {
      const int key = first + i * kRowStep;
      const bool is_visible = visible(key);
      k.hide(i, is_visible);
      v.hide(i, is_visible);
      float x[8];
      v.get(x, i);
      largest = largest_of(x, largest);
      *reinterpret_cast<uint4*>(elements(at_.v).data + offset + i * (kRowStep * kHeadDim)) = v.raw[i];
      k.get(x, i);
      const float rnorm = store_unit(units(at_.k).data + offset + i * (kRowStep * kHeadDim), x, p_.l2norm_qk, key_factor_);
      if (column == 0) k_rnorms()[key] = rnorm;
    }
  }

  // By the power of two; every thread its own chunks.
  __device__ __forceinline__ void scale_dout() {
    const int column = threadIdx.x % 4 * 8;
    for (int query = threadIdx.x / 4; query < padded_queries_; query += kRowStep) {
      Element* chunk = elements(at_.dout).data + ElementTile::chunk_offset(query, column / 8);
      float x[8];
      load8(x, chunk);
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] *= ds_scale_;
      store8(chunk, x);
    }
  }

  // Scales delta as dout is, or P through its shift. For the gradient of the bias: the records that its kernel reads.
  __device__ __forceinline__ void write_records(float log2_scale) {
    const int padded = fcsa::padded_queries(p_.num_queries);
    float* records = reinterpret_cast<float*>(p_.query_rows + row_.first_row(p_.b1, p_.heads, padded));
    for (int query = threadIdx.x; query < max(padded, padded_queries_); query += kThreads) {
      const bool is_held = query < padded_queries_;
      const float shift = is_held ? shifts()[query] : -INFINITY, offset = is_held ? *delta(query) : 0.0f;
      const bool sees_keys = shift != -INFINITY;
      if (is_held && kScalesP) shifts()[query] = shift + log2_scale;
      if (is_held && !kScalesP) set_delta(query, offset * ds_scale_);
      if (query >= padded || p_.dbias == nullptr) continue;
      float* target = records + query / 2 * 8 + query % 2;
      target[0] = sees_keys ? scale_ * q_rnorms()[query] * kLog2e : 0.0f, target[2] = shift;
      target[4] = sees_keys ? 1.0f : 0.0f, target[6] = offset;
    }
  }

  // ---- results ----

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
    const float factor = scale_ / key_factor_ / ds_scale_;
    for (int row = threadIdx.x / 4; row < kBlockQ; row += kRowStep) {  // whole warps
      const int query = query0 + row;
      float a[8];
      load8(a, dq() + row * kStride + column);
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
    rows.operand_scale = ds_scale_, rows.unit = 1.0f;
    rows.num_rows = min(kBlockQ, p_.num_queries - query0), rows.head_dim = p_.head_dim, rows.groups = 1;
    backward::project_rows<Element, kHeadDim, kBlockQ, backward::BlockTeam<kThreads>>(dq(), kStride, rows);
  }

  // Accumulators of dk or dv into a tile of floats.
  __device__ __forceinline__ void stage(const Accumulator& acc) {
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = Config::first_key(warp_, m) + 8 * half + lane_ / 4;
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
    for (int i = 0; i < kKeyRows; ++i) {
      const int key = threadIdx.x / 4 + i * kRowStep;
      float x[8];
      load8(x, tile<float>(at_.epilogue()) + key * kStride + column);
      finish(x, key, column);
      if (key < p_.num_keys && column < p_.head_dim) store8(target + key * strides.row + column, x);
    }
  }

  __device__ __forceinline__ void write_dv(const Accumulator& dv) {
    if (p_.dv == nullptr) return;
    const float factor = 1.0f / ds_scale_;
    write_keys(dv, p_.dv, p_.dv_strides, [=](float (&x)[8], int, int) {
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] *= factor;
    });
  }

  __device__ __forceinline__ void write_dk(const Accumulator& dk) {
    if (p_.dk == nullptr) return;
    const float factor = key_factor_ / kLog2e / ds_scale_;  // scale / query_factor_, also where the scale is 0
    write_keys(dk, p_.dk, p_.dk_strides, [&](float (&x)[8], int key, int column) {
      project(x, units(at_.k), key, column, key_factor_, k_rnorms()[key], factor);
    });
  }
};

}  // namespace fcsa::sm80::pair
