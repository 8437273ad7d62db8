// Launcher of the Hopper forward: prologue (norm factors of the keys, or unit copies), tensor maps, main kernel.
#pragma once

#include "../common/launch.cuh"
#include "../norm/l2norm_forward.cuh"
#include "forward_kernel.cuh"

namespace fcsa::sm90 {

// Keys and values of so many bytes are a section of heads. 8 MiB: as many blocks of queries as run at a time, or twice as many
// (head dim 64). All blocks of a head then read a tile at about the same time, and what comes from device memory comes evenly;
// 5 to 12 per cent at 512 and 1024 keys. Long causal walks rather have few sections, since each ends with its own short
// blocks; 32 MiB stay in the 50 MB L2 cache.
inline int64_t section_bytes(const ForwardParams& p) {
  return p.num_keys < (p.causal ? 1536 : 8192) ? 8 << 20 : 32 << 20;
}

template <class Traits>
Schedule make_schedule(const ForwardParams& p) {
  Schedule schedule;
  schedule.num_blocks = ceil_div(p.num_queries, Traits::kBlockM);
  schedule.num_heads = p.heads * p.b1 * p.b0;
  const int64_t head_bytes = 2 * static_cast<int64_t>(p.num_keys) * p.head_dim * sizeof(typename Traits::Element);
  const int64_t kv_heads_per_section = head_bytes == 0 ? 1 : section_bytes(p) / head_bytes;
  const int64_t heads = (kv_heads_per_section < 1 ? 1 : kv_heads_per_section) * (p.heads / p.kv_heads);
  schedule.heads_per_section = heads < schedule.num_heads ? static_cast<int>(heads) : schedule.num_heads;
  schedule.num_items = static_cast<int64_t>(schedule.num_blocks) * schedule.num_heads;
  return schedule;
}

template <class Traits>
cudaError_t launch_prologue(const ForwardParams& p, cudaStream_t stream) {
  if (!p.l2norm_qk) {
    return p.next_item == nullptr ? cudaSuccess : cudaMemsetAsync(p.next_item, 0, sizeof(*p.next_item), stream);
  }
  using Element = typename Traits::Element;
  if (p.q_unit != nullptr) {
    const cudaError_t error = launch_l2norm_forward<Element, Element, Traits::kHeadDim>(q_norm_params(p, p.q_rnorm, p.q_unit), stream);
    if (error != cudaSuccess) return error;
  }
  L2NormParams keys = k_norm_params(p, p.k_rnorm, p.k_unit);
  keys.cleared = p.next_item;
  return launch_l2norm_forward<Element, Element, Traits::kHeadDim>(keys, stream);
}

template <class Traits>
cudaError_t launch_forward_kernel(const ForwardParams& p, cudaStream_t stream) {
  ForwardMaps maps;
  cudaError_t error = make_input_maps<typename Traits::Element>(&maps, p, Traits::QueryTile::kRows, Traits::kBlockN);
  if (error != cudaSuccess) return error;
  if constexpr (Traits::kBias && !Traits::kDiagonals) {
    error = make_bias_map<typename Traits::BiasTile>(&maps.bias, p);
    if (error != cudaSuccess) return error;
  }
  const Schedule schedule = make_schedule<Traits>(p);
  if (schedule.num_items == 0) return cudaSuccess;
  if (schedule.num_items > INT32_MAX) return cudaErrorInvalidConfiguration;

  int processors = 0;
  error = multiprocessor_count(&processors);
  if (error != cudaSuccess) return error;
  constexpr int kBytes = sizeof(ForwardStorage<Traits>);
  static_assert(kBytes <= 227 * 1024, "shared memory of a block on sm_90");
  constexpr auto kKernel = forward_kernel<Traits>;
  error = allow_shared_memory<kKernel>(kBytes);
  if (error != cudaSuccess) return error;
  const int blocks = static_cast<int>(schedule.num_items < processors ? schedule.num_items : processors);
  if (p.l2norm_qk) return launch_early<kKernel>(blocks, Traits::kThreads, kBytes, stream, p, maps, schedule);
  kKernel<<<blocks, Traits::kThreads, kBytes, stream>>>(p, maps, schedule);
  return cudaGetLastError();
}

template <class Traits>
cudaError_t launch_with_bias(const ForwardParams& p, cudaStream_t stream) {
  if (p.mask != nullptr) return launch_forward_kernel<typename Traits::WithKeyMask>(p, stream);
  return launch_forward_kernel<Traits>(p, stream);
}

template <class Traits, class BiasValue>
cudaError_t launch_biased(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (std::is_same_v<typename Traits::Element, __nv_bfloat16>) {
    if (p.bound <= kBiasBound) return launch_with_bias<typename Traits::template WithBias<Softmax::kBounded, BiasValue>>(p, stream);
  }
  return launch_with_bias<typename Traits::template WithBias<Softmax::kRunningMax, BiasValue>>(p, stream);
}

// Variants "bias" and "toeplitz".
template <class Traits>
cudaError_t launch_forward_biased(const ForwardParams& p, cudaStream_t stream) {
  if (p.bias == nullptr) return cudaErrorInvalidValue;
  const cudaError_t error = launch_prologue<Traits>(p, stream);
  if (error != cudaSuccess) return error;
  if constexpr (Traits::kDiagonals) {
    return p.bias_is_float32 ? launch_biased<Traits, Diagonals>(p, stream) : cudaErrorInvalidValue;
  }
  if (p.bias_is_float32) return launch_biased<Traits, float>(p, stream);
  return launch_biased<Traits, typename Traits::Element>(p, stream);
}

template <class Traits>
cudaError_t launch_forward(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (Traits::kBias) return launch_forward_biased<Traits>(p, stream);
  if (p.bias != nullptr) return cudaErrorInvalidValue;  // has variants of its own
  const cudaError_t error = launch_prologue<Traits>(p, stream);
  if (error != cudaSuccess) return error;
  if (p.mask != nullptr) return launch_forward_kernel<typename Traits::WithKeyMask>(p, stream);
  if constexpr (Traits::kHeadDim <= 64 && Traits::kSoftmax == Softmax::kBounded) {
    if (p.num_keys >= kManyKeys) return launch_forward_kernel<typename Traits::ForManyKeys>(p, stream);
  }
  return launch_forward_kernel<Traits>(p, stream);
}

}  // namespace fcsa::sm90
