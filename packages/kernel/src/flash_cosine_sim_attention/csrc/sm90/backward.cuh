// Launcher of the Hopper backward: launches, in order, each starting while the one before it ends.
//
//   prologue             query_rows, zeros in dq_accum; copies of q and k, where the norm is not folded
//   backward_kernel      dk, dv, dq_accum
//   backward_dq_kernel   dq, dscale_rows
#pragma once

#include "../common/backward_prologue.cuh"
#include "../common/launch.cuh"
#include "backward_kernel.cuh"

namespace fcsa::sm90 {

template <class Traits>
cudaError_t make_maps(BackwardMaps* maps, const BackwardParams& p) {
  using Element = typename Traits::Element;
  const int32_t q_sizes[5] = {p.b0, p.b1, p.heads, p.num_queries, p.head_dim};
  const cudaError_t error = make_input_maps<Element>(maps, p, Traits::kBlockQ, Traits::kBlockK);
  if (error != cudaSuccess) return error;
  return make_tensor_map<Element>(&maps->dout, p.dout, p.dout_strides, q_sizes, Traits::kBlockQ);
}

// Whether a block of threads takes blocks of keys one after another (BlockWalk). That pays, by 2 %, where all are equally long and
// there are many a head; else the hardware deals them out better, by 1 to 5 % (docs/decisions.md).
inline bool blocks_persist(const Problem& p, int num_tiles) { return !p.causal && num_tiles >= 32; }

// Both kernels behind the prologue start early: see where they wait_for_prologue().
template <class Traits, bool kWantsDq, bool kOrdered>
cudaError_t launch_main(const BackwardParams& p, cudaStream_t stream) {
  BackwardMaps maps;
  cudaError_t error = make_maps<Traits>(&maps, p);
  if (error != cudaSuccess) return error;
  const int64_t blocks = static_cast<int64_t>(ceil_div(p.num_keys, Traits::kBlockK)) * p.kv_heads * p.b1 * p.b0;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr int kBytes = sizeof(BackwardStorage<Traits>);
  static_assert(kBytes <= 227 * 1024, "shared memory of a block on sm_90");
  constexpr auto kKernel = backward_kernel<Traits, kWantsDq, kOrdered>;
  error = allow_shared_memory<kKernel>(kBytes);
  if (error != cudaSuccess) return error;
  int processors = 0;
  error = multiprocessor_count(&processors);
  if (error != cudaSuccess) return error;
  // In order, a block of threads takes one block of keys: nobody then waits for one that finds no multiprocessor free.
  const bool persistent = !kOrdered && blocks_persist(p, ceil_div(p.num_keys, Traits::kBlockK));
  return launch_early<kKernel>(static_cast<int>(persistent && blocks > processors ? processors : blocks), Traits::kThreads,
                               kBytes, stream, p, maps);
}

template <class Traits>
cudaError_t launch_dq(const BackwardParams& p, cudaStream_t stream) {
  const int64_t blocks = static_cast<int64_t>(ceil_div(p.num_queries, kSquare)) * p.heads * p.b1 * p.b0;
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  constexpr auto kKernel = backward_dq_kernel<Traits>, kGrouped = backward_grouped_dq_kernel<Traits>;
  return p.l2norm_qk && p.groups > 1 ? launch_early<kGrouped>(static_cast<int>(blocks), 128, 0, stream, p)
                                     : launch_early<kKernel>(static_cast<int>(blocks), 128, 0, stream, p);
}

// dk of query heads with scales of their own that share a kv head is not served: a scale of 0 would need care.
template <class Traits>
cudaError_t launch_backward(const BackwardParams& p, cudaStream_t stream) {
  if (p.scale != nullptr && p.heads != p.kv_heads) return cudaErrorNotSupported;
  const bool wants_dq = p.dq != nullptr || p.dscale_rows != nullptr, ordered = p.dq_progress != nullptr;
  if (wants_dq != (p.dq_accum != nullptr) || (wants_dq && p.deterministic != ordered)) return cudaErrorInvalidValue;
  cudaError_t error = backward::launch_prologue<Traits>(p, stream);
  if (error != cudaSuccess) return error;
  if (!wants_dq) {
    return p.dk != nullptr || p.dv != nullptr ? launch_main<Traits, false, false>(p, stream) : cudaSuccess;
  }
  error = ordered ? launch_main<Traits, true, true>(p, stream) : launch_main<Traits, true, false>(p, stream);
  if (error != cudaSuccess) return error;
  return launch_dq<Traits>(p, stream);
}

}  // namespace fcsa::sm90
