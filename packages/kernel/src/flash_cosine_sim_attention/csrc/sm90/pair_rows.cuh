// A batch row of a pair bias on its way into shared memory and registers: keys and queries become unit vectors as half.
#pragma once

#include "../common/mask.cuh"
#include "../sm80/pair_rows.cuh"
#include "ptx.cuh"
#include "smem_panel.cuh"

namespace fcsa::sm90::pair {

using sm80::pair::kHeadDim;
using sm80::pair::Rows;
using sm80::pair::rows_of;
using sm80::pair::ScaleFactors;
using sm80::pair::Unit;

// All keys of a row: of each a unit key (columns 0 to 31) and its value (32 to 63), 128 bytes.
template <int kMaxKeys>
struct KeyRows {
  using Tile = PanelTile<Unit, kMaxKeys, 2 * kHeadDim>;
  Tile tile;

  // Operand of S = q k^T: 64 keys from `key`, 16 columns.
  __device__ __forceinline__ uint64_t keys(int key, int column) const { return tile.descriptor(key, column); }
  // Operand of O += P v: 16 keys from `key`, all columns.
  __device__ __forceinline__ uint64_t values(int key) const { return tile.descriptor_transposed(key, kHeadDim); }
};

// 1 / max(|x|, 1e-12) up to 2^-22, from |x|^2; what is lost to zero there has a norm below 1e-12.
__device__ __forceinline__ float reciprocal_norm(float squares) { return fminf(rsqrt_approx(squares), 1e12f); }

// kThreads threads, four a key. load() starts all loads of a row, store() writes to shared memory what they brought.
template <class Element, int kMaxKeys, int kThreads>
class KeyLoader {
  static constexpr int kKeysAtOnce = kThreads / 4, kSteps = kMaxKeys / kKeysAtOnce;
  static_assert(kMaxKeys % kKeysAtOnce == 0);

  uint4 k_[kSteps], v_[kSteps];
  uint32_t visible_;  // a bit a step

 public:
  __device__ __forceinline__ void load(const Problem& p, const TileIndex& row, int thread) {
    const int column = thread % 4 * 8;
    const uint8_t* mask = mask_row(p, row);
    visible_ = 0;
    const Element* k = static_cast<const Element*>(p.k) + row.offset(p.k_strides) + column;
    const Element* v = static_cast<const Element*>(p.v) + row.offset(p.v_strides) + column;
    const int64_t k_step = kKeysAtOnce * p.k_strides.row, v_step = kKeysAtOnce * p.v_strides.row;
    k += thread / 4 * p.k_strides.row, v += thread / 4 * p.v_strides.row;
    const int num_keys = column < p.head_dim ? p.num_keys - thread / 4 : 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      k_[i] = v_[i] = make_uint4(0, 0, 0, 0);
      if (i * kKeysAtOnce < num_keys) {
        k_[i] = *reinterpret_cast<const uint4*>(k);
        v_[i] = *reinterpret_cast<const uint4*>(v);
      }
      k += k_step, v += v_step;
    }
    if (mask == nullptr) return;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int key = thread / 4 + i * kKeysAtOnce;
      if (key < p.num_keys && mask[key * p.mask_key] != 0) visible_ |= 1u << i;
    }
  }

  // is_masked: some keys of the row may be hidden. rnorms: of the row's keys, or nullptr.
  __device__ __forceinline__ void store(KeyRows<kMaxKeys>& rows, int num_keys, int padded_keys, bool is_masked,
                                        bool l2norm, float factor, float* rnorms, int thread) {
    const int column = thread % 4 * 8;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int key = thread / 4 + i * kKeysAtOnce;
      if (key >= padded_keys) break;  // whole warps
      if (is_masked && (visible_ >> i & 1) == 0) k_[i] = v_[i] = make_uint4(0, 0, 0, 0);  // NaN and all
      float x[8];
      load8(x, reinterpret_cast<const Element*>(&k_[i]));
      float squares = 0.0f;
#pragma unroll
      for (int c = 0; c < 8; ++c) squares = fmaf(x[c], x[c], squares);
      squares = lane_sum<4>(squares);
      const float rnorm = l2norm ? reciprocal_norm(squares) : 1.0f, multiplier = rnorm * factor;
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] *= multiplier;
      store8(rows.tile.chunk(key, column), x);
      *reinterpret_cast<uint4*>(rows.tile.chunk(key, kHeadDim + column)) = v_[i];
      if (rnorms != nullptr && column == 0 && key < num_keys) rnorms[key] = rnorm;
    }
  }
};

// A thread's queries, rows `query` and query + 8 of its warp's sixteen, as operands of S = q k^T.
template <class Element>
class QueryLoader {
  uint32_t raw_[2][4];

 public:
  // source: the row's queries.
  __device__ __forceinline__ void load(const Element* source, int64_t stride, int query, int num_queries, int head_dim) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + 8 * half;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int column = 8 * i + threadIdx.x % 4 * 2;
        const bool valid = row < num_queries && column < head_dim;
        raw_[half][i] = valid ? *reinterpret_cast<const uint32_t*>(source + row * stride + column) : 0u;
      }
    }
  }

  __device__ __forceinline__ void normalize(uint32_t (&words)[kHeadDim / 16][4], float (&rnorm)[2], bool l2norm,
                                            float factor) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float2 x[4];
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        x[i] = unpack<Element>(raw_[half][i]);
        squares = fmaf(x[i].x, x[i].x, fmaf(x[i].y, x[i].y, squares));
      }
      squares = lane_sum<4>(squares);
      rnorm[half] = l2norm ? reciprocal_norm(squares) : 1.0f;
      const float multiplier = rnorm[half] * factor;
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i / 2][i % 2 * 2 + half] = pack<Unit>(x[i].x * multiplier, x[i].y * multiplier);
    }
  }
};

}  // namespace fcsa::sm90::pair
