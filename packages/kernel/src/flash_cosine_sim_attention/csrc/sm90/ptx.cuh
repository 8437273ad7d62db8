// One function per instruction but for wgmma (wgmma.cuh); asm and <cuda/ptx> stand nowhere else in sm90/.
#pragma once

#include <cuda.h>

#include <cuda/ptx>

#include <cstdint>

namespace fcsa::sm90 {

namespace ptx = cuda::ptx;

// ---- mbarriers, in shared memory ----

__device__ __forceinline__ void initialize(uint64_t& barrier, uint32_t arrivals) { ptx::mbarrier_init(&barrier, arrivals); }

// After the initialisation, by the same thread; then a barrier of the block.
__device__ __forceinline__ void fence_barrier_initialization() {
  ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
}

// Waits for the end of the barrier's phase of this parity.
__device__ __forceinline__ void wait(uint64_t& barrier, uint32_t phase) {
  while (!ptx::mbarrier_try_wait_parity(&barrier, phase)) {
  }
}

// Whether that phase has ended; does not wait.
__device__ __forceinline__ bool has_ended(uint64_t& barrier, uint32_t phase) {
  return ptx::mbarrier_test_wait_parity(&barrier, phase);
}

__device__ __forceinline__ void arrive(uint64_t& barrier) {
  ptx::mbarrier_arrive(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier);
}

// One arrival, and `bytes` more to come by TMA before the phase completes.
__device__ __forceinline__ void arrive_and_expect(uint64_t& barrier, uint32_t bytes) {
  ptx::mbarrier_arrive_expect_tx(ptx::sem_release, ptx::scope_cta, ptx::space_shared, &barrier, bytes);
}

// ---- asynchronous copies; one thread issues them ----

// A box of a tensor to shared memory; its bytes count at the barrier.
__device__ __forceinline__ void load_box(void* smem, const CUtensorMap& map, const int32_t (&coordinates)[5],
                                         uint64_t& barrier) {
  ptx::cp_async_bulk_tensor(ptx::space_cluster, ptx::space_global, smem, &map, coordinates, &barrier);
}

// Fetches the map itself, which the first load_box would otherwise wait for.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Brings the line of 128 bytes around `global` to the L2 cache, some time.
__device__ __forceinline__ void prefetch_line(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(global)));
}

// `bytes` contiguous bytes from there on, multiples of 16 both.
__device__ __forceinline__ void bulk_prefetch(const void* global, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)), "r"(bytes));
}

// `bytes` contiguous bytes to shared memory; they count at the barrier. Both addresses and bytes: multiples of 16.
__device__ __forceinline__ void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t& barrier) {
  ptx::cp_async_bulk(ptx::space_cluster, ptx::space_global, smem, global, bytes, &barrier);
}

// global[i] += smem[i], in no order, for `bytes` contiguous bytes; joins the thread's open bulk group. Multiples of 16, too.
// What other threads wrote to smem: they fence_async_shared(), then a barrier, then this.
__device__ __forceinline__ void bulk_reduce_add_f32(float* global, const float* smem, uint32_t bytes) {
  const uint32_t source = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(source), "r"(bytes)
               : "memory");
}

// Closes this thread's group of bulk_reduce_add_f32.
__device__ __forceinline__ void bulk_commit() { ptx::cp_async_bulk_commit_group(); }

template <int kPending>  // all but the last kPending groups of this thread have read shared memory: it may be written again
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

template <int kPending>  // all but the last kPending groups of this thread are done, global memory included
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// Orders this thread's ordinary accesses to shared memory before later asynchronous ones (wgmma operands, bulk copies); those
// of other threads after a barrier.
__device__ __forceinline__ void fence_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Orders accesses to global memory by this thread's asynchronous operations and its ordinary ones, both ways.
__device__ __forceinline__ void fence_async_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }

// ---- words in global memory by which blocks wait for each other ----

// Publishes what this thread has done, and what it knows of others, together with `value`.
__device__ __forceinline__ void store_release(uint32_t* word, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(word)), "r"(value) : "memory");
}

// Waits for at least `value`, and returns what is there; what was published with it is visible from here on.
__device__ __forceinline__ uint32_t wait_for_value(const uint32_t* word, uint32_t value) {
  uint32_t found;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(__cvta_generic_to_global(word)) : "memory");
  } while (found < value);
  return found;
}

// ---- barriers of some warps of a block; id 0 is that of __syncthreads ----

__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Counts as one of the `threads`, and goes on.
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- one warp ----

// One lane of a warp whose 32 lanes all call it: true in that lane alone.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected)::"memory");
  return elected;
}

// Four 8 x 8 matrices of 16-bit values. Lane 8 i + r gives the address of row r of matrix i (16 bytes, on a 16-byte
// boundary); word i of lane l holds of matrix i row l / 4, columns 2 (l % 4), + 1. _trans: of its transpose.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&words)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(smem)))
               : "memory");
}

__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&words)[4], const void* smem) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(smem)))
               : "memory");
}

__device__ __forceinline__ void store_matrix_x4(void* smem, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(smem))),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// The address as a number of shared memory.
__device__ __forceinline__ void store_matrix_x4(uint32_t smem, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(smem), "r"(words[0]), "r"(words[1]),
               "r"(words[2]), "r"(words[3])
               : "memory");
}

__device__ __forceinline__ void store_matrix_x4_trans(void* smem, const uint32_t (&words)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(smem))),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
}

// ---- stores without a branch ----

// In a loop whose threads part at a branch the compiler keeps nothing in uniform registers, not even from before the branch.

__device__ __forceinline__ void store_if(bool stores, float* global, float value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}" ::"r"(static_cast<int>(stores)),
               "l"(__cvta_generic_to_global(global)), "f"(value)
               : "memory");
}

__device__ __forceinline__ void store_if(bool stores, uint4* global, const uint4& value) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %0, 0;\n@p st.global.v4.b32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                   static_cast<int>(stores)),
               "l"(__cvta_generic_to_global(global)), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// A store that the compiler neither drops nor moves over another volatile instruction.
__device__ __forceinline__ void store_shared(float& smem, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(&smem))), "f"(x) : "memory");
}

// ---- registers and arithmetic ----

template <int kRegisters>  // gives registers back to the pool; all warps of the warpgroup
__device__ __forceinline__ void shrink_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>  // waits for registers from the pool
__device__ __forceinline__ void grow_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ float exp2_approx(float x) {  // relative error 2^-22
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {  // error 2^-22, absolute where |log2(x)| < 1, else relative
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {  // 1 / x, relative error 2^-23
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float rsqrt_approx(float x) {  // relative error 2^-22; denormals count as 0: infinity
  float y;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace fcsa::sm90
