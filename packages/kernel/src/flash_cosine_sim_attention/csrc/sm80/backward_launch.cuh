// Launching a kernel that takes a second struct beside the params.
#pragma once

#include "../common/launch.cuh"

namespace fcsa::sm80 {

template <auto kKernel, class Params, class Parts>
cudaError_t launch_blocks(const Params& p, const Parts& parts, int64_t blocks, int threads, int shared_bytes,
                          cudaStream_t stream) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = allow_shared_memory<kKernel>(shared_bytes); error != cudaSuccess) return error;
  kKernel<<<static_cast<uint32_t>(blocks), threads, shared_bytes, stream>>>(p, parts);
  return cudaGetLastError();
}

using fcsa::launch_blocks;

}  // namespace fcsa::sm80
