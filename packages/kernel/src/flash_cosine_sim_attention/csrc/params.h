// What the host hands to a launcher: plain structs, no torch. Shapes stand beside the pointers; strides count elements.
//
//   b0, b1  batch dims (two, so that a bias can be shared over one of them)
//   h, hk   query heads, kv heads; query head a reads kv head a / (h / hk)
//   i, j    queries, keys          d   head dim, the same for q, k, v on the CUDA paths; a multiple of 8
//
// Formulas and symbols: docs/math.md. One launcher call runs a whole pass, prologue and epilogue kernels included.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace fcsa {

// Of a (b0, b1, heads, rows, d) tensor whose last dim is contiguous and whose rows start on 16-byte boundaries.
// 0 where expanded.
struct Strides {
  int64_t b0, b1, head, row;
};

struct Problem {
  int32_t b0, b1, heads, kv_heads, num_queries, num_keys, head_dim, groups;
  bool causal;     // key j is visible to query i iff j <= i + (num_keys - num_queries)
  bool l2norm_qk;  // false: q and k come with unit norm per group, and no norm factor is applied anywhere

  const void* q;  // (b0, b1, h, i, d)
  Strides q_strides;
  const void* k;  // (b0, b1, hk, j, d)
  Strides k_strides;
  const void* v;  // (b0, b1, hk, j, d)
  Strides v_strides;

  const uint8_t* mask;  // (b0, b1, j), 1 = attend; nullptr: all keys
  int64_t mask_b0, mask_b1, mask_key;

  const void* bias;  // (b0, b1, h, i, j); stride 0 where broadcast; nullptr: none
  // Variants "toeplitz": float32 by diagonals, (b0, b1, h, i + j - 1), the pointer at entry i - 1, strides -1 and 1.
  int64_t bias_b0, bias_b1, bias_head, bias_query, bias_key;
  bool bias_is_float32;  // else the dtype of q
  void* packed_bias;     // workspace of a bias that many rows share (sm80/packed_bias.cuh), or nullptr
  bool pair_kernels;     // the call is one for the kernels of sm80/pair_*.cuh, and packed_bias is given

  const float* scale;  // (h,) on the device: learned; nullptr: scale_value holds
  float scale_value;

  // Workspaces for normalised copies of q and k, contiguous (b0, b1, h, i, d) and (b0, b1, hk, j, d), dtype of q.
  // Given where the norm is not folded into fp32 factors (groups > 1, or a kernel that wants it so); else nullptr.
  // float32: always given, and holds split copies (norm/split.cuh) in the same number of bytes.
  void* q_unit;
  void* k_unit;
};

struct ForwardParams : Problem {
  void* out;  // (b0, b1, h, i, d)
  Strides out_strides;
  float* lse;      // (b0, b1, h, i) contiguous: natural log; -inf where no key is visible
  float* q_rnorm;  // (b0, b1, h, i, groups) contiguous: 1 / max(|q|_group, 1e-12); nullptr unless l2norm_qk
  float* k_rnorm;  // (b0, b1, hk, j, groups)
  float bound;     // B with |logit| <= B where the softmax is bounded; unused by the running maximum

  // Workspaces of float32: v in split form, (b0, b1, hk, j, d) float's worth of bytes, and max |v|, (b0, b1, hk).
  void* v_split;
  float* v_largest;

  // Workspace of sm90, uninitialised: the next block of queries that a persistent thread block takes.
  uint32_t* next_item;
};

struct BackwardParams : Problem {
  const void* dout;  // (b0, b1, h, i, d)
  Strides dout_strides;
  const void* out;  // (b0, b1, h, i, d)
  Strides out_strides;
  const float* dlse;     // (b0, b1, h, i) contiguous, or nullptr
  const float* lse;      // (b0, b1, h, i) contiguous
  const float* q_rnorm;  // as in ForwardParams, from the forward
  const float* k_rnorm;

  // Results; nullptr where no gradient is wanted.
  void* dq;  // (b0, b1, h, i, d)
  Strides dq_strides;
  void* dk;  // (b0, b1, hk, j, d)
  Strides dk_strides;
  void* dv;  // (b0, b1, hk, j, d)
  Strides dv_strides;
  void* dbias;  // dtype of bias; summed over every dim whose stride here is 0; toeplitz: (b0, b1, h, i + j - 1)
  int64_t dbias_b0, dbias_b1, dbias_head, dbias_query, dbias_key;
  float* dscale_rows;  // (b0, b1, h, i) contiguous: sum_j dS_ij cos_ij; the host sums it to (h,)

  // Workspaces; rows: i rounded up to a multiple of 128; columns: d rounded up to the variant's kHeadDim. Uninitialised.
  float4* query_rows;  // (b0, b1, h, rows) contiguous: common/backward_preprocess.cuh
  float* dq_accum;     // (b0, b1, h, rows, columns) floats; nullptr where dq is not wanted, or made without it
  // Of sm90, deterministic: (b0, b1, hk, j / 128 rounded up, 2), sm90/backward_order.cuh; else nullptr.
  uint32_t* dq_progress;

  // Workspaces of float32, copies as halves (norm/split.cuh): v (b0, b1, hk, j, d) and dout (b0, b1, h, i, d) float's
  // worth of bytes, max |v| (b0, b1, hk), and max |dout| and max |dlse| over the queries of a kv head, (2, b0, b1, hk).
  void* v_split;
  float* v_largest;
  void* dout_split;
  float* dout_largest;

  // Workspace for sums over parts of what shares the bias (sm80/backward_dbias.cuh): dbias_parts_size floats, 0: none.
  float* dbias_parts;
  int64_t dbias_parts_size;

  bool deterministic;  // bit-equal results from run to run: no atomics
};

// Every launcher: enqueues on `stream`, never synchronises, returns the first CUDA error.
using ForwardLauncher = cudaError_t (*)(const ForwardParams&, cudaStream_t);
using BackwardLauncher = cudaError_t (*)(const BackwardParams&, cudaStream_t);

}  // namespace fcsa
