// Tile shapes of the forward kernel, each with its reason, and the compile-time constants that follow from them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../common/softmax.cuh"

namespace fcsa::sm80 {

struct ForwardTile {
  int block_m;  // queries a block
  int block_n;  // keys a tile
  int chunk_n;  // keys whose scores are in registers at a time
  int warps;    // each owns block_m / warps queries
  int stages;   // K/V tiles in shared memory, one of them on its way
  bool query_in_registers;
  bool overlap;  // the next chunk's products are issued before this chunk's exponentials
  int min_blocks;
};

constexpr ForwardTile forward_tile(int head_dim, Softmax softmax) {
  const bool bounded = softmax == Softmax::kBounded;
  if (head_dim <= 32) return {128, 64, 64, 4, 2, true, false, 3};
  if (head_dim <= 64) return {128, 64, bounded ? 32 : 64, 4, 2, true, false, 2};
  if (head_dim <= 96) return {128, 64, 32, 4, 2, true, false, 2};
  if (head_dim <= 128) return {128, 64, bounded ? 16 : 32, 4, 2, bounded, false, 2};
  if (head_dim <= 192) return {64, 32, 32, 4, 2, true, false, 2};
  return {64, 32, 16, 4, 2, true, false, 2};
}

template <class Element_, int kHeadDim_, Softmax kSoftmax_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Softmax kSoftmax = kSoftmax_;
#ifdef FCSA_FORWARD_TILE  // a tile shape under measurement: -DFCSA_FORWARD_TILE=128,64,32,4,2,true,false,2
  static constexpr ForwardTile kTile = {FCSA_FORWARD_TILE};
#else
  static constexpr ForwardTile kTile = forward_tile(kHeadDim, kSoftmax);
#endif
  static constexpr int kBlockM = kTile.block_m;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kChunkN = kTile.chunk_n;
  static constexpr int kStages = kTile.stages;
  static constexpr bool kQueryInRegisters = kTile.query_in_registers;
  static constexpr bool kOverlap = kTile.overlap;
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
