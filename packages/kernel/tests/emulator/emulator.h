// CUDA's words for a host compiler: threads are fibers that are switched at barriers and warp-wide exchanges.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

using std::max;
using std::min;

namespace emulator {

constexpr size_t kSharedBytes = 232 * 1024;
constexpr int kWarp = 32;
constexpr int kMaxWords = 16;  // a lane contributes at most these many to one exchange

struct Copy {  // a cp.async under way
  void* target;
  const void* source;
  size_t bytes;
  bool valid;
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  bool done;
  uint64_t warp_operations, block_operations;  // exchanges and barriers that it has reached
  std::vector<std::vector<Copy>> groups;       // committed copies, oldest first
  std::vector<Copy> open;                      // not committed yet
};

using Words = uint32_t[kMaxWords];

extern int current;  // the fiber that runs
extern uint3 block;
extern dim3 grid;
extern bool copies_are_late;  // until their wait; otherwise they take effect at once

Fiber& fiber();
void synchronize_block();
// Every lane of the warp gives `count` words; returns those of all 32.
Words* exchange(const uint32_t* mine, int count);
void launch(unsigned blocks, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel);

inline uint3 thread_index() { return uint3{static_cast<unsigned>(current), 0, 0}; }
inline int lane() { return current % kWarp; }

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace emulator

namespace fcsa::sm80 {
extern char shared_memory[];
}

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block)
#define gridDim (emulator::grid)
#define __syncthreads() emulator::synchronize_block()
#define __syncwarp() ((void)emulator::exchange(nullptr, 0))

inline float __shfl_xor_sync(unsigned, float x, int distance) {
  const uint32_t word = emulator::bits<uint32_t>(x);
  return emulator::bits<float>(emulator::exchange(&word, 1)[emulator::lane() ^ distance][0]);
}
inline uint32_t __ballot_sync(unsigned, int predicate) {
  const uint32_t word = predicate != 0;
  const auto all = emulator::exchange(&word, 1);
  uint32_t result = 0;
  for (int i = 0; i < emulator::kWarp; ++i) result |= all[i][0] << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline float __uint_as_float(uint32_t x) { return emulator::bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulator::bits<uint32_t>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int atomicMax(int* target, int value) {
  const int old = *target;
  *target = std::max(old, value);
  return old;
}

template <class Function>
cudaError_t emulated_attribute(Function, cudaFuncAttribute, int) {
  return cudaSuccess;
}
