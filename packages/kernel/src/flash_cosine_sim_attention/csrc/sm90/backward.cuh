// Launcher of the Hopper backward: launches, in order.
//
//   l2norm_forward       unit copies of q and k, where the norm is not folded
//   preprocess           query_rows, zeros in dq_accum
//   backward_kernel      dk, dv, dq_accum
//   backward_dq_kernel   dq, dscale_rows          or, deterministic: that of sm80
#pragma once

#include "../common/backward_copies.cuh"
#include "../sm80/backward_dq.cuh"
#include "../common/launch.cuh"
#include "backward_kernel.cuh"

namespace fcsa::sm90 {

template <class Traits>
cudaError_t make_maps(BackwardMaps* maps, const BackwardParams& p) {
  using Element = typename Traits::Element;
  const int32_t q_sizes[5] = {p.b0, p.b1, p.heads, p.num_queries, p.head_dim};
  const int32_t k_sizes[5] = {p.b0, p.b1, p.kv_heads, p.num_keys, p.head_dim};
  const auto contiguous = [&](int64_t heads, int64_t rows) {
    return Strides{p.b1 * heads * rows * p.head_dim, heads * rows * p.head_dim, rows * p.head_dim, p.head_dim};
  };
  const bool copies = p.q_unit != nullptr;
  const Strides q_strides = copies ? contiguous(p.heads, p.num_queries) : p.q_strides;
  const Strides k_strides = copies ? contiguous(p.kv_heads, p.num_keys) : p.k_strides;
  cudaError_t error = make_tensor_map<Element>(&maps->q, copies ? p.q_unit : p.q, q_strides, q_sizes, Traits::kBlockQ);
  if (error != cudaSuccess) return error;
  error = make_tensor_map<Element>(&maps->dout, p.dout, p.dout_strides, q_sizes, Traits::kBlockQ);
  if (error != cudaSuccess) return error;
  error = make_tensor_map<Element>(&maps->k, copies ? p.k_unit : p.k, k_strides, k_sizes, Traits::kBlockK);
  if (error != cudaSuccess) return error;
  return make_tensor_map<Element>(&maps->v, p.v, p.v_strides, k_sizes, Traits::kBlockK);
}

template <class Traits, bool kWantsDq>
cudaError_t launch_main(const BackwardParams& p, cudaStream_t stream) {
  BackwardMaps maps;
  cudaError_t error = make_maps<Traits>(&maps, p);
  if (error != cudaSuccess) return error;
  const int64_t blocks = static_cast<int64_t>(ceil_div(p.num_keys, Traits::kBlockK)) * p.kv_heads * p.b1 * p.b0;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kBytes = sizeof(BackwardStorage<Traits>);
  static_assert(kBytes <= 227 * 1024, "shared memory of a block on sm_90");
  error = allow_shared_memory<backward_kernel<Traits, kWantsDq>>(kBytes);
  if (error != cudaSuccess) return error;
  backward_kernel<Traits, kWantsDq><<<static_cast<uint32_t>(blocks), Traits::kThreads, kBytes, stream>>>(p, maps);
  return cudaGetLastError();
}

template <class Traits>
cudaError_t launch_dq(const BackwardParams& p, cudaStream_t stream) {
  const int64_t heads = static_cast<int64_t>(p.heads) * p.b1 * p.b0;
  if (p.dq_accum != nullptr) {
    return launch_blocks<backward_dq_kernel<Traits>>(p, ceil_div(p.num_queries, kSquare) * heads, 128, 0, stream);
  }
  using Portable = sm80::BackwardTraits<typename Traits::Element, Traits::kHeadDim, false>;
  using Block = sm80::ScoreBlock<Portable>;
  return launch_blocks<sm80::backward_dq_kernel<Portable>>(
      p, ceil_div(p.num_queries, Block::kQueries) * heads, Block::kThreads, sizeof(sm80::DqStorage<Portable>), stream);
}

// dk of query heads with scales of their own that share a kv head is not served: a scale of 0 would need care.
template <class Traits>
cudaError_t launch_backward(const BackwardParams& p, cudaStream_t stream) {
  if (p.scale != nullptr && p.heads != p.kv_heads) return cudaErrorNotSupported;
  cudaError_t error = backward::launch_copies<Traits>(p, stream);
  if (error != cudaSuccess) return error;
  error = backward::launch_preprocess<Traits>(p, stream);
  if (error != cudaSuccess) return error;
  if (p.dq_accum != nullptr) {
    error = launch_main<Traits, true>(p, stream);
  } else if (p.dk != nullptr || p.dv != nullptr) {
    error = launch_main<Traits, false>(p, stream);
  }
  if (error != cudaSuccess) return error;
  return p.dq != nullptr || p.dscale_rows != nullptr ? launch_dq<Traits>(p, stream) : cudaSuccess;
}

}  // namespace fcsa::sm90
