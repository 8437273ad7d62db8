// Rings of buffers between the producer (TMA) and the consumers (wgmma), guarded by mbarriers.
#pragma once

#include "ptx.cuh"

namespace fcsa::sm90 {

// A position in a ring of kStages buffers. `phase` is the parity that the next wait of its barrier expects.
template <int kStages>
struct RingPosition {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

}  // namespace fcsa::sm90
