// Launches the forward pass for compute capability 8.0 and up: the norm's prologue, then one fused kernel.
#pragma once

#include <atomic>

#include "forward_kernel.cuh"

namespace fcsa::sm80 {

// Blocks with more than 48 KB of shared memory have to be allowed once on every device.
template <auto kKernel>
cudaError_t allow_shared_memory(int bytes) {
  static std::atomic<uint64_t> allowed{0};  // a bit a device
  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (device < 64 && (allowed.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  const cudaError_t error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) allowed.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

// Factors of all keys, and of the queries where they are not computed from the tile in flight; unit copies if wanted.
template <class Element>
cudaError_t launch_norms(const ForwardParams& p, cudaStream_t stream) {
  if (!p.l2norm_qk) return cudaSuccess;
  if (p.k_rnorm == nullptr || (p.q_unit == nullptr) != (p.k_unit == nullptr)) return cudaErrorInvalidValue;
  if (p.k_unit == nullptr && p.groups != 1) return cudaErrorInvalidValue;
  if (p.q_unit != nullptr) {
    const cudaError_t error = launch_l2norm_forward<Element>(q_norm_params(p, p.q_rnorm, p.q_unit), stream);
    if (error != cudaSuccess) return error;
  }
  return launch_l2norm_forward<Element>(k_norm_params(p, p.k_rnorm, p.k_unit), stream);
}

inline Strides contiguous_strides(const Problem& p, int64_t num_heads, int64_t num_rows) {
  const int64_t head = num_rows * p.head_dim;
  return {p.b1 * num_heads * head, num_heads * head, head, p.head_dim};
}

// The problem as the kernel sees it: where there are unit copies, they are the queries and keys.
inline ForwardParams with_unit_copies(ForwardParams p) {
  if (p.q_unit == nullptr) return p;
  p.q = p.q_unit, p.q_strides = contiguous_strides(p, p.heads, p.num_queries);
  p.k = p.k_unit, p.k_strides = contiguous_strides(p, p.kv_heads, p.num_keys);
  return p;
}

template <class Traits, Bias kBias>
cudaError_t launch_forward_kernel(const ForwardParams& p, cudaStream_t stream) {
  const int64_t blocks =
      static_cast<int64_t>(ceil_div(p.num_queries, Traits::kBlockM)) * p.heads * p.b1 * p.b0;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kBytes = sizeof(ForwardSmem<Traits>);
  static_assert(kBytes <= 99 * 1024, "what a block may use on every device from compute capability 8.0 on");
  constexpr auto kKernel = &forward_kernel<Traits, kBias>;
  if (cudaError_t error = allow_shared_memory<kKernel>(kBytes); error != cudaSuccess) return error;
  kKernel<<<static_cast<uint32_t>(blocks), Traits::kThreads, kBytes, stream>>>(with_unit_copies(p));
  return cudaGetLastError();
}

template <class Traits>
cudaError_t launch_forward(const ForwardParams& p, cudaStream_t stream) {
  if (p.head_dim > Traits::kHeadDim || p.head_dim % 8 != 0) return cudaErrorInvalidValue;
  if (p.bias != nullptr && Traits::kSoftmax == Softmax::kBounded) return cudaErrorInvalidValue;
  if (cudaError_t error = launch_norms<typename Traits::Element>(p, stream); error != cudaSuccess) return error;
  if (static_cast<int64_t>(p.num_queries) * p.heads * p.b1 * p.b0 == 0) return cudaSuccess;
  if constexpr (Traits::kSoftmax == Softmax::kRunningMax) {
    if (p.bias != nullptr && p.bias_is_float32) return launch_forward_kernel<Traits, Bias::kFloat32>(p, stream);
    if (p.bias != nullptr) return launch_forward_kernel<Traits, Bias::kElement>(p, stream);
  }
  return launch_forward_kernel<Traits, Bias::kNone>(p, stream);
}

}  // namespace fcsa::sm80
