// float32: the copies as halves that the backward multiplies instead of q, k, v and dout.
#pragma once

#include "../norm/l2norm_forward.cuh"
#include "backward_split.cuh"

namespace fcsa::backward {

template <class Traits>
cudaError_t launch_copies(const BackwardParams& p, cudaStream_t stream) {
  using Unit = std::conditional_t<Traits::kPlanes == 2, SplitHalf, typename Traits::Operand>;
  if (p.q_unit == nullptr || p.k_unit == nullptr) return cudaErrorInvalidValue;
  L2NormParams q = q_norm_params(p, nullptr, p.q_unit), k = k_norm_params(p, nullptr, p.k_unit);
  q.normalize = k.normalize = p.l2norm_qk;
  cudaError_t error = launch_l2norm_forward<float, Unit, Traits::kHeadDim>(q, stream);
  if (error != cudaSuccess) return error;
  error = launch_l2norm_forward<float, Unit, Traits::kHeadDim>(k, stream);
  if (error != cudaSuccess) return error;
  error = launch_split<Traits::kPlanes == 1>(v_split_params(p, p.v_largest, p.v_split), stream);
  if (error != cudaSuccess) return error;
  return launch_split_dout<Traits>(p, stream);
}

}  // namespace fcsa::backward
