// The accumulator of dq: where its floats lie, and the kernel that makes dq of it.
//
// dq of a query block is laid out as the accumulators of the main kernel's threads lie, so that the additions of a warp
// are contiguous: four floats a thread where there are vector reductions, else one.
#pragma once

#include "../common/backward_project.cuh"
#include "backward_traits.cuh"
#include "backward_tiles.cuh"

namespace fcsa::sm80 {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kVectorReductions = true;
#else
constexpr bool kVectorReductions = false;
#endif

template <int kThreads>
__device__ __forceinline__ int fragment_offset(int fragment, int r) {
  return kVectorReductions ? (fragment * kThreads + threadIdx.x) * 4 + r
                           : (fragment * 4 + r) * kThreads + threadIdx.x;
}

template <int kThreads>
__device__ __forceinline__ void add_fragment(float* block, int fragment, const float (&x)[4]) {
  ptx::reduce_add_4(block + fragment_offset<kThreads>(fragment, 0), kThreads, x);
}

// The floats of one query block, kBlockQ * kHeadDim of them.
template <class Config>
__device__ __forceinline__ float* dq_accum_block(const BackwardParams& p, const TileIndex& head, int q_block) {
  const int64_t row = head.first_row(p.b1, p.heads, padded_queries(p.num_queries)) + q_block * Config::kBlockQ;
  return p.dq_accum + row * Config::kHeadDim;
}

template <class Config>
constexpr int kDqPostprocessStride = Config::kHeadDim + 8;  // spreads the rows of a fragment over the banks

// One block of threads a query block, threads laid over it as in the main kernel.
template <class Config>
__global__ void __launch_bounds__(Config::kThreads)
    backward_dq_postprocess_kernel(const __grid_constant__ BackwardParams p) {
  using Element = typename Config::Element;
  extern __shared__ __align__(128) char shared_memory[];
  float* tile = reinterpret_cast<float*>(shared_memory);
  const TileIndex index =
      TileIndex::from_block(blockIdx.x, ceil_div(p.num_queries, Config::kBlockQ), p.heads, p.b1);
  const int query0 = index.tile * Config::kBlockQ, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const float* block = dq_accum_block<Config>(p, index, index.tile);
#pragma unroll
  for (int m = 0; m < Config::kDqRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < 2 * Config::kDqColumnPairs; ++n) {
      const int fragment = m * 2 * Config::kDqColumnPairs + n;
      const int row = (warp / Config::kDqWarpsN * Config::kDqRowTiles + m) * 16 + lane / 4;
      const int column = 16 * (n / 2 * Config::kDqWarpsN + warp % Config::kDqWarpsN) + n % 2 * 8 + lane % 4 * 2;
      float x[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) x[r] = block[fragment_offset<Config::kThreads>(fragment, r)];
      float* target = tile + row * kDqPostprocessStride<Config> + column;
      *reinterpret_cast<float2*>(target) = make_float2(x[0], x[1]);
      *reinterpret_cast<float2*>(target + 8 * kDqPostprocessStride<Config>) = make_float2(x[2], x[3]);
    }
  }
  __syncthreads();
  const auto rows =
      backward::projected_queries<Config>(p, index, query0, min(Config::kBlockQ, p.num_queries - query0));
  backward::project_rows<Element, Config::kHeadDim, Config::kBlockQ, backward::BlockTeam<Config::kThreads>>(
      tile, kDqPostprocessStride<Config>, rows);
}

}  // namespace fcsa::sm80
