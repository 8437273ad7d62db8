// The first launch of a backward: all that its main kernel needs before it starts, in one grid.
//
//   blocks of queries   query_rows (with delta = rowsum(dout out) - dlse), zeros in dq_accum and dq_progress, the copy of q
//   blocks of keys      the copy of k, where there are copies
//
// Copies are multiplied by the rnorm that the forward has written. float32: copies come before, by kernels of their own.
#pragma once

#include "backward_copies.cuh"
#include "backward_preprocess.cuh"
#include "launch.cuh"
#include "reduce.cuh"
#include "vectorized.cuh"

namespace fcsa::backward {

constexpr int kPrologueThreads = 256;

// A lane takes eight columns of two neighbouring rows, whose records lie together in query_rows.
template <class Traits>
struct PrologueBlock {
  static constexpr int kLanesPerRow =
      Traits::kHeadDim <= 32 ? 4 : Traits::kHeadDim <= 64 ? 8 : Traits::kHeadDim <= 128 ? 16 : 32;
  static constexpr int kRows = kPrologueThreads / kLanesPerRow * 2;
  static_assert(kQueryPadding % kRows == 0);
  __device__ static __forceinline__ int lane() { return threadIdx.x % kLanesPerRow; }
  __device__ static __forceinline__ int row() { return threadIdx.x / kLanesPerRow * 2; }  // the first of the two
};

// Eight elements of a row as they lie in memory, so that many loads are under way before the first value is needed.
template <class Element>
struct RawEight {
  alignas(16) Element x[8];

  __device__ __forceinline__ void load(const Element* source) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x) / 16); ++i) {
      reinterpret_cast<uint4*>(x)[i] = reinterpret_cast<const uint4*>(source)[i];
    }
  }
};

// Both rows of the pair that begins at `row` of a (b0, b1, head) of a tensor; rows that do not exist stay as they are.
template <class Element>
__device__ __forceinline__ void load_pair(RawEight<Element> (&pair)[2], const void* data, int64_t offset,
                                          const Strides& strides, int row, int num_rows, int column) {
  const Element* source = static_cast<const Element*>(data) + offset + row * strides.row + column;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r < num_rows) pair[r].load(source + r * strides.row);
  }
}

// The copy of a pair. rnorm: (rows, groups), target: (rows, d), both of the pair's first row.
template <class Traits>
__device__ __forceinline__ void store_copies(const RawEight<typename Traits::Element> (&pair)[2], const Problem& p,
                                             const float* rnorm, typename Traits::Element* target, int num_rows,
                                             int column) {
  const int chunk = p.head_dim / p.groups;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if (r >= num_rows) break;
    float x[8];
    load8(x, pair[r].x);
    if (p.groups == 1) {
      const float factor = Traits::kExactCopies ? power_of_two(rnorm[r]) : rnorm[r];
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] *= factor;
    } else {
#pragma unroll
      for (int c = 0; c < 8; ++c) x[c] *= rnorm[r * p.groups + (column + c) / chunk];
    }
    store8(target + r * p.head_dim + column, x);
  }
}

// row: of the queries of `head`, one that exists. product: sum_c dout_c out_c.
template <class Traits>
__device__ __forceinline__ QueryRow make_query_row(const BackwardParams& p, const TileIndex& head, int row, float product) {
  const int64_t source = head.first_row(p.b1, p.heads, p.num_queries) + row;
  const float lse = p.lse[source], rnorm = norm_is_folded<Traits>(p) ? folded_factor<Traits>(p.q_rnorm[source]) : 1.0f;
  const float delta = p.dlse != nullptr ? product - p.dlse[source] : product;
  if (lse == -INFINITY) return {0.0f, -INFINITY, 0.0f, 0.0f};
  const OperandScales scales = scales_of<Traits>(p, kv_head_of(p, head));
  const float factor = rnorm * row_scale(p, head.head) * (scales.ds / Traits::kProbabilityScale);
  const float score = head_scale(p, head.head) * rnorm * kLog2e / (Traits::kUnit * Traits::kUnit);
  const float shift = Traits::kLog2ProbabilityScale - lse * kLog2e;
  return {score, shift, factor / scales.dout / scales.v, Traits::kScaleInKeys ? -delta : -delta * factor};
}

// Two neighbouring rows, as QueryRow describes it.
template <class Traits>
__device__ __forceinline__ void store_query_rows(float4* target, const QueryRow& a, const QueryRow& b) {
  if constexpr (Traits::kScaleInKeys) {
    target[0] = make_float4(a.gradient, b.gradient, a.shift, b.shift);
    target[1] = make_float4(a.offset, b.offset, 0.0f, 0.0f);
  } else {
    target[0] = make_float4(a.score, b.score, a.shift, b.shift);
    target[1] = make_float4(a.gradient, b.gradient, a.offset, b.offset);
  }
}

// Zeros in what the main kernel adds to. padded_row: of the pair, among the rows of the workspaces.
template <class Traits>
__device__ __forceinline__ void clear_accumulators(const BackwardParams& p, int64_t padded_row, int64_t num_threads) {
  using Block = PrologueBlock<Traits>;
  constexpr int kFloat4s = Traits::kHeadDim / 4 * 2;  // of two rows
  if (p.dq_accum != nullptr) {
    float4* target = reinterpret_cast<float4*>(p.dq_accum + padded_row * Traits::kHeadDim);
#pragma unroll
    for (int i = 0; i < ceil_div(kFloat4s, Block::kLanesPerRow); ++i) {
      const int at = i * Block::kLanesPerRow + Block::lane();
      if (at < kFloat4s) target[at] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
  }
  if (p.dq_progress != nullptr) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kPrologueThreads + threadIdx.x; i < num_progress_words(p);
         i += num_threads) {
      p.dq_progress[i] = 0;
    }
  }
}

