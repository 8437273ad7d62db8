// Everything that the stages of the Hopper forward share: sizes, the shared-memory plan, the walk over tiles.
#pragma once

#include "../common/mask.cuh"
#include "../common/softmax.cuh"
#include "../common/tile_index.cuh"
#include "forward_bias.cuh"
#include "pipeline.cuh"
#include "smem_panel.cuh"
#include "tensor_map.h"
#include "tile_config.h"

namespace fcsa::sm90 {

template <class Value, int kRows, int kCols>
struct BiasTileOf {
  using Tile = BiasTile<Value, kRows, kCols>;
};
template <int kRows, int kCols>
struct BiasTileOf<Diagonals, kRows, kCols> {
  using Tile = DiagonalTile<kRows, kCols>;
};

// kKeyMask, kForManyKeys: not named by variants; the launcher picks the kernel for the call.
template <class Element_, int kHeadDim_, Softmax kSoftmax_, bool kKeyMask_ = false, bool kForManyKeys_ = false, class BiasValue_ = void>
struct ForwardTraits {
  using WithKeyMask = ForwardTraits<Element_, kHeadDim_, kSoftmax_, true, false, BiasValue_>;
  using ForManyKeys = ForwardTraits<Element_, kHeadDim_, kSoftmax_, false, true, BiasValue_>;
  template <Softmax kSoftmax, class BiasValue>
  using WithBias = ForwardTraits<Element_, kHeadDim_, kSoftmax, false, false, BiasValue>;
  static constexpr bool kBias = !std::is_void_v<BiasValue_>;
  static constexpr bool kDiagonals = std::is_same_v<BiasValue_, Diagonals>;
  static constexpr bool kKeyMask = kKeyMask_;
  using Element = Element_;
  using BiasValue = std::conditional_t<kBias, BiasValue_, Element>;  // of the bias, if there is one
  static constexpr int kBiasBytes = !kBias ? 0 : kDiagonals ? 1 : sizeof(BiasValue);
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr Softmax kSoftmax = kSoftmax_;
  static constexpr ForwardTile kTile = forward_tile<kHeadDim, kForManyKeys_, kBiasBytes>();
  static constexpr int kConsumerWarpgroups = kTile.consumer_warpgroups;
  static constexpr int kConsumerWarps = kConsumerWarpgroups * 4;
  static constexpr int kBlockM = kConsumerWarpgroups * 64;
  static constexpr int kBlockN = kTile.block_n;
  static constexpr int kStages = kTile.stages;
  // Factors of a tile of keys are read until its product with V: they live longer than K (forward_producer.cuh).
  static constexpr int kFactorStages = kStages + 1;
  // With a key mask there is no room for them beyond head dim 64.
  static constexpr bool kQueriesInRegisters = kTile.q_in_registers && !(kKeyMask && kHeadDim > 64);
  // Biases of a tile are read twice, for the shift and for the logits. Once, and held in registers: 3 per cent faster at head
  // dim 128, 1 slower at 64.
  static constexpr bool kHoldsBias =
      kBiasBytes == 2 && !kKeyMask && kHeadDim > 64 && kHeadDim <= 128 && kSoftmax == Softmax::kBounded;
  static constexpr int kParts = kSoftmax == Softmax::kBounded ? kTile.parts : 1;
  // The shift of a row follows its largest logit or, where the scores are bounded beside a bias, its largest bias.
  static constexpr bool kFollows = kBias || kSoftmax == Softmax::kRunningMax;
  static constexpr int kPartN = kBlockN / kParts;
  // At head dim 64, where a tile's products are short: the row sums as another eight columns of O, from ones beside V, an
  // addition a score less for an eighth more of that product; and barriers looked at before they are waited for.
  static constexpr bool kSumsByProducts = kHeadDim == 64 && !kBias;
  // The assembler moves most exponentials of a tile below the wait for O, which does not need them. A store that depends on
  // the last of them holds more of them above it: 1 to 2 per cent here, a loss of as much in the other forms.
  static constexpr bool kExponentialsFirst = kForManyKeys_ && kSumsByProducts;
  static constexpr bool kLooksAhead = kHeadDim == 64;
  static constexpr int kOutColumns = kHeadDim + (kSumsByProducts ? 8 : 0);
  static constexpr int kThreads = (kTile.consumer_warpgroups + 1) * 128;

