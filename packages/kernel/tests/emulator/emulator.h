// CUDA's words for a host compiler: threads are fibers that are switched where they wait for each other.
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
#include <memory>
#include <random>
#include <string>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __noinline__
#undef __launch_bounds__
#undef __grid_constant__
#undef __align__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

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
  std::unique_ptr<char[]> stack;
  bool done;
  std::function<bool()> ready;  // what it waits for; empty: nothing
  std::string (*waits_for)(uint64_t);
  uint64_t waits_for_argument;
  uint64_t warp_operations, block_operations;  // exchanges and barriers that it has reached
  std::vector<std::vector<Copy>> groups;       // committed copies, oldest first
  std::vector<Copy> open;                      // not committed yet
};

using Words = uint32_t[kMaxWords];

alignas(1024) extern char shared_memory[kSharedBytes];
extern size_t shared_bytes;  // of this launch
extern int current;          // the fiber that runs
extern uint3 block;
extern dim3 grid, threads;
extern bool copies_are_late;  // until their wait; otherwise they take effect at once
extern std::mt19937 random_source;

Fiber& fiber();
[[noreturn]] void fail(const std::string& what);  // ends the launch with an error that names this thread
// Lets others run until ready(). describe(argument): what is waited for, if that is for ever.
void wait_until(const std::function<bool()>& ready, std::string (*describe)(uint64_t), uint64_t argument = 0);
void synchronize_block();
// Every lane of the warp gives `count` words; returns those of all 32.
Words* exchange(const uint32_t* mine, int count);
// Four 8 x 8 matrices: row r of matrix i lies at the address that lane 8 i + r gives.
void load_matrices(uint32_t (&words)[4], uint32_t address, bool transposed);
void store_matrices(uint32_t address, const uint32_t (&words)[4], bool transposed);
void launch(dim3 blocks, dim3 block_threads, size_t bytes, const std::function<void()>& kernel);
cudaError_t take_error();

inline uint3 thread_index() { return uint3{static_cast<unsigned>(current), 0, 0}; }
inline int lane() { return current % kWarp; }
inline bool chance(double probability) { return random_source() < probability * 4294967296.0; }

inline uint32_t shared_address(const void* pointer) {
  const auto offset = static_cast<const char*>(pointer) - shared_memory;
  if (offset < 0 || offset >= static_cast<int64_t>(shared_bytes)) fail("a shared address beyond what was launched");
  return static_cast<uint32_t>(offset);
}

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <bool kHalf>  // IEEE half or bfloat16, in the low bits
inline double element(uint32_t word) {
  if constexpr (kHalf) return __half2float(bits<__half>(static_cast<uint16_t>(word)));
  return bits<float>(word << 16);
}

inline float truncate(double x) {  // to float, towards 0, as tensor cores do it with their sums
  const float rounded = static_cast<float>(x);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(x) ? std::nextafterf(rounded, 0.0f) : rounded;
}

template <class T>
inline T shuffle(T x, int source) {
  const uint32_t word = bits<uint32_t>(x);
  return bits<T>(exchange(&word, 1)[source % kWarp][0]);
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define __syncthreads() emulator::synchronize_block()

inline const uint3& blockIdx = emulator::block;
inline const dim3 &gridDim = emulator::grid, &blockDim = emulator::threads;

inline void __syncwarp(unsigned = 0) { emulator::exchange(nullptr, 0); }
inline size_t __cvta_generic_to_shared(const void* pointer) { return emulator::shared_address(pointer); }

template <class T>
inline T __shfl_xor_sync(unsigned, T x, int distance) {
  return emulator::shuffle(x, emulator::lane() ^ distance);
}
template <class T>
inline T __shfl_sync(unsigned, T x, int source, int width = 32) {
  return emulator::shuffle(x, emulator::lane() / width * width + source % width);
}
template <class T>
inline T __shfl_down_sync(unsigned, T x, int distance) {
  const int source = emulator::lane() + distance;
  return emulator::shuffle(x, source < emulator::kWarp ? source : emulator::lane());
}
template <class T>
inline T __shfl_up_sync(unsigned, T x, int distance) {
  const int source = emulator::lane() - distance;
  return emulator::shuffle(x, source >= 0 ? source : emulator::lane());
}
inline uint32_t __ballot_sync(unsigned, int predicate) {
  const uint32_t word = predicate != 0;
  const auto all = emulator::exchange(&word, 1);
  uint32_t result = 0;
  for (int i = 0; i < emulator::kWarp; ++i) result |= all[i][0] << i;
  return result;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }
inline float __uint_as_float(uint32_t x) { return emulator::bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulator::bits<uint32_t>(x); }
inline int __float_as_int(float x) { return emulator::bits<int>(x); }
inline float __int_as_float(int x) { return emulator::bits<float>(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float x, float y) { return x / y; }
template <class T>
inline T __ldg(const T* pointer) {
  return *pointer;
}
inline int atomicMax(int* target, int value) {
  const int old = *target;
  *target = std::max(old, value);
  return old;
}
template <class T>
inline T atomicAdd(T* target, T value) {
  const T old = *target;
  if constexpr (std::is_same_v<T, float4>) {
    *target = make_float4(old.x + value.x, old.y + value.y, old.z + value.z, old.w + value.w);
  } else if constexpr (std::is_same_v<T, float2>) {
    *target = make_float2(old.x + value.x, old.y + value.y);
  } else {
    *target = old + value;
  }
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void cudaGridDependencySynchronize() {}
inline void cudaTriggerProgrammaticLaunchCompletion() {}

template <class... Arguments>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, void (*)(Arguments...)) {
  return cudaFuncGetAttributes(attributes, static_cast<const void*>(nullptr));
}

template <class Function>
cudaError_t emulated_attribute(Function, cudaFuncAttribute, int) {
  return cudaSuccess;
}

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Given&&... arguments) {
  emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(arguments...); });
  return emulator::take_error();
}
