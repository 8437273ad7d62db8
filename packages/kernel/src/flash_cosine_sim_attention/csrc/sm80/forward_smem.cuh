// The shared memory of the forward kernel.
#pragma once

#include "forward_traits.cuh"
#include "../common/tile_index.cuh"
#include "smem_tile.cuh"

namespace fcsa::sm80 {

template <class Traits>
struct ForwardStages {
  using Element = typename Traits::Element;
  using QueryTile = SmemTile<Element, Traits::kBlockM, Traits::kHeadDim>;
  using KeyTile = SmemTile<Element, Traits::kBlockN, Traits::kHeadDim>;
  struct Stage {
    KeyTile k, v;
  };

  alignas(128) Stage stages[Traits::kStages];
  alignas(16) float k_rnorm[Traits::kStages][Traits::kBlockN];
};

// Queries that stay in registers pass through the memory of the last stages before keys arrive there. The output leaves
// the same way, so every block needs a barrier between its last tile and that.
template <class Traits, bool kQueryInRegisters = Traits::kQueryInRegisters>
struct ForwardSmem : ForwardStages<Traits> {
  using Base = ForwardStages<Traits>;
  static constexpr int kStagesUnderQuery = ceil_div(sizeof(typename Base::QueryTile), sizeof(typename Base::Stage));
  static_assert(kStagesUnderQuery < Traits::kStages, "stage 0 is filled while the queries are on their way");
  __device__ typename Base::QueryTile& query() {
    return reinterpret_cast<typename Base::QueryTile&>(this->stages[Traits::kStages - kStagesUnderQuery]);
  }
};

template <class Traits>
struct ForwardSmem<Traits, false> : ForwardStages<Traits> {
  alignas(128) typename ForwardStages<Traits>::QueryTile query_tile;
  __device__ typename ForwardStages<Traits>::QueryTile& query() { return query_tile; }
};

}  // namespace fcsa::sm80
