// Tile sizes of the backward kernels, and what they are instantiated over.
//
// The main kernel owns kBlockK keys and walks over blocks of kBlockQ queries. A warp owns kKeysPerWarp keys; kSplit
// warps share the same keys, and each of them computes the scores of kBlockQ / kSplit queries and owns 1 / kSplit of
// the columns of dk and dv. With kSplit = 1 P^T and dS^T go from accumulators to operands without leaving registers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../common/backward_preprocess.cuh"

namespace fcsa::sm80 {

constexpr int kSmallSharedMemory = 99 * 1024;  // of a block, on compute capability 8.6, 8.9 and 12.0

struct BackwardTile {
  int block_q, block_k, keys_per_warp, split, stages, chunk_q, dq_warps_n, min_blocks;
};

// The accumulators of dk and dv, 2 * keys_per_warp * head_dim / split / 32 registers, decide: 128 is what fits beside
// the scores. min_blocks is what registers and shared memory allow on an A100 or H100.
constexpr BackwardTile backward_tile(int head_dim) {
  switch (head_dim) {
    case 32: return {64, 128, 32, 1, 2, 32, 2, 2};
    case 64: return {64, 128, 32, 1, 2, 32, 2, 2};
    case 96: return {64, 128, 32, 2, 2, 32, 2, 1};
    case 128: return {64, 128, 32, 2, 2, 32, 4, 1};
    case 192: return {64, 64, 32, 4, 1, 16, 4, 1};
    default: return {64, 64, 32, 4, 1, 16, 4, 1};
  }
}

// For devices whose blocks have 99 KB of shared memory (compute capability 8.6, 8.9, 12.0).
constexpr BackwardTile small_backward_tile(int head_dim) {
  switch (head_dim) {
    case 96: return {64, 64, 32, 2, 2, 32, 2, 1};
    case 128: return {32, 64, 32, 2, 2, 16, 4, 1};
    case 192: return {32, 32, 16, 2, 1, 16, 4, 1};
    case 256: return {32, 32, 16, 2, 1, 16, 4, 1};
    default: return backward_tile(head_dim);
  }
}

// float32 by hi and lo: twice the operands in shared memory. One stage, so that two blocks of threads share a
// multiprocessor up to head dim 64. There 16 keys a warp and nothing exchanged: 109 TFLOP/s, against 108 with 32 keys
// shared by two warps and 106 with chunks of 16 queries (H200, 8k). Head dim 128 with 16 keys a warp: 89 against 86,
// but 260 bytes of spills.
constexpr BackwardTile split_backward_tile(int head_dim) {
  switch (head_dim) {
    case 32: return {64, 128, 32, 1, 2, 16, 2, 2};
    case 64: return {64, 64, 16, 1, 1, 32, 2, 2};
    case 96: return {64, 64, 16, 2, 1, 32, 2, 1};
    default: return {64, 64, 32, 4, 1, 16, 4, 1};
  }
}

constexpr BackwardTile small_split_backward_tile(int head_dim) {
  switch (head_dim) {
    case 96: return {32, 64, 32, 2, 1, 16, 2, 1};
    case 128: return {32, 32, 16, 2, 1, 16, 4, 1};
    default: return split_backward_tile(head_dim);
  }
}

// kToeplitz: the bias depends on key - query alone.
template <class Element_, int kHeadDim_, bool kHasBias_, bool kToeplitz_ = false>
struct BackwardTraits {
  using Element = std::conditional_t<std::is_same_v<Element_, Tf32>, float, Element_>;  // of the tensors
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kHasBias = kHasBias_;
  static constexpr bool kToeplitz = kToeplitz_;
  static_assert(kHasBias || !kToeplitz);
  static constexpr bool kFloat = std::is_same_v<Element, float>;       // multiplied as halves, from copies
  static constexpr int kPlanes = std::is_same_v<Element_, float> ? 2 : 1;  // hi and lo, in three products
  using Operand = std::conditional_t<kFloat, __half, Element>;         // of the matrix products
  // dS * q_rnorm * k_rnorm keeps the range of bf16. Of half it does not: there q and k are copied, times the power of
  // two in their rnorm, and what is folded lies in [1, 2). The scores are then as exact as the forward's, whose lse
  // they meet.
  static constexpr bool kExactCopies = std::is_same_v<Element, __half>;
  static constexpr bool kFoldsNorm = !kFloat;
  static constexpr bool kScaleInKeys = false;
  static constexpr float kUnit = kPlanes == 2 ? kUnitScale : 1.0f;  // length of a unit copy
  // P as halves is multiplied by this, so that small probabilities keep their bits.
  static constexpr float kLog2ProbabilityScale = kFloat ? 15.0f : 0.0f;
  static constexpr float kProbabilityScale = kFloat ? 32768.0f : 1.0f;
};

// kAll: dq, dk and dv are all wanted and no head of scale 0 has to be skipped, so that no branch parts the products.
template <class Traits, bool kSmall, bool kAll_>
struct BackwardConfig : Traits {
  static constexpr bool kAll = kAll_;
  // A bias tile comes with the queries' by cp.async; else a bias is read element by element (`bias_can_be_staged`).
  static constexpr bool kStagedBias = kAll && Traits::kHasBias && !Traits::kToeplitz && !Traits::kFloat;
  using typename Traits::Element;
  using Traits::kHeadDim;
  using Traits::kPlanes;
  static constexpr BackwardTile kTile =
      kPlanes == 2 ? (kSmall ? small_split_backward_tile(kHeadDim) : split_backward_tile(kHeadDim))
                   : (kSmall ? small_backward_tile(kHeadDim) : backward_tile(kHeadDim));
  static constexpr int kBlockQ = kTile.block_q;
  static constexpr int kBlockK = kTile.block_k;
  static constexpr int kKeysPerWarp = kTile.keys_per_warp;
  static constexpr int kSplit = kTile.split;
  static constexpr int kStages = kTile.stages;
  static constexpr int kChunkQ = kTile.chunk_q;  // queries whose scores a warp holds at a time
  static constexpr int kMinBlocks = kTile.min_blocks;

  static constexpr int kKeyWarps = kBlockK / kKeysPerWarp;
  static constexpr int kWarps = kKeyWarps * kSplit;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kPartQ = kBlockQ / kSplit;        // queries whose scores a warp computes
  static constexpr int kKeyTiles = kKeysPerWarp / 16;    // m16 tiles of a warp's keys
  static constexpr int kColumnPairs = kHeadDim / kSplit / 16;  // pairs of n8 tiles of a warp's columns of dk, dv

  // dq of a query block: warps in a grid over queries x head dim, 16-column groups dealt out in turn.
  static constexpr int kDqWarpsN = kTile.dq_warps_n;
  static constexpr int kDqWarpsM = kWarps / kDqWarpsN;
  static constexpr int kDqRowTiles = kBlockQ / kDqWarpsM / 16;
  static constexpr int kDqColumnPairs = kHeadDim / kDqWarpsN / 16;

  static_assert(kPartQ % kChunkQ == 0 && kChunkQ % 16 == 0);
  static_assert(kHeadDim % (16 * kSplit) == 0 && kHeadDim % (16 * kDqWarpsN) == 0);
  static_assert(kDqRowTiles * 16 * kDqWarpsM == kBlockQ && kSplit <= 4 && kDqWarpsN <= 4);
  static_assert(kQueryPadding % kBlockQ == 0);
};

}  // namespace fcsa::sm80
