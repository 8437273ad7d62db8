// The backward pass: launches, in order.
//
//   l2norm_forward, split   float32: q, k, v and dout as halves
//   prologue             query_rows, zeros in dq_accum; copies of q and k, where the norm is not folded
//   backward_dkdv        dk, dv, dq_accum
//   dq_postprocess       dq, dscale_rows          or, deterministic: backward_dq
//   backward_dbias       dbias              or, of a bias by its diagonals: backward_bands, backward_windows
#pragma once

#include "../common/backward_prologue.cuh"
#include "../common/launch.cuh"
#include "backward_dbias.cuh"
#include "backward_ddiagonals.cuh"
#include "backward_dkdv.cuh"
#include "backward_dq.cuh"
#include "../sm90/narrow_dbias.cuh"
#include "../sm90/pair_backward.cuh"
#include "pair_backward.cuh"

namespace fcsa::sm80 {

template <class Config>
cudaError_t launch_dkdv(const BackwardParams& p, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(ceil_div(p.num_keys, Config::kBlockK)) * p.kv_heads * p.b1 * p.b0;
  const cudaError_t error = launch_blocks<backward_dkdv_kernel<Config>>(p, blocks, Config::kThreads,
                                                                        sizeof(DkDvStorage<Config>), stream);
  if (error != cudaSuccess || p.dq_accum == nullptr) return error;
  const int64_t q_blocks = static_cast<int64_t>(ceil_div(p.num_queries, Config::kBlockQ)) * p.heads * p.b1 * p.b0;
  return launch_blocks<backward_dq_postprocess_kernel<Config>>(
      p, q_blocks, Config::kThreads, Config::kBlockQ * kDqPostprocessStride<Config> * sizeof(float), stream);
}

// cp.async copies 16 bytes from a 16-byte boundary: keys contiguous, and everything else a multiple of eight elements.
template <class Traits>
bool bias_can_be_staged(const BackwardParams& p) {
  const int64_t strides = p.bias_b0 | p.bias_b1 | p.bias_head | p.bias_query;
  return (!p.bias_is_float32 || Traits::kFloat) && p.bias_key == 1 && p.num_keys % 8 == 0 && strides % 8 == 0 &&
         reinterpret_cast<uintptr_t>(p.bias) % 16 == 0;
}

// The configuration that the call and the device's shared memory allow.
template <class Traits>
cudaError_t launch_dkdv_for_device(const BackwardParams& p, cudaStream_t stream) {
  using All = BackwardConfig<Traits, false, true>;
  using Large = BackwardConfig<Traits, false, false>;
  using Small = BackwardConfig<Traits, true, false>;
  constexpr int kAllBytes = sizeof(DkDvStorage<All>), kLargeBytes = sizeof(DkDvStorage<Large>);
  static_assert(kAllBytes <= 227 * 1024 && kLargeBytes <= 163 * 1024);
  static_assert(sizeof(DkDvStorage<Small>) <= kSmallSharedMemory);
  int limit = kSmallSharedMemory;
  if constexpr (kAllBytes > kSmallSharedMemory) {
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    }
    if (error != cudaSuccess) return error;
  }
  const bool scale_in_rows = p.scale != nullptr && p.heads != p.kv_heads;
  const bool wants_all = p.dk != nullptr && p.dv != nullptr && p.dq_accum != nullptr && !scale_in_rows;
  const bool serves_bias = !All::kStagedBias || bias_can_be_staged<Traits>(p);
  if (wants_all && serves_bias && kAllBytes <= limit) return launch_dkdv<All>(p, stream);
  if constexpr (kLargeBytes > kSmallSharedMemory) {
    if (limit < kLargeBytes) return launch_dkdv<Small>(p, stream);
  }
  return launch_dkdv<Large>(p, stream);
}

// On a Hopper float32's three products run by wgmma; of half precision the exponentials bound both kernels alike.
template <class Traits>
cudaError_t launch_dbias_for_device(const BackwardParams& p, cudaStream_t stream) {
  if constexpr (Traits::kHeadDim == 32 && Traits::kPlanes == 2) {
    bool is_served = false;
    const cudaError_t error = sm90::launch_narrow_dbias<Traits, float>(p, &is_served, stream);
    if (is_served || error != cudaSuccess) return error;
  }
  return launch_dbias<Traits>(p, stream);
}

template <class Element, class BiasValue>
cudaError_t launch_backward_pair_for_device(const BackwardParams& p, cudaStream_t stream) {
  if (p.num_keys > pair::kMaxBackwardKeys) return cudaErrorInvalidValue;
  return sm90::serves_backward_pair<Element, BiasValue>() ? sm90::launch_backward_pair<Element, BiasValue>(p, stream)
                                                          : launch_backward_pair<Element, BiasValue>(p, stream);
}

template <class Traits>
cudaError_t launch_backward(const BackwardParams& p, cudaStream_t stream) {
  using Block = ScoreBlock<Traits>;
  cudaError_t error = cudaSuccess;
  if constexpr (Traits::kHasBias && !Traits::kToeplitz) {
    if (p.dk != nullptr || p.dv != nullptr || p.dq_accum != nullptr || p.pair_kernels) {
      error = launch_pack_bias<typename Traits::Element, true>(p, stream);
      if (error != cudaSuccess) return error;
    }
  }
  if constexpr (Traits::kHasBias && Traits::kHeadDim == pair::kHeadDim && !Traits::kFloat && !Traits::kToeplitz) {
    if (p.pair_kernels) {
      using Element = typename Traits::Element;
      error = p.bias_is_float32 ? launch_backward_pair_for_device<Element, float>(p, stream)
                                : launch_backward_pair_for_device<Element, Element>(p, stream);
      return error != cudaSuccess || p.dbias == nullptr ? error : launch_dbias_for_device<Traits>(p, stream);
    }
  }
  static_assert(sizeof(DqStorage<Traits>) <= kSmallSharedMemory);
  error = backward::launch_prologue<Traits>(p, stream);
  if (error != cudaSuccess) return error;
  if (p.dk != nullptr || p.dv != nullptr || p.dq_accum != nullptr) {
    error = launch_dkdv_for_device<Traits>(p, stream);
    if (error != cudaSuccess) return error;
  }
  if (p.dq_accum == nullptr && (p.dq != nullptr || p.dscale_rows != nullptr)) {
    const int64_t blocks = static_cast<int64_t>(ceil_div(p.num_queries, Block::kQueries)) * p.heads * p.b1 * p.b0;
    error = launch_blocks<backward_dq_kernel<Traits>>(p, blocks, Block::kThreads, sizeof(DqStorage<Traits>), stream);
    if (error != cudaSuccess) return error;
  }
  if constexpr (Traits::kToeplitz) {
    if (p.dbias != nullptr) return launch_ddiagonals<Traits>(p, stream);
  } else if constexpr (Traits::kHasBias) {
    if (p.dbias != nullptr) return launch_dbias_for_device<Traits>(p, stream);
  }
  return cudaSuccess;
}

}  // namespace fcsa::sm80