template <class Traits>
__device__ __forceinline__ void prepare_queries(const BackwardParams& p, int block, int64_t num_threads) {
  using Element = typename Traits::Element;
  using Block = PrologueBlock<Traits>;
  const int padded = padded_queries(p.num_queries);
  const TileIndex head = TileIndex::from_block(block, padded / Block::kRows, p.heads, p.b1);
  const int row = head.tile * Block::kRows + Block::row(), lane = Block::lane(), column = lane * 8;
  const int num_rows = column < p.head_dim ? min(p.num_queries - row, 2) : 0;  // that this lane loads
  const bool copies = !Traits::kFloat && p.q_unit != nullptr;
  RawEight<Element> dout[2], out[2], q[2];
  load_pair(dout, p.dout, head.offset(p.dout_strides), p.dout_strides, row, num_rows, column);
  load_pair(out, p.out, head.offset(p.out_strides), p.out_strides, row, num_rows, column);
  if (copies) load_pair(q, p.q, head.offset(p.q_strides), p.q_strides, row, num_rows, column);
  const int64_t padded_row = head.first_row(p.b1, p.heads, padded) + row;
  clear_accumulators<Traits>(p, padded_row, num_threads);

  QueryRow rows[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float product = 0.0f;
    if (r < num_rows) {
      float x[8], y[8];
      load8(x, dout[r].x);
      load8(y, out[r].x);
#pragma unroll
      for (int c = 0; c < 8; ++c) product += x[c] * y[c];
    }
    product = lane_sum<Block::kLanesPerRow>(product);
    rows[r] = {0.0f, -INFINITY, 0.0f, 0.0f};
    if (row + r < p.num_queries) rows[r] = make_query_row<Traits>(p, head, row + r, product);
  }
  if (lane == 0) store_query_rows<Traits>(p.query_rows + padded_row, rows[0], rows[1]);
  if (copies) {
    const int64_t first = head.first_row(p.b1, p.heads, p.num_queries) + row;
    store_copies<Traits>(q, p, p.q_rnorm + first * p.groups, static_cast<Element*>(p.q_unit) + first * p.head_dim, num_rows,
                         column);
  }
}

template <class Traits>
__device__ __forceinline__ void copy_keys(const BackwardParams& p, int block) {
  using Element = typename Traits::Element;
  using Block = PrologueBlock<Traits>;
  const TileIndex head = TileIndex::from_block(block, ceil_div(p.num_keys, Block::kRows), p.kv_heads, p.b1);
  const int row = head.tile * Block::kRows + Block::row(), column = Block::lane() * 8;
  const int num_rows = column < p.head_dim ? min(p.num_keys - row, 2) : 0;
  RawEight<Element> k[2];
  load_pair(k, p.k, head.offset(p.k_strides), p.k_strides, row, num_rows, column);
  const int64_t first = head.first_row(p.b1, p.kv_heads, p.num_keys) + row;
  store_copies<Traits>(k, p, p.k_rnorm + first * p.groups, static_cast<Element*>(p.k_unit) + first * p.head_dim, num_rows,
                       column);
}

// The next kernel may start at once: what it reads of this one's results it reads after wait_for_prologue().
template <class Traits>
__global__ void __launch_bounds__(kPrologueThreads)
    prologue_kernel(const __grid_constant__ BackwardParams p, int num_query_blocks) {
  let_next_kernel_start();
  const int block = static_cast<int>(blockIdx.x);
  if (block < num_query_blocks) {
    prepare_queries<Traits>(p, block, static_cast<int64_t>(num_query_blocks) * kPrologueThreads);
  } else if constexpr (!Traits::kFloat) {
    copy_keys<Traits>(p, block - num_query_blocks);
  }
}

template <class Traits>
cudaError_t launch_prologue(const BackwardParams& p, cudaStream_t stream) {
  using Block = PrologueBlock<Traits>;
  const bool copies = p.q_unit != nullptr;
  if constexpr (Traits::kFloat) {
    if (const cudaError_t error = launch_copies<Traits>(p, stream); error != cudaSuccess) return error;
  } else {
    const bool needs_copies = p.l2norm_qk && (Traits::kExactCopies || p.groups > 1);
    if (copies != (p.k_unit != nullptr) || (copies ? !p.l2norm_qk : needs_copies)) return cudaErrorInvalidValue;
  }
  const int64_t query_blocks = static_cast<int64_t>(padded_queries(p.num_queries) / Block::kRows) * p.heads * p.b1 * p.b0;
  const int64_t key_blocks = Traits::kFloat || !copies
                                 ? 0
                                 : static_cast<int64_t>(ceil_div(p.num_keys, Block::kRows)) * p.kv_heads * p.b1 * p.b0;
  if (query_blocks == 0) return cudaSuccess;
  if (query_blocks + key_blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  prologue_kernel<Traits><<<static_cast<uint32_t>(query_blocks + key_blocks), kPrologueThreads, 0, stream>>>(
      p, static_cast<int>(query_blocks));
  return cudaGetLastError();
}

}  // namespace fcsa::backward
