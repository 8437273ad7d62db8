// Everything that the stages of the Hopper backward share: sizes, the shared-memory plan, the walk over queries.
#pragma once

#include <type_traits>

#include "../common/backward_preprocess.cuh"
#include "../common/mask.cuh"
#include "pipeline.cuh"
#include "smem_panel.cuh"
#include "tensor_map.h"

namespace fcsa::sm90 {

// Scores are made in squares of 64 keys (a warpgroup) x 64 queries ("square"); a step is kSquares of them, side by side.
constexpr int kSquare = 64;

template <class Element_, int kHeadDim_, bool kHasBias_>
struct BackwardTraits {
  using Element = Element_;
  using Operand = Element_;
  static constexpr int kHeadDim = kHeadDim_;
  static_assert(!kHasBias_, "sm90 takes no bias; the sm80 kernels do");
  static_assert(kHeadDim == 64 || kHeadDim == 128);

  // How the preprocessing and the epilogues that are common to all architectures see this variant.
  static constexpr bool kHasBias = false, kFloat = false, kFoldsNorm = true, kScaleInKeys = true;
  static constexpr bool kExactCopies = std::is_same_v<Element, __half>;
  static constexpr int kPlanes = 1;
  static constexpr float kUnit = 1.0f, kProbabilityScale = 1.0f, kLog2ProbabilityScale = 0.0f;

  static constexpr int kConsumerWarpgroups = 2;
  static constexpr int kConsumerThreads = kConsumerWarpgroups * 128;
  static constexpr int kConsumerWarps = kConsumerThreads / 32;
  static constexpr int kThreads = kConsumerThreads + 128;
  static constexpr int kConsumerRegisters = 240, kProducerRegisters = 24;
  static constexpr int kBlockK = kConsumerWarpgroups * kSquare;
  // dq of a step is shared out: a warpgroup makes 64 queries x 64 columns of it.
  static constexpr int kSquares = kConsumerWarpgroups * kSquare / kHeadDim;
  static constexpr int kBlockQ = kSquares * kSquare;
  static constexpr int kPanels = kHeadDim / kSquare;
  static constexpr int kStages = 2;

  using KeyTile = PanelTile<Element, kBlockK, kHeadDim>;
  using QueryTile = PanelTile<Element, kBlockQ, kHeadDim>;
  using ScoreTile = PanelTile<Element, kBlockK, kSquare>;  // dS' of 64 queries as [key][query]
};

template <class Traits>
struct BackwardStorage {
  struct Loop {
    typename Traits::KeyTile k, v;
    typename Traits::QueryTile q[Traits::kStages], dout[Traits::kStages];
    typename Traits::ScoreTile ds[Traits::kStages][Traits::kSquares];
  };
  static constexpr int kStride = Traits::kHeadDim + 8;  // spreads the rows of a fragment over the banks
  struct Epilogue {
    float dk[Traits::kBlockK * kStride], dv[Traits::kBlockK * kStride];
  };
  union {
    Loop loop;
    Epilogue epilogue;
  };
  alignas(128) float dq[Traits::kConsumerWarpgroups][kSquare * kSquare];  // laid out as in backward_dq.cuh
  alignas(16) float4 query_rows[Traits::kStages][Traits::kBlockQ];        // come with dout
  uint64_t full_kv, empty_kv;
  uint64_t full_q[Traits::kStages], empty_q[Traits::kStages];
  uint64_t full_dout[Traits::kStages], empty_dout[Traits::kStages];
  uint64_t full_ds[Traits::kStages];  // dS' of both warpgroups
  uint64_t full_dq[Traits::kConsumerWarpgroups], empty_dq[Traits::kConsumerWarpgroups];
};

struct BackwardMaps {
  TensorMap q, k, v, dout;
};

// What a block of threads owns at a time: (b0, b1, kv head, kBlockK keys). It walks over the query heads of the kv head and
// their steps of kBlockQ queries.
template <class Traits>
struct BlockOfKeys {
  TileIndex index;  // head: kv head; tile: block of keys
  int first_key, num_keys;   // of the block; num_keys that exist
  int group;                 // query heads of the kv head
  int first_step, end_step;  // steps of a query head that see a key of the block
  int first_unmasked_step;   // from here on P is finite without a mask: every query sees every key, as far as causality goes

  // All lanes of a warp call it.
  __device__ __forceinline__ BlockOfKeys(const Problem& p, uint32_t block)
      : index(TileIndex::from_block(block, ceil_div(p.num_keys, Traits::kBlockK), p.kv_heads, p.b1)),
        first_key(index.tile * Traits::kBlockK),
        num_keys(min(Traits::kBlockK, p.num_keys - first_key)),
        group(p.heads / p.kv_heads) {
    const int num_steps = ceil_div(p.num_queries, Traits::kBlockQ), offset = p.num_keys - p.num_queries;
    // query i sees key j iff i >= j - offset
    const int first_query = p.causal ? max(0, first_key - offset) : 0;
    const int full_query = p.causal ? max(0, first_key + Traits::kBlockK - 1 - offset) : 0;
    first_step = first_query / Traits::kBlockQ;
    end_step = has_visible_key(p) ? num_steps : first_step;
    first_unmasked_step = may_overflow(p) ? end_step : min(max(first_step, ceil_div(full_query, Traits::kBlockQ)), end_step);
  }

  __device__ __forceinline__ TileIndex query_head(int head) const {
    TileIndex result = index;
    result.head = index.head * group + head;
    return result;
  }

 private:
  // Where logits are large, exp2(shift), the P of keys that are not there, may be infinite: a mask makes it 0 then.
  __device__ __forceinline__ bool may_overflow(const Problem& p) const {
    constexpr float kLargeLogit = 64.0f;  // exp2(64 log2(e)) is far from the end of float32
    const bool hides_keys = num_keys < Traits::kBlockK || p.mask != nullptr;
    return hides_keys && fabsf(head_scale(p, index.head * group)) * p.groups > kLargeLogit;
  }

  __device__ __forceinline__ bool has_visible_key(const Problem& p) const {
    const uint8_t* mask = mask_row(p, index);
    if (mask == nullptr) return true;
    bool visible = false;
    for (int key = threadIdx.x % 32; key < num_keys; key += 32) visible |= mask[(first_key + key) * p.mask_key] != 0;
    return __any_sync(0xffffffffu, visible);
  }
};

}  // namespace fcsa::sm90
