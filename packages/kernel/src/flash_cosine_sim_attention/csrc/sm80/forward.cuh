// Launches the forward pass for compute capability 8.0 and up: the norm's prologue, then one fused kernel.
#pragma once

#include "../common/launch.cuh"
#include "forward_kernel.cuh"
#include "pair_forward.cuh"

namespace fcsa::sm80 {

// Factors of all keys, and of the queries where they are not computed from the tile in flight; unit copies if wanted.
template <class Traits>
cudaError_t launch_norms(const ForwardParams& p, cudaStream_t stream) {
  using Element = typename Traits::Element;
  if (!p.l2norm_qk) return cudaSuccess;
  if (p.q_rnorm == nullptr || p.k_rnorm == nullptr || (p.q_unit == nullptr) != (p.k_unit == nullptr)) return cudaErrorInvalidValue;
  if (p.k_unit == nullptr && p.groups != 1) return cudaErrorInvalidValue;
  if (p.q_unit != nullptr) {
    const cudaError_t error = launch_l2norm_forward<Element, Element, Traits::kHeadDim>(q_norm_params(p, p.q_rnorm, p.q_unit), stream);
    if (error != cudaSuccess) return error;
  }
  return launch_l2norm_forward<Element, Element, Traits::kHeadDim>(k_norm_params(p, p.k_rnorm, p.k_unit), stream);
}

// Copies of float32 tensors as halves: unit q and k, and v; hi and lo, or hi alone.
template <class Traits>
cudaError_t launch_half_copies(const ForwardParams& p, cudaStream_t stream) {
  if (p.q_unit == nullptr || p.k_unit == nullptr || p.v_split == nullptr || p.v_largest == nullptr)
    return cudaErrorInvalidValue;
  L2NormParams q = q_norm_params(p, p.q_rnorm, p.q_unit), k = k_norm_params(p, p.k_rnorm, p.k_unit);
  q.normalize = k.normalize = p.l2norm_qk;
  using Unit = std::conditional_t<Traits::kSplit, SplitHalf, __half>;
  if (cudaError_t error = launch_l2norm_forward<float, Unit, Traits::kHeadDim>(q, stream); error != cudaSuccess) return error;
  if (cudaError_t error = launch_l2norm_forward<float, Unit, Traits::kHeadDim>(k, stream); error != cudaSuccess) return error;
  return launch_split<!Traits::kSplit>(v_split_params(p, p.v_largest, p.v_split), stream);
}

inline Strides contiguous_strides(const Problem& p, int64_t num_heads, int64_t num_rows, int64_t row) {
  const int64_t head = num_rows * row;
  return {p.b1 * num_heads * head, num_heads * head, head, row};
}

// The problem as the kernel sees it: where there are copies, they are the queries, keys and values.
template <class Traits>
ForwardParams with_copies(ForwardParams p) {
  const int row = Traits::kSplit ? 2 * p.head_dim : p.head_dim;
  if (p.q_unit != nullptr) p.q = p.q_unit, p.q_strides = contiguous_strides(p, p.heads, p.num_queries, row);
  if (p.k_unit != nullptr) p.k = p.k_unit, p.k_strides = contiguous_strides(p, p.kv_heads, p.num_keys, row);
  if (Traits::kFloat) p.v = p.v_split, p.v_strides = contiguous_strides(p, p.kv_heads, p.num_keys, row);
  return p;
}

template <class Config, Bias kBias>
cudaError_t launch_forward_kernel(const ForwardParams& p, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(ceil_div(p.num_queries, Config::kBlockM)) * p.heads * p.b1 * p.b0;
  constexpr int kBytes = sizeof(ForwardSmem<Config>);
  static_assert(kBytes <= 99 * 1024, "what a block may use on every device from compute capability 8.0 on");
  return launch_blocks<forward_kernel<Config, kBias>>(with_copies<Config>(p), blocks, Config::kThreads, kBytes, stream);
}

template <class Config>
cudaError_t launch_with_bias(const ForwardParams& p, cudaStream_t stream) {
  if constexpr (Config::kToeplitz) {
    if (p.bias == nullptr || !p.bias_is_float32) return cudaErrorInvalidValue;
    return launch_forward_kernel<Config, Bias::kToeplitz>(p, stream);
  } else {
    if constexpr (Config::kSoftmax == Softmax::kRunningMax) {
      // Where the elements are float32 the bias is as well.
      if (p.bias != nullptr && (Config::kFloat || p.bias_is_float32))
        return launch_forward_kernel<Config, Bias::kFloat32>(p, stream);
      if constexpr (!Config::kFloat) {
        if (p.bias != nullptr) return launch_forward_kernel<Config, Bias::kElement>(p, stream);
      }
    }
    return launch_forward_kernel<Config, Bias::kNone>(p, stream);
  }
}

template <class Element, class BiasValue>
cudaError_t launch_forward_pair(const ForwardParams& p, cudaStream_t stream) {
  const pair::Rows rows = pair::rows_of(p);
  // The queries of a row in one block where they fit: the fewer blocks share a row, the less often its keys are normalised.
  if (p.num_queries <= 128)
    return launch_forward_pair_kernel<pair::ForwardPairConfig<Element, BiasValue, 4>>(p, rows, stream);
  if (p.num_queries > 256 && p.num_queries <= 384)
    return launch_forward_pair_kernel<pair::ForwardPairConfig<Element, BiasValue, 12>>(p, rows, stream);
  return launch_forward_pair_kernel<pair::ForwardPairConfig<Element, BiasValue, 8>>(p, rows, stream);
}

template <class Traits>
cudaError_t launch_forward(const ForwardParams& p, cudaStream_t stream) {
  if (p.head_dim > Traits::kHeadDim || p.head_dim % 8 != 0) return cudaErrorInvalidValue;
  using Element = typename Traits::Element;
  if constexpr (Traits::kSoftmax == Softmax::kRunningMax && !Traits::kToeplitz) {
    if (cudaError_t error = launch_pack_bias<Element, false>(p, stream); error != cudaSuccess) return error;
  }
  if constexpr (Traits::kHeadDim == pair::kHeadDim && !Traits::kFloat && !Traits::kToeplitz &&
                Traits::kSoftmax == Softmax::kRunningMax) {
    if (p.pair_kernels) {
      return p.bias_is_float32 ? launch_forward_pair<Element, float>(p, stream) : launch_forward_pair<Element, Element>(p, stream);
    }
  }
  if (p.bias != nullptr && Traits::kSoftmax == Softmax::kBounded) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  if constexpr (Traits::kFloat) {
    error = launch_half_copies<Traits>(p, stream);
  } else {
    error = launch_norms<Traits>(p, stream);
  }
  if (error != cudaSuccess) return error;
  if (static_cast<int64_t>(p.num_queries) * p.heads * p.b1 * p.b0 == 0) return cudaSuccess;
  return launch_with_bias<ForwardConfig<Traits>>(p, stream);
}

}  // namespace fcsa::sm80
