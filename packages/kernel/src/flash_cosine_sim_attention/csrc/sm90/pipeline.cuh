// Barriers between the producer (TMA) and the consumers (wgmma): thin names over <cuda/ptx>.
#pragma once

#include <cuda.h>

#include <cuda/ptx>

#include <cstdint>

namespace fcsa::sm90 {

namespace ptx = cuda::ptx;

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

__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t phase) {
  while (!ptx::mbarrier_try_wait_parity(&barrier, phase)) {
  }
}

__device__ __forceinline__ void arrive(uint64_t& barrier) {
  ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier);
}

// One arrival, and `bytes` more to come by TMA before the phase completes.
__device__ __forceinline__ void arrive_and_expect(uint64_t& barrier, uint32_t bytes) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier, bytes);
}

__device__ __forceinline__ void load_box(void* smem, const CUtensorMap& map, const int32_t (&coordinates)[5],
                                         uint64_t& barrier) {
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, smem, &map, coordinates, &barrier);
}

template <int kRegisters>  // gives registers back to the pool; all warps of the warpgroup
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>  // waits for registers from the pool
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace fcsa::sm90
