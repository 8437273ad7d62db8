// The instructions of csrc/sm90/wgmma.cuh, by their definition.
#pragma once

#include <type_traits>

#include "hopper.h"

namespace fcsa::sm90 {

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int kPending>
inline void wgmma_wait() {
  emulator::wgmma_wait(kPending);
}
template <int kSteps>
inline void wgmma_keep(const uint32_t (&)[kSteps][4]) {}

inline uint64_t opaque_descriptor(uint64_t descriptor) { return descriptor; }

template <int kCount>
inline void wgmma_pin(float (&)[kCount]) {}

template <class Element, bool kAccumulate, bool kTransposeA = false, bool kTransposeB = false, int kCount>
inline void wgmma_ss(float (&d)[kCount], uint64_t a_desc, uint64_t b_desc) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  emulator::wgmma({kCount * 2, kHalf, kAccumulate, kTransposeA, kTransposeB, a_desc, b_desc}, d, nullptr);
}
template <class Element, bool kAccumulate, int kCount>
inline void wgmma_rs(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b_desc) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  emulator::wgmma({kCount * 2, kHalf, kAccumulate, false, false, 0, b_desc}, d, a);
}
template <class Element, bool kAccumulate, int kCount>
inline void wgmma_rs_transposed(float (&d)[kCount], const uint32_t (&a)[4], uint64_t b_desc) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  emulator::wgmma({kCount * 2, kHalf, kAccumulate, false, true, 0, b_desc}, d, a);
}

}  // namespace fcsa::sm90
