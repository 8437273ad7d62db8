// Which pairs (query, key) are visible. Causal is aligned to the bottom right: key j is visible to query i iff
// j <= i + (num_keys - num_queries). The key mask and the end of the keys come as one bit a key.
#pragma once

#include "../params.h"
#include "tile_index.cuh"

namespace fcsa {

// The key mask of a batch row, or nullptr.
__device__ __forceinline__ const uint8_t* mask_row(const Problem& p, const TileIndex& index) {
  return p.mask == nullptr ? nullptr : p.mask + index.b0 * p.mask_b0 + index.b1 * p.mask_b1;
}

// The keys of one tile, the same in every lane: bit c of words[w] is key 32 * w + c of the tile.
template <int kBlockN>
struct KeyBits {
  static_assert(kBlockN % 32 == 0);
  static constexpr int kWords = kBlockN / 32;
  uint32_t words[kWords];

  __device__ __forceinline__ bool all() const {
    uint32_t common = words[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) common &= words[w];
    return common == 0xffffffffu;
  }

  __device__ __forceinline__ bool none() const {
    uint32_t any = words[0];
#pragma unroll
    for (int w = 1; w < kWords; ++w) any |= words[w];
    return any == 0;
  }

  // Key first + offset; `first` a compile-time multiple of 32, or offset so small that no 32 keys are left.
  __device__ __forceinline__ bool visible(int first, int offset) const {
    return words[first / 32] >> (first % 32 + offset) & 1;
  }
};

// Reads the bits of a tile in two steps, so that the latency of the mask's bytes passes behind other work.
template <int kBlockN>
class KeyMask {
 public:
  __device__ __forceinline__ KeyMask(const Problem& p, const TileIndex& index)
      : mask_(p.mask == nullptr ? nullptr : p.mask + index.b0 * p.mask_b0 + index.b1 * p.mask_b1),
        stride_(p.mask_key),
        num_keys_(p.num_keys) {}

  __device__ __forceinline__ void prefetch(int tile) {
#pragma unroll
    for (int w = 0; w < KeyBits<kBlockN>::kWords; ++w) {
      const int key = tile * kBlockN + w * 32 + threadIdx.x % 32;
      own_[w] = key < num_keys_;
      if (mask_ != nullptr && key < num_keys_) own_[w] = mask_[key * stride_];
    }
  }

  // The first tile from `tile` on, which is prefetched, that has a visible key, and its bits; its successor is
  // prefetched. num_tiles or more: there is none.
  __device__ __forceinline__ int next_visible(int tile, int num_tiles, KeyBits<kBlockN>& bits) {
    bits = this->bits();
    prefetch(tile + 1);
#pragma unroll 1
    while (tile < num_tiles && bits.none()) {
      bits = this->bits();
      prefetch(++tile + 1);
    }
    return tile;
  }

  __device__ __forceinline__ KeyBits<kBlockN> bits() const {  // of the tile prefetched last
    KeyBits<kBlockN> result;
#pragma unroll
    for (int w = 0; w < KeyBits<kBlockN>::kWords; ++w) result.words[w] = __ballot_sync(0xffffffffu, own_[w] != 0);
    return result;
  }

 private:
  const uint8_t* mask_;
  int64_t stride_;
  int num_keys_;
  uint32_t own_[KeyBits<kBlockN>::kWords];
};

// The keys that a block of queries has to visit, in tiles of kBlockN.
struct KeyRange {
  int num_tiles;    // tiles [0, num_tiles) hold every visible key of the block
  int first_limit;  // keys up to this one are visible to every query of the block, as far as causality goes

  template <int kBlockM, int kBlockN>
  __device__ static KeyRange of_queries(const Problem& p, int first_query) {
    KeyRange range{ceil_div(p.num_keys, kBlockN), p.num_keys - 1};
    if (!p.causal) return range;
    const int offset = p.num_keys - p.num_queries;
    const int last_key = min(first_query + kBlockM, p.num_queries) - 1 + offset;
    range.first_limit = min(first_query + offset, p.num_keys - 1);
    range.num_tiles = last_key < 0 ? 0 : min(range.num_tiles, last_key / kBlockN + 1);
    return range;
  }
};

}  // namespace fcsa
