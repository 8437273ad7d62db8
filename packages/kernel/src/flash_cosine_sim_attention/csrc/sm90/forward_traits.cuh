// Everything that the stages of the Hopper forward share: sizes, the shared-memory plan, the walk over tiles.
#pragma once

#include "../common/softmax.cuh"
#include "../common/tile_index.cuh"
#include "pipeline.cuh"
#include "smem_panel.cuh"
#include "tensor_map.h"
#include "tile_config.h"

namespace fcsa::sm90 {

template <class Element_, int kHeadDim_, Softmax kSoftmax_>
struct ForwardTraits {
  using Element = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Softmax kSoftmax = kSoftmax_;
  static constexpr ForwardTile kTile = forward_tile<kHeadDim>();
  static constexpr int kConsumerWarps = kTile.consumer_warpgroups * 4;
  static constexpr int kBlockM = kTile.consumer_warpgroups * 64;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  // Factors of a tile of keys are read until its product with V: they live longer than K (forward_producer.cuh).
  static constexpr int kFactorStages = 2 * kStages;
  static constexpr int kThreads = (kTile.consumer_warpgroups + 1) * 128;

  // setmaxnreg moves registers within what the block was launched with; asking for more waits for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kTile.consumer_registers * kTile.consumer_warpgroups + kTile.producer_registers <=
                kLaunchRegisters * (kTile.consumer_warpgroups + 1));

  using QueryTile = PanelTile<Element, kBlockM, kHeadDim>;
  using KeyTile = PanelTile<Element, kBlockN, kHeadDim>;
};

template <class Traits>
struct ForwardStorage {
  typename Traits::QueryTile q;
  typename Traits::KeyTile k[Traits::kStages];
  typename Traits::KeyTile v[Traits::kStages];
  float k_factor[Traits::kFactorStages][Traits::kBlockN];
  uint64_t full_q, empty_q;
  uint64_t full_k[Traits::kStages], empty_k[Traits::kStages];
  uint64_t full_v[Traits::kStages], empty_v[Traits::kStages];
};

struct ForwardMaps {
  TensorMap q, k, v;
};

// The blocks of queries of the whole problem in the order in which they are handed out, round-robin, to the persistent
// thread blocks. Heads are taken in sections whose keys and values fit the L2 cache together; within a section the blocks
// with most keys come first (causal), so that the last ones to finish are short.
struct Schedule {
  int num_blocks;         // of queries, a head
  int num_heads;          // heads * b1 * b0
  int heads_per_section;
  int64_t num_items;      // num_blocks * num_heads

  struct Item {
    int block, head;
  };

  __device__ __forceinline__ Item item(uint32_t index) const {
    const uint32_t section_items = static_cast<uint32_t>(heads_per_section) * num_blocks;
    const uint32_t section = index / section_items, within = index % section_items;
    const int first_head = section * heads_per_section;
    const int heads = min(heads_per_section, num_heads - first_head);
    return {num_blocks - 1 - static_cast<int>(within / heads), first_head + static_cast<int>(within % heads)};
  }
};

// What a block of queries has to do: its place, and the tiles of keys [0, num_tiles), walked from the last to the first,
// so that the tiles that need a mask come first.
template <class Traits>
struct BlockOfQueries {
  int first_query, head, b1, b0, num_tiles;
  int first_limit;  // keys up to this one are visible to every query of the block

  __device__ static BlockOfQueries from(const Problem& p, const Schedule& schedule, uint32_t index) {
    const Schedule::Item item = schedule.item(index);
    BlockOfQueries block;
    block.first_query = item.block * Traits::kBlockM;
    block.head = item.head % p.heads;
    block.b1 = item.head / p.heads % p.b1;
    block.b0 = item.head / p.heads / p.b1;
    const int offset = p.num_keys - p.num_queries;
    const int last_query = min(block.first_query + Traits::kBlockM, p.num_queries) - 1;
    const int last_key = p.causal ? min(last_query + offset, p.num_keys - 1) : p.num_keys - 1;
    block.num_tiles = last_key < 0 ? 0 : last_key / Traits::kBlockN + 1;
    block.first_limit = p.causal ? min(block.first_query + offset, p.num_keys - 1) : p.num_keys - 1;
    return block;
  }

  __device__ int64_t first_row(const Problem& p) const {  // among the rows of a contiguous (b0, b1, h, i) tensor
    return ((static_cast<int64_t>(b0) * p.b1 + b1) * p.heads + head) * p.num_queries + first_query;
  }
};

}  // namespace fcsa::sm90
