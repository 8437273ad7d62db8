// dq without atomics, for bit-equal results: one block of threads owns 64 queries and walks over the keys.
//
//   dS' (queries x keys)        as in backward_scores.cuh, times k_factor
//   dq += dS' K                 dS' goes from accumulators to operands in registers
#pragma once

#include "backward_dq_accum.cuh"
#include "backward_scores.cuh"

namespace fcsa::sm80 {

template <class Traits>
union DqStorage {
  typename ScoreBlock<Traits>::Smem loop;
  float dq[ScoreBlock<Traits>::kQueries * (Traits::kHeadDim + 8)];
};

template <class Traits>
__global__ void __launch_bounds__(ScoreBlock<Traits>::kThreads)
    backward_dq_kernel(const __grid_constant__ BackwardParams p) {
  using Block = ScoreBlock<Traits>;
  using Element = typename Traits::Element;
  using Operand = typename Traits::Operand;
  constexpr int kPlanes = Traits::kPlanes;
  constexpr int kColumns = Traits::kHeadDim / 8, kStride = Traits::kHeadDim + 8;
  extern __shared__ __align__(128) char shared_memory[];
  DqStorage<Traits>& storage = *reinterpret_cast<DqStorage<Traits>*>(shared_memory);
  typename Block::Smem& smem = storage.loop;
  const TileIndex head = TileIndex::from_block(blockIdx.x, ceil_div(p.num_queries, Block::kQueries), p.heads, p.b1);
  const TileIndex kv_head = kv_head_of(p, head);
  const int query0 = head.tile * Block::kQueries, lane = threadIdx.x % 32;

  const BiasReader<Traits> bias(p, head);
  float dq[1][kColumns][4];
  set_zero(dq);
  const int num_blocks = Block::num_key_blocks(p, query0);
  if (num_blocks > 0) Block::load_queries(smem, p, head, query0);
#pragma unroll 1
  for (int block = 0; block < num_blocks; ++block) {
    Block::load_keys(smem, p, kv_head, block * Block::kKeys);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    float ds[1][Block::kN][4];
    uint32_t operand[Block::kN / 2][kPlanes][4];
    const int key0 = block * Block::kKeys;
    Block::compute_ds(ds, smem, p, query0, key0, [&](int half, int n, int c) {
      return bias(query0 + Block::row_of(half), key0 + Block::column_of(n, c));
    });
#pragma unroll
    for (int n = 0; n < Block::kN; ++n) {
#pragma unroll
      for (int r = 0; r < 4; ++r) ds[0][n][r] *= smem.keys[8 * n + lane % 4 * 2 + r % 2].factor;
    }
    to_operand<Operand, kPlanes>(operand, ds);
    const RowsReader<typename Block::KeyTile> k(smem.k, 0, 0);
#pragma unroll
    for (int i = 0; i < Block::kN / 2; ++i) multiply_step<Operand, kPlanes, 1>(dq, operand[i], k, 16 * i);
    __syncthreads();  // nobody reads k and v any more
  }

#pragma unroll
  for (int n = 0; n < kColumns; ++n) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = threadIdx.x / 32 * 16 + 8 * half + lane / 4;
      *reinterpret_cast<float2*>(storage.dq + row * kStride + 8 * n + lane % 4 * 2) =
          make_float2(dq[0][n][2 * half], dq[0][n][2 * half + 1]);
    }
  }
  __syncthreads();
  const auto rows =
      backward::projected_queries<Traits>(p, head, query0, min(Block::kQueries, p.num_queries - query0));
  backward::project_rows<Element, Traits::kHeadDim, Block::kQueries, backward::BlockTeam<Block::kThreads>>(
      storage.dq, kStride, rows);
}

}  // namespace fcsa::sm80
