// The shared memory of the forward kernel.
#pragma once

#include "../common/mask.cuh"
#include "forward_traits.cuh"
#include "smem_tile.cuh"

namespace fcsa::sm80 {

template <class Config>
struct ForwardStages {
  using QueryTile = SmemTile<typename Config::Operand, Config::kBlockM, Config::kHeadDim>;
  using KeyTile = SmemTile<typename Config::Operand, Config::kBlockN, Config::kHeadDim>;
  struct Query {
    QueryTile parts[Config::kParts];
  };
  struct Stage {
    KeyTile k[Config::kParts], v[Config::kParts];
  };

  alignas(128) Stage stages[Config::kStages];
  alignas(16) float k_rnorm[Config::kStages][Config::kBlockN];
  KeyBits<Config::kBlockN> key_bits[Config::kStages];
};

// Queries that stay in registers pass through the memory of the last stages before keys arrive there. The output leaves
// the same way, so such a block needs a barrier between its last tile and that.
template <class Config, bool kQueryInRegisters = Config::kQueryInRegisters>
struct ForwardSmem : ForwardStages<Config> {
  using Base = ForwardStages<Config>;
  static constexpr int kStagesUnderQuery = ceil_div(sizeof(typename Base::Query), sizeof(typename Base::Stage));
  static_assert(kStagesUnderQuery < Config::kStages, "stage 0 is filled while the queries are on their way");
  __device__ typename Base::Query& query() {
    return reinterpret_cast<typename Base::Query&>(this->stages[Config::kStages - kStagesUnderQuery]);
  }
};

template <class Config>
struct ForwardSmem<Config, false> : ForwardStages<Config> {
  alignas(128) typename ForwardStages<Config>::Query query_tiles;
  __device__ typename ForwardStages<Config>::Query& query() { return query_tiles; }
};

}  // namespace fcsa::sm80
