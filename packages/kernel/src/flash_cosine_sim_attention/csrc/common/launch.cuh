// What a launcher asks of the runtime and its device, asked once and remembered: each question costs about a microsecond of
// host time, as much as a sixth of a launch.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace fcsa {

constexpr int kRememberedDevices = 64;  // beyond them questions are asked every time

// Lets blocks of the kernel have `bytes` of dynamic shared memory (more than 48 KB), once a kernel and device.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit a device
  if (bytes <= 48 * 1024) return cudaSuccess;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = device < kRememberedDevices ? uint64_t{1} << device : 0;
  if ((allowed.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Of the current device: what a persistent kernel launches blocks for.
inline cudaError_t multiprocessor_count(int* count) {
  static std::atomic<int> known[kRememberedDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  *count = device < kRememberedDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (*count != 0) return cudaSuccess;
  const cudaError_t error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess && device < kRememberedDevices) known[device].store(*count, std::memory_order_relaxed);
  return error;
}

// Whether what the current device runs of the kernel was compiled for Hopper's own instructions: a kernel of those is empty in
// code for other GPUs, which a Hopper would take from their PTX.
template <auto kKernel>
bool is_compiled_for_hopper() {
  static std::atomic<uint64_t> asked{0}, found{0};  // a bit a device
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  const uint64_t bit = device < kRememberedDevices ? uint64_t{1} << device : 0;
  if ((asked.load(std::memory_order_acquire) & bit) != 0) return (found.load(std::memory_order_relaxed) & bit) != 0;
  cudaFuncAttributes attributes = {};
  const bool is_hopper = cudaFuncGetAttributes(&attributes, kKernel) == cudaSuccess && attributes.binaryVersion == 90 &&
                         attributes.ptxVersion == 90;
  if (is_hopper) found.fetch_or(bit, std::memory_order_relaxed);
  asked.fetch_or(bit, std::memory_order_release);
  return is_hopper;
}

template <auto kKernel, class Params, class Parts>
cudaError_t launch_blocks(const Params& p, const Parts& parts, int64_t blocks, int threads, int shared_bytes,
                          cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared_memory<kKernel>(shared_bytes); error != cudaSuccess) return error;
  kKernel<<<static_cast<uint32_t>(blocks), threads, shared_bytes, stream>>>(p, parts);
  return cudaGetLastError();
}

template <auto kKernel, class Params>
cudaError_t launch_blocks(const Params& p, int64_t blocks, int threads, int shared_bytes, cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared_memory<kKernel>(shared_bytes); error != cudaSuccess) return error;
  kKernel<<<static_cast<uint32_t>(blocks), threads, shared_bytes, stream>>>(p);
  return cudaGetLastError();
}

// Launches a kernel that may start while the kernel before it in the stream is still running (programmatic dependent launch,
// from compute capability 9.0 on). It reads that kernel's results only after wait_for_prologue().
template <auto kKernel, class... Arguments>
cudaError_t launch_early(int blocks, int threads, int shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kKernel, arguments...);
}

// In a kernel before one of launch_early: that one may start now, where there is room. Its results are seen all the same
// only once it has ended.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// In a kernel of launch_early: until the kernel before it has ended and its results are visible.
__device__ __forceinline__ void wait_for_prologue() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace fcsa
