// Tile shapes of the forward kernel, each with its reason, and the compile-time constants that follow from them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "../common/softmax.cuh"
#include "../norm/split.cuh"

namespace fcsa::sm80 {

// kToeplitz: there is a bias, and it depends on key - query alone.
template <class Element_, int kHeadDim_, Softmax kSoftmax_, bool kToeplitz_ = false>
struct ForwardTraits {
  using Element = std::conditional_t<std::is_same_v<Element_, Tf32>, float, Element_>;  // of q, k, v and out
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Softmax kSoftmax = kSoftmax_;
  static constexpr bool kToeplitz = kToeplitz_;
  static constexpr bool kFloat = std::is_same_v<Element, float>;   // multiplied as halves, from copies (norm/split.cuh)
  static constexpr bool kSplit = std::is_same_v<Element_, float>;  // as hi and lo, in three products
  using Operand = std::conditional_t<kFloat, __half, Element>;     // of the matrix products
  static_assert(!kFloat || kSoftmax == Softmax::kRunningMax, "P as halves needs a row's maximum to use their range");
};

struct ForwardTile {
  int block_m;  // queries a block
  int block_n;  // keys a tile
  int chunk_n;  // keys whose scores are in registers at a time
  int warps;    // each owns block_m / warps queries
  int stages;   // K/V tiles in shared memory, one of them on its way
  bool query_in_registers;
  int min_blocks;  // a multiprocessor; caps the registers
};

// A warp owns 32 queries wherever the output accumulators (32 x head dim / 32 registers) leave room for the rest: a
// fragment of k or v then serves two products per load. Figures: H200, bf16, 4k keys, TFLOP/s (docs/decisions.md).
// No shape needs more than 73 KB, so that every device from compute capability 8.0 on runs the same kernel, and those
// with 164 KB a multiprocessor or more run two blocks at once. Spills, where they remain, are of values that the products
// do not touch (variants.py).
constexpr ForwardTile forward_tile(int head_dim, Softmax softmax) {
  const bool bounded = softmax == Softmax::kBounded;
  if (head_dim <= 32) return {128, 64, 32, 4, 2, true, bounded ? 3 : 2};
  // Bounded: three blocks of 168 registers hide more latency than two, 311 against 299. With a maximum to follow, fewer
  // and larger chunks: 290 against 274.
  if (head_dim <= 64) return {128, 64, bounded ? 32 : 64, 4, 2, true, bounded ? 3 : 2};
  // Bounded at 128: chunks of 16 leave registers for the queries, 356 against 349 with queries read from shared memory
  // every tile. A maximum or a bias takes those registers back, and 32-key tiles make room for the queries in shared
  // memory, nearly without spills.
  if (head_dim <= 96) return {128, bounded ? 64 : 32, 32, 4, 2, false, 2};
  if (head_dim <= 128 && bounded) return {128, 64, 16, 4, 2, true, 2};
  if (head_dim <= 128) return {128, 32, 32, 4, 2, false, 2};
  if (head_dim <= 192) return {64, 32, 32, 4, 2, true, 2};
  return {64, 32, 16, 4, 2, true, 2};
}

// Twice the operands. Up to head dim 64 queries in shared memory and 32-key tiles: 120 against 115 with spilling queries
// in registers; beyond, 16 queries a warp (head dim 128: 118).
constexpr ForwardTile split_forward_tile(int head_dim) {
  if (head_dim <= 64) return {128, 32, 32, 4, 2, false, 2};
  return {64, 32, 32, 4, 2, true, 2};
}

template <class Traits>
struct ForwardConfig : Traits {
  using Traits::kHeadDim;
#ifdef FCSA_FORWARD_TILE  // a shape under measurement
  static constexpr ForwardTile kTile = {FCSA_FORWARD_TILE};
#else
  static constexpr ForwardTile kTile =
      Traits::kSplit ? split_forward_tile(kHeadDim) : forward_tile(kHeadDim, Traits::kSoftmax);
#endif
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kChunkN = kTile.chunk_n;
  static constexpr int kStages = kTile.stages;
  static constexpr bool kQueryInRegisters = kTile.query_in_registers;
  static constexpr int kParts = Traits::kSplit ? 2 : 1;  // hi, lo
  static constexpr int kThreads = kTile.warps * 32;
  static constexpr int kRowsPerWarp = kBlockM / kTile.warps;
  static constexpr int kRowTiles = kRowsPerWarp / 16;  // mma tiles of 16 queries a warp
  static constexpr int kDepthSteps = kHeadDim / 16;    // k steps of q . k
  static constexpr int kChunks = kBlockN / kChunkN;
  static constexpr int kScoreTiles = kChunkN / 8;   // mma tiles of 8 keys a chunk
  static constexpr int kValueTiles = kHeadDim / 8;  // mma tiles of 8 output columns
  static_assert(kRowsPerWarp % 16 == 0 && kBlockN % kChunkN == 0 && kChunkN % 16 == 0 && kBlockN <= kThreads);
};

}  // namespace fcsa::sm80
