// dS of 64 queries x kKeys keys, recomputed: what the deterministic dq kernel and the bias gradient are made of.
// Four warps, 16 queries each; rows are queries here, columns keys.
#pragma once

#include "backward_tiles.cuh"
#include "backward_traits.cuh"

namespace fcsa::sm80 {

template <class Traits>
struct ScoreBlock {
  using Element = typename Traits::Element;
  using Operand = typename Traits::Operand;
  static constexpr int kPlanes = Traits::kPlanes;
  static constexpr int kHeadDim = Traits::kHeadDim;
  static constexpr int kThreads = 128;
  static constexpr int kQueries = 64;
  static constexpr int kKeys = kPlanes * kHeadDim <= 128 ? 64 : 32;  // all four tiles in 99 KB
  static constexpr int kN = kKeys / 8;
  using QueryTile = SmemTile<Operand, kPlanes * kQueries, kHeadDim>;
  using KeyTile = SmemTile<Operand, kPlanes * kKeys, kHeadDim>;

  struct KeyColumn {
    float factor;    // k_rnorm where the norm is folded, else 1; 0 where hidden
    uint32_t visible;
  };
  struct Smem {
    QueryTile q, dout;
    KeyTile k, v;
    float4 query_rows[kQueries];
    KeyColumn keys[kKeys];
  };

  // With cp.async (not committed).
  static __device__ __forceinline__ void load_queries(Smem& smem, const BackwardParams& p, const TileIndex& head,
                                                      int query0) {
    const auto q = query_operand<Traits>(p, head).from(query0), dout = dout_operand<Traits>(p, head).from(query0);
    copy_rows_async<kThreads, kPlanes>(smem.q, q, p.num_queries - query0, p.head_dim);
    copy_rows_async<kThreads, kPlanes>(smem.dout, dout, p.num_queries - query0, p.head_dim);
    const int64_t row = head.first_row(p.b1, p.heads, padded_queries(p.num_queries)) + query0;
    copy_query_rows_async(smem.query_rows, p.query_rows + row);
  }

  static __device__ __forceinline__ void load_keys(Smem& smem, const BackwardParams& p, const TileIndex& kv_head,
                                                   int key0) {
    const auto k = key_operand<Traits>(p, kv_head).from(key0), v = value_operand<Traits>(p, kv_head).from(key0);
    const int num_keys = p.num_keys - key0;
    const uint8_t* mask = mask_row(p, kv_head);
    if (mask != nullptr) mask += key0 * p.mask_key;
    copy_rows_async<kThreads, kPlanes>(smem.k, k, num_keys, p.head_dim, mask, p.mask_key);
    copy_rows_async<kThreads, kPlanes>(smem.v, v, num_keys, p.head_dim, mask, p.mask_key);
    if (threadIdx.x >= kKeys) return;
    const int key = threadIdx.x;
    const bool visible = key < num_keys && (mask == nullptr || mask[key * p.mask_key] != 0);
    const bool folded = Traits::kFoldsNorm && norm_is_folded<Traits>(p);
    const int64_t row = kv_head.first_row(p.b1, p.kv_heads, p.num_keys) + key0 + key;
    smem.keys[key] = {!visible ? 0.0f : folded ? folded_factor<Traits>(p.k_rnorm[row]) : 1.0f, visible};
  }

  // p_ij (dp_ij gradient_i + offset_i): the row factors of QueryRow are in it, those of the keys are not.
  // bias(half, n, c): bias * log2(e) of row 8 half + lane / 4 and column c of n8 tile n.
  template <class Bias>
  static __device__ __forceinline__ void compute_ds(float (&ds)[1][kN][4], const Smem& smem, const BackwardParams& p,
                                                    int query0, int key0, Bias bias) {
    const int first_row = threadIdx.x / 32 * 16;
    float s[1][kN][4];
    set_zero(s);
    multiply_rows<Operand, kPlanes, kHeadDim>(s, RowsReader<QueryTile>(smem.q, first_row, 0),
                                              ChunksReader<KeyTile>(smem.k, 0, 0));
    set_zero(ds);
    multiply_rows<Operand, kPlanes, kHeadDim>(ds, RowsReader<QueryTile>(smem.dout, first_row, 0),
                                              ChunksReader<KeyTile>(smem.v, 0, 0));
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = row_of(half);
      const QueryRow factors = query_row(smem.query_rows, row);
      const int last_key = p.causal ? query0 + row + p.num_keys - p.num_queries : p.num_keys;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int column = column_of(n, c), key = key0 + column;
          float shift = factors.shift;
          if constexpr (Traits::kHasBias) shift += bias(half, n, c);
          const float score = s[0][n][2 * half + c] * smem.keys[column].factor;
          const bool visible = smem.keys[column].visible && key <= last_key;
          const float p_ij = visible ? ptx::exp2_approx(fmaf(score, factors.score, shift)) : 0.0f;
          float& x = ds[0][n][2 * half + c];
          x = p_ij * fmaf(x, factors.gradient, factors.offset);
        }
      }
    }
  }

  // Where fragment element (half, n, c) of this thread lies in the tile.
  static __device__ __forceinline__ int row_of(int half) {
    return threadIdx.x / 32 * 16 + 8 * half + threadIdx.x % 32 / 4;
  }
  static __device__ __forceinline__ int column_of(int n, int c) { return 8 * n + threadIdx.x % 4 * 2 + c; }

  // Key blocks that some of kQueries queries from query0 on can see: [0, this).
  static __device__ __forceinline__ int num_key_blocks(const BackwardParams& p, int query0) {
    const int last_query = min(query0 + kQueries, p.num_queries) - 1;
    const int num_keys = p.causal ? min(p.num_keys, last_query + p.num_keys - p.num_queries + 1) : p.num_keys;
    return num_keys <= 0 ? 0 : ceil_div(num_keys, kKeys);
  }
};

}  // namespace fcsa::sm80
