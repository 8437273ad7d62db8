// Copies that the backward multiplies instead of q, k, v and dout as given.
#pragma once

#include "../norm/l2norm_forward.cuh"
#include "backward_split.cuh"

namespace fcsa::backward {

// Unit copies of q and k where they are wanted; of float32 always, normalised or not, and v and dout as halves too.
template <class Traits>
cudaError_t launch_copies(const BackwardParams& p, cudaStream_t stream) {
  using Element = typename Traits::Element;
  using Unit = std::conditional_t<Traits::kPlanes == 2, SplitHalf, typename Traits::Operand>;
  const bool needs_copies = Traits::kFloat || (p.l2norm_qk && (Traits::kExactCopies || p.groups > 1));
  if (p.q_unit == nullptr) return needs_copies ? cudaErrorInvalidValue : cudaSuccess;
  L2NormParams q = q_norm_params(p, nullptr, p.q_unit), k = k_norm_params(p, nullptr, p.k_unit);
  q.normalize = k.normalize = p.l2norm_qk;
  q.exact = k.exact = Traits::kExactCopies && p.groups == 1;
  cudaError_t error = launch_l2norm_forward<Element, Unit, Traits::kHeadDim>(q, stream);
  if (error != cudaSuccess) return error;
  error = launch_l2norm_forward<Element, Unit, Traits::kHeadDim>(k, stream);
  if (error != cudaSuccess || !Traits::kFloat) return error;
  error = launch_split<Traits::kPlanes == 1>(v_split_params(p, p.v_largest, p.v_split), stream);
  if (error != cudaSuccess) return error;
  return launch_split_dout<Traits>(p, stream);
}

}  // namespace fcsa::backward
