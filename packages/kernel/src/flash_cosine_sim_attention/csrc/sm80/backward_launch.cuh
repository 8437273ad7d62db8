// Launching a kernel with as much dynamic shared memory as it needs.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

namespace fcsa::sm80 {

// Raises the kernel's limit of dynamic shared memory, once a kernel and device.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> done{0};
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (bytes <= 48 * 1024 || (done.load(std::memory_order_relaxed) & bit && device < 64)) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) done.fetch_or(bit, std::memory_order_relaxed);
  return error;
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

}  // namespace fcsa::sm80
