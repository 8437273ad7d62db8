// Epilogue of the Hopper backward: dk and dv of a block of keys, from the accumulators to device memory.
#pragma once

#include "../common/backward_project.cuh"
#include "backward_rows.cuh"
#include "backward_scores.cuh"

namespace fcsa::sm90 {

constexpr int kEpilogueBarrier = 2;

template <class Traits>
struct ConsumerTeam {
  static constexpr int kThreads = Traits::kConsumerThreads;
  __device__ static __forceinline__ int thread() { return threadIdx.x - 128; }
  __device__ static __forceinline__ void sync() { named_barrier_sync(kEpilogueBarrier, kThreads); }
};

// A thread's accumulators into its rows of a kBlockK x kHeadDim tile.
template <class Traits>
__device__ __forceinline__ void stage_keys(float* tile, const float (&acc)[Traits::kHeadDim / 2],
                                           const KeyThread<Traits>& thread) {
  constexpr int kStride = BackwardStorage<Traits>::kStride;
#pragma unroll
  for (int i = 0; i < Traits::kHeadDim / 8; ++i) {
    float* target = tile + thread.row * kStride + i * 8 + thread.column;
    *reinterpret_cast<float2*>(target) = make_float2(acc[4 * i], acc[4 * i + 1]);
    *reinterpret_cast<float2*>(target + 8 * kStride) = make_float2(acc[4 * i + 2], acc[4 * i + 3]);
  }
}

template <class Traits>
__device__ __forceinline__ void write_dv(const float* tile, const BackwardParams& p, const BlockOfKeys<Traits>& block) {
  using Element = typename Traits::Element;
  constexpr int kChunks = Traits::kHeadDim / 8;
  Element* target = static_cast<Element*>(p.dv) + block.index.offset(p.dv_strides) + block.first_key * p.dv_strides.row;
  const uint8_t* mask = mask_row(p, block.index);
  for (int i = threadIdx.x - 128; i < block.num_keys * kChunks; i += Traits::kConsumerThreads) {
    const int row = i / kChunks, column = i % kChunks * 8;
    if (column >= p.head_dim) continue;
    float x[8] = {};
    const bool visible = mask == nullptr || mask[(block.first_key + row) * p.mask_key] != 0;
    if (visible) load8(x, tile + row * BackwardStorage<Traits>::kStride + column);
    store8(target + row * p.dv_strides.row + column, x);
  }
}

// Several groups: through shared memory. All consumers, when the products of all of them are done.
template <class Traits>
__device__ __forceinline__ void write_grouped_gradients(const BackwardParams& p, const BlockOfKeys<Traits>& block,
                                                        const KeyThread<Traits>& thread,
                                                        typename BackwardStorage<Traits>::Epilogue& smem,
                                                        const RowAccumulators<Traits>& dk,
                                                        const RowAccumulators<Traits>& dv) {
  using Team = ConsumerTeam<Traits>;
  Team::sync();  // nobody reads the tiles of the loop any more
  stage_keys<Traits>(smem.dk, dk, thread);
  stage_keys<Traits>(smem.dv, dv, thread);
  Team::sync();
  if (p.dv != nullptr) write_dv<Traits>(smem.dv, p, block);
  if (p.dk != nullptr) {
    const auto rows =
        backward::projected_keys<Traits>(p, block.index, block.first_key, block.num_keys, mask_row(p, block.index));
    backward::project_rows<typename Traits::Element, Traits::kHeadDim, Traits::kBlockK, Team>(
        smem.dk, BackwardStorage<Traits>::kStride, rows);
  }
}

// A warpgroup, when its products are done: shared memory is given back to the producer as soon as it is not needed any more.
template <class Traits>
__device__ __forceinline__ void write_gradients(const BackwardParams& p, const BlockOfKeys<Traits>& block,
                                                const KeyThread<Traits>& thread,
                                                BackwardStorage<Traits>& smem, const RowAccumulators<Traits>& dk,
                                                const RowAccumulators<Traits>& dv) {
  const bool grouped = p.l2norm_qk && p.groups > 1;
  if (grouped) {
    write_grouped_gradients<Traits>(p, block, thread, smem.epilogue, dk, dv);
    fence_async_shared();
    __syncwarp();
  }
  if (threadIdx.x % 32 == 0) arrive(smem.empty_kv);
  if (grouped) return;
  using Element = typename Traits::Element;
  const auto rows =
      backward::projected_keys<Traits>(p, block.index, block.first_key, block.num_keys, mask_row(p, block.index));
  RowPair<Traits> pair(rows, thread.warpgroup * kSquare, thread.thread);
  if (p.dv != nullptr) {
    Element* target = static_cast<Element*>(p.dv) + block.index.offset(p.dv_strides) + block.first_key * p.dv_strides.row;
    write_rows<Traits>(dv, pair, target, p.dv_strides.row, p.head_dim);
  }
  if (p.dk == nullptr) return;
  pair.load(rows);  // no earlier: while dk and dv are in registers it would be spilled
  project_and_write_rows<Traits>(dk, pair, rows);
}

}  // namespace fcsa::sm90
