// The instructions of csrc/sm90/ptx.cuh, by their definition.
#pragma once

#include <cuda.h>

#include "hopper.h"

namespace fcsa::sm90 {

namespace ptx {
constexpr int sem_release = 0, scope_cluster = 0;
inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_mbarrier_init(int, int) {}
}  // namespace ptx

inline void wait(uint64_t& barrier, uint32_t phase) { emulator::barrier_wait(&barrier, phase); }
inline bool has_ended(uint64_t& barrier, uint32_t phase) { return emulator::barrier_passed(&barrier, phase); }
inline void arrive(uint64_t& barrier) { emulator::barrier_arrive(&barrier, 0); }
inline void arrive_and_expect(uint64_t& barrier, uint32_t bytes) { emulator::barrier_arrive(&barrier, bytes); }

inline void load_box(void* smem, const CUtensorMap& map, const int32_t (&coordinates)[5], uint64_t& barrier) {
  emulator::load_box(smem, map, coordinates, &barrier);
}
inline void prefetch_map(const CUtensorMap&) {}
inline void prefetch_line(const void* global) {
  static volatile char sink;
  sink = *static_cast<const char*>(global);  // it has to exist
}
inline void bulk_prefetch(const void* global, uint32_t bytes) {
  prefetch_line(global);
  prefetch_line(static_cast<const char*>(global) + bytes - 1);
}
inline void bulk_load(void* smem, const void* global, uint32_t bytes, uint64_t& barrier) {
  emulator::bulk_load(smem, global, bytes, &barrier);
}
inline void bulk_reduce_add_f32(float* global, const float* smem, uint32_t bytes) {
  emulator::bulk_reduce_add(global, smem, bytes);
}
inline void bulk_commit() { emulator::bulk_commit(); }
template <int kPending>
inline void bulk_wait_read() {
  emulator::bulk_wait(kPending, true);
}
template <int kPending>
inline void bulk_wait() {
  emulator::bulk_wait(kPending, false);
}
inline void initialize(uint64_t& barrier, uint32_t arrivals) { emulator::barrier_init(&barrier, arrivals); }
inline void fence_barrier_initialization() {}
inline void fence_async_shared() { emulator::fence_async(); }
inline void fence_async_global() {}

inline void store_release(uint32_t* word, uint32_t value) { *word = value; }
// Blocks run one after another: what is not there now never comes.
inline uint32_t wait_for_value(const uint32_t* word, uint32_t value) {
  if (*word < value) emulator::fail("waits for a block that runs later");
  return *word;
}

inline void named_barrier_sync(int id, int threads) { emulator::named_barrier(id, threads, true); }
inline void named_barrier_arrive(int id, int threads) { emulator::named_barrier(id, threads, false); }

inline bool elect_one() {
  __syncwarp();
  return emulator::lane() == 0;
}
inline void load_matrix_x4(uint32_t (&words)[4], const void* smem) {
  emulator::load_matrices(words, emulator::shared_address(smem), false);
}
inline void load_matrix_x4_trans(uint32_t (&words)[4], const void* smem) {
  emulator::load_matrices(words, emulator::shared_address(smem), true);
}
inline void store_matrix_x4(void* smem, const uint32_t (&words)[4]) {
  emulator::store_matrices(emulator::shared_address(smem), words, false);
}
inline void store_matrix_x4(uint32_t smem, const uint32_t (&words)[4]) { emulator::store_matrices(smem, words, false); }
inline void store_matrix_x4_trans(void* smem, const uint32_t (&words)[4]) {
  emulator::store_matrices(emulator::shared_address(smem), words, true);
}

inline void store_shared(float& smem, float x) { smem = x; }

template <int kRegisters>
inline void shrink_registers() {}
template <int kRegisters>
inline void grow_registers() {}

inline void store_if(bool stores, float* global, float value) {
  if (stores) *global = value;
}
inline void store_if(bool stores, uint4* global, const uint4& value) {
  if (stores) *global = value;
}

inline float exp2_approx(float x) { return exp2f(x); }
inline float log2_approx(float x) { return log2f(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
inline float rsqrt_approx(float x) { return x < 0x1p-126f ? INFINITY : 1.0f / sqrtf(x); }

}  // namespace fcsa::sm90