  // setmaxnreg moves registers within what the block was launched with; asking for more waits for ever.
  static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
  static constexpr int kLent = kKeyMask ? (kHeadDim <= 128 ? 24 : 16) : 0;  // to the warps that find the visible tiles
  static constexpr int kConsumerRegisters = kTile.consumer_registers - kLent;
  static constexpr int kProducerRegisters = kTile.producer_registers + kLent * kTile.consumer_warpgroups;
  static_assert(kConsumerRegisters * kTile.consumer_warpgroups + kProducerRegisters <=
                kLaunchRegisters * (kTile.consumer_warpgroups + 1));

  using QueryTile = PanelTile<Element, 64, kHeadDim>;  // of a warpgroup
  using KeyTile = PanelTile<Element, kBlockN, kHeadDim>;
  using BiasTile = typename BiasTileOf<BiasValue, kBlockM, kBlockN>::Tile;
  using BiasView = sm90::BiasView<BiasTile, kHoldsBias>;
  static constexpr int kStageBytes = KeyTile::kBytes + (kBias ? BiasTile::kBytes : 0);  // that full_k stands for
};

// A tile of keys of the walk, as the producer hands it out where there is a key mask.
template <class Traits>
struct KeyTileRecord {
  KeyBits<Traits::kBlockN> visible;  // by the mask and the end of the keys
  int tile;
  bool last;  // of its block of queries
  bool end;   // of everything: there is no tile
};

struct ForwardMaps {
  TensorMap q, k, v, bias;
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
  int first_query, head, b1, b0;
  int num_tiles;    // negative: there is no block
  int first_limit;  // keys up to this one are visible to every query of the block

  __device__ static BlockOfQueries from(const Problem& p, const Schedule& schedule, uint32_t index) {
    const Schedule::Item item = schedule.item(index);
    BlockOfQueries block;
    block.first_query = item.block * Traits::kBlockM;
    // Batch rows that share a bias side by side, so that it comes from device memory once.
    const bool batch_first = Traits::kBias && p.bias_b0 == 0 && p.bias_b1 == 0;
    const int batches = p.b0 * p.b1;
    const int batch = batch_first ? item.head % batches : item.head / p.heads;
    block.head = batch_first ? item.head / batches : item.head % p.heads;
    block.b1 = batch % p.b1;
    block.b0 = batch / p.b1;
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

template <class Traits>
struct ForwardStorage {
  typename Traits::QueryTile q[Traits::kConsumerWarpgroups];
  typename Traits::KeyTile k[Traits::kStages];
  typename Traits::KeyTile v[Traits::kStages];
  std::conditional_t<Traits::kBias, typename Traits::BiasTile, char> bias[Traits::kBias ? Traits::kStages : 1];  // beside k
  alignas(Traits::kSumsByProducts ? 1024 : 16) typename Traits::Element ones[Traits::kSumsByProducts ? 16 * 64 : 1];
  // Whose queries are in q; two in turns, since a warpgroup may be a block ahead of another. Not one for each warpgroup: what
  // comes from one address the compiler knows to be equal for all threads.
  BlockOfQueries<Traits> block[2];
  alignas(16) float k_factor[Traits::kFactorStages][Traits::kBlockN];
  KeyTileRecord<Traits> records[Traits::kKeyMask ? Traits::kFactorStages : 1];  // slots as those of k_factor
  float parked[Traits::kExponentialsFirst ? Traits::kThreads - 128 : 1];  // read by nobody
  uint64_t full_q[Traits::kConsumerWarpgroups], empty_q[Traits::kConsumerWarpgroups];
  uint64_t full_k[Traits::kStages], empty_k[Traits::kStages];
  uint64_t full_v[Traits::kStages], empty_v[Traits::kStages];
  uint64_t loaded_v[Traits::kKeyMask ? Traits::kStages : 1];  // V is there, but not yet cleaned of the rows of masked keys
};

}  // namespace fcsa::sm90
