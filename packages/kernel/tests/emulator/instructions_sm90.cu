// Small kernels that show what the instructions of sm90/ do; test_instructions_sm90.py runs them on a GPU and in the emulator.
#include "sm80/smem_tile.cuh"
#include "sm90/forward_producer.cuh"
#include "sm90/narrow_tile.cuh"
#include "sm90/wgmma.cuh"
#include "common/vectorized.cuh"

namespace fcsa::sm90 {

constexpr int kK = 128;

template <class Tile>
cudaError_t make_map(TensorMap* map, const void* data) {  // of a contiguous (kRows, kCols) matrix
  const int32_t sizes[5] = {1, 1, 1, Tile::kRows, Tile::kCols};
  return make_tensor_map<typename Tile::Element>(map, data, Strides{8, 8, 8, Tile::kCols}, sizes, Tile::kRows);
}

template <int kN>  // rows of the accumulator layout to device memory, (64, kN)
__device__ void store(float* target, const float (&d)[kN / 2]) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < kN / 2; ++i) target[(row + i / 2 % 2 * 8) * kN + i / 4 * 8 + column + i % 2] = d[i];
}

template <class ATile, class BTile>
struct ProductStorage {
  ATile a;
  BTile b;
  uint64_t full;
};

template <class Storage>
__device__ void load_both(Storage& smem, const TensorMap& a, const TensorMap& b) {
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full, 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
    arrive_and_expect(smem.full, sizeof(smem.a.data) + sizeof(smem.b.data));
    load_tile(smem.a, a, 0, 0, 0, 0, smem.full);
    load_tile(smem.b, b, 0, 0, 0, 0, smem.full);
  }
  __syncthreads();
  wait(smem.full, 0);
}

// D (64, kN) = A B^T. A: (64, kK) or, transposed, (kK, 64); B: (kN, kK) or (kK, kN).
template <class Element, int kN, bool kTransposeA, bool kTransposeB>
struct ProductTraits {
  using ATile = std::conditional_t<kTransposeA, PanelTile<Element, kK, 64>, PanelTile<Element, 64, kK>>;
  using BTile = std::conditional_t<kTransposeB, PanelTile<Element, kK, kN>, PanelTile<Element, kN, kK>>;
  using Storage = ProductStorage<ATile, BTile>;
};

template <class Element, int kN, bool kTransposeA, bool kTransposeB>
__global__ void __launch_bounds__(128)
    product_kernel(float* d_out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<typename ProductTraits<Element, kN, kTransposeA, kTransposeB>::Storage*>(raw);
  load_both(smem, a, b);
  float d[kN / 2];
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) d[i] = 0.0f;
  wgmma_fence();
#pragma unroll
  for (int k = 0; k < kK; k += 16) {
    const uint64_t left = kTransposeA ? smem.a.descriptor_transposed(k) : smem.a.descriptor(0, k);
    const uint64_t right = kTransposeB ? smem.b.descriptor_transposed(k) : smem.b.descriptor(0, k);
    wgmma_ss<Element, true, kTransposeA, kTransposeB>(d, left, right);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store<kN>(d_out, d);
}

template <class Element, int kN, bool kTransposeA, bool kTransposeB>
cudaError_t product(const void* a, const void* b, float* d) {
  using Traits = ProductTraits<Element, kN, kTransposeA, kTransposeB>;
  constexpr int kBytes = sizeof(typename Traits::Storage);
  TensorMap a_map, b_map;
  cudaError_t error = make_map<typename Traits::ATile>(&a_map, a);
  if (error == cudaSuccess) error = make_map<typename Traits::BTile>(&b_map, b);
  if (error != cudaSuccess) return error;
  const auto kernel = product_kernel<Element, kN, kTransposeA, kTransposeB>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<1, 128, kBytes, 0>>>(d, a_map, b_map);
  return cudaGetLastError();
}

template <class Element, int kN>
cudaError_t product_of(bool transpose_a, bool transpose_b, const void* a, const void* b, float* d) {
  if (transpose_a && transpose_b) return product<Element, kN, true, true>(a, b, d);
  if (transpose_a) return product<Element, kN, true, false>(a, b, d);
  if (transpose_b) return product<Element, kN, false, true>(a, b, d);
  return product<Element, kN, false, false>(a, b, d);
}

// D (64, 72) = A [V | ones]: A (64, kK) from registers, V (kK, 64), the last eight columns from a panel of ones of 16 rows.
struct SumStorage {
  PanelTile<__nv_bfloat16, 64, kK> a;
  PanelTile<__nv_bfloat16, kK, 64> b;
  alignas(1024) __nv_bfloat16 ones[16 * 64];
  uint64_t full;
};

__global__ void __launch_bounds__(128)
    sum_kernel(float* d_out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<SumStorage*>(raw);
  for (int i = threadIdx.x; i < 16 * 64; i += 128) smem.ones[i] = __float2bfloat16(1.0f);
  fence_async_shared();
  load_both(smem, a, b);
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane % 16;
  uint32_t words[kK / 16][4];
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) load_matrix_x4(words[step], smem.a.chunk(row, step * 16 + lane / 16 * 8));
  float d[36];
#pragma unroll
  for (int i = 0; i < 36; ++i) d[i] = 0.0f;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < kK / 16; ++step) {
    wgmma_rs_transposed<__nv_bfloat16, true>(d, words[step], smem.b.descriptor_transposed(step * 16, smem.ones));
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store<72>(d_out, d);
}

cudaError_t product_and_sums(const void* a, const void* b, float* d) {
  TensorMap a_map, b_map;
  cudaError_t error = make_map<decltype(SumStorage::a)>(&a_map, a);
  if (error == cudaSuccess) error = make_map<decltype(SumStorage::b)>(&b_map, b);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(sum_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(SumStorage));
  if (error != cudaSuccess) return error;
  sum_kernel<<<1, 128, sizeof(SumStorage), 0>>>(d, a_map, b_map);
  return cudaGetLastError();
}

// S = A B^T as bfloat16 through shared memory, by stmatrix, into a second product: D (64, 32) = S B[:, :32].
// kTransposed: S is stored as [key][query], and read as a transposed A.
template <bool kTransposed>
struct ChainStorage {
  PanelTile<__nv_bfloat16, 64, 64> a, b, s;
  uint64_t full;
};

template <bool kTransposed>
__global__ void __launch_bounds__(128)
    chain_kernel(float* d_out, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<ChainStorage<kTransposed>*>(raw);
  load_both(smem, a, b);
  float s[32], d[16];
  wgmma_fence();
  wgmma_ss<__nv_bfloat16, false>(s, smem.a.descriptor(0, 0), smem.b.descriptor(0, 0));
#pragma unroll
  for (int k = 16; k < 64; k += 16) wgmma_ss<__nv_bfloat16, true>(s, smem.a.descriptor(0, k), smem.b.descriptor(0, k));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(s);

  const int warp = threadIdx.x / 32, matrix = threadIdx.x % 32 / 8, line = threadIdx.x % 8;
#pragma unroll
  for (int block = 0; block < 4; ++block) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) words[i] = pack<__nv_bfloat16>(s[block * 8 + i * 2], s[block * 8 + i * 2 + 1]);
    const int query = warp * 16 + matrix % 2 * 8, key = block * 16 + matrix / 2 * 8;
    auto* place = const_cast<__nv_bfloat16*>(kTransposed ? smem.s.chunk(key + line, query) : smem.s.chunk(query + line, key));
    kTransposed ? store_matrix_x4_trans(place, words) : store_matrix_x4(place, words);
  }
  fence_async_shared();
  named_barrier_sync(1, 128);

  wgmma_fence();
#pragma unroll
  for (int k = 0; k < 64; k += 16) {
    const uint64_t left = kTransposed ? smem.s.descriptor_transposed(k) : smem.s.descriptor(0, k);
    const uint64_t right = smem.b.descriptor_transposed(k);
    if (k == 0) {
      wgmma_ss<__nv_bfloat16, false, kTransposed, true>(d, left, right);
    } else {
      wgmma_ss<__nv_bfloat16, true, kTransposed, true>(d, left, right);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store<32>(d_out, d);
}

template <bool kTransposed>
cudaError_t chain(const void* a, const void* b, float* d) {
  constexpr int kBytes = sizeof(ChainStorage<kTransposed>);
  TensorMap a_map, b_map;
  cudaError_t error = make_map<PanelTile<__nv_bfloat16, 64, 64>>(&a_map, a);
  if (error == cudaSuccess) error = make_map<PanelTile<__nv_bfloat16, 64, 64>>(&b_map, b);
  if (error != cudaSuccess) return error;
  const auto kernel = chain_kernel<kTransposed>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  kernel<<<1, 128, kBytes, 0>>>(d, a_map, b_map);
  return cudaGetLastError();
}

// D (64, 32) = A B of tiles with 64 bytes a row: A (64, 32) and B as (32, 32) rows of columns; or, transposed, as dq is made:
// A as (64, 64), 128 bytes a row, and B (64, 32).
template <bool kTransposed>
__global__ void __launch_bounds__(128) narrow_kernel(float* d_out, const __nv_bfloat16* a, const __nv_bfloat16* b) {
  extern __shared__ __align__(1024) unsigned char raw[];
  using ATile = sm80::SmemTile<__nv_bfloat16, 64, kTransposed ? 64 : 32>;
  using BTile = sm80::SmemTile<__nv_bfloat16, kTransposed ? 64 : 32, 32>;
  ATile& a_tile = *reinterpret_cast<ATile*>(raw);
  BTile& b_tile = *reinterpret_cast<BTile*>(raw + sizeof(ATile));
  for (int i = threadIdx.x; i < ATile::kRows * ATile::kCols; i += 128) a_tile.at(i / ATile::kCols, i % ATile::kCols) = a[i];
  for (int i = threadIdx.x; i < BTile::kRows * 32; i += 128) b_tile.at(i / 32, i % 32) = b[i];
  fence_async_shared();
  __syncthreads();
  const uint32_t left = operand_address(sm80::ptx::smem_address(&a_tile)), right = operand_address(sm80::ptx::smem_address(&b_tile));
  float d[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) d[i] = 0.0f;
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < (kTransposed ? 4 : 2); ++step) {
    if constexpr (kTransposed) {
      wgmma_ss<__nv_bfloat16, true, true, true>(d, wide_descriptor(left + 16 * step * kWideRowStep),
                                                narrow_descriptor(right + 16 * step * kNarrowRowStep));
    } else {
      wgmma_ss<__nv_bfloat16, true>(d, narrow_descriptor(left + step * kNarrowColumnStep),
                                    narrow_descriptor(right + step * kNarrowColumnStep));
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  store<32>(d_out, d);
}

// sums[i] += 2 x[i] in chunks of kChunk floats: bulk load, a doubling by the second warp, bulk reduction; a warp for each end.
constexpr int kChunk = 256;

struct ReduceStorage {
  alignas(128) float chunk[2][kChunk];
  uint64_t full[2];
};

template <int kThreads>
__global__ void reduce_kernel(float* sums, const float* x, int chunks) {
  extern __shared__ __align__(1024) unsigned char raw[];
  auto& smem = *reinterpret_cast<ReduceStorage*>(raw);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(&smem.full[0], 1);
    ptx::mbarrier_init(&smem.full[1], 1);
    ptx::fence_mbarrier_init(ptx::sem_release, ptx::scope_cluster);
  }
  __syncthreads();
  for (int i = 0; i < chunks; ++i) {
    const int stage = i % 2;
    if (threadIdx.x < 32) {
      if (elect_one()) {
        bulk_wait_read<1>();  // the stage's last reduction, two chunks ago
        arrive_and_expect(smem.full[stage], sizeof(smem.chunk[stage]));
        bulk_load(smem.chunk[stage], x + i * kChunk, sizeof(smem.chunk[stage]), smem.full[stage]);
      }
      named_barrier_sync(1, 64);  // doubled
      if (elect_one()) {
        bulk_reduce_add_f32(sums + i * kChunk, smem.chunk[stage], sizeof(smem.chunk[stage]));
        bulk_commit();
      }
    } else {
      wait(smem.full[stage], i / 2 % 2);
      for (int j = threadIdx.x - 32; j < kChunk; j += 32) smem.chunk[stage][j] *= 2.0f;
      fence_async_shared();
      named_barrier_arrive(1, 64);
    }
  }
  if (threadIdx.x < 32) bulk_wait<0>();
}

}  // namespace fcsa::sm90

#define FCSA_EXPORT extern "C" __attribute__((visibility("default"))) cudaError_t

FCSA_EXPORT run_product(int n, bool half, bool transpose_a, bool transpose_b, const void* a, const void* b, float* d) {
  using namespace fcsa::sm90;
  switch (half ? -n : n) {
    case 32: return product_of<__nv_bfloat16, 32>(transpose_a, transpose_b, a, b, d);
    case 64: return product_of<__nv_bfloat16, 64>(transpose_a, transpose_b, a, b, d);
    case 96: return product_of<__nv_bfloat16, 96>(transpose_a, transpose_b, a, b, d);
    case 128: return product_of<__nv_bfloat16, 128>(transpose_a, transpose_b, a, b, d);
    case 192: return product_of<__nv_bfloat16, 192>(transpose_a, transpose_b, a, b, d);
    case 256: return product_of<__nv_bfloat16, 256>(transpose_a, transpose_b, a, b, d);
    case -64: return product_of<__half, 64>(transpose_a, transpose_b, a, b, d);
  }
  return cudaErrorInvalidValue;
}

FCSA_EXPORT run_product_and_sums(const void* a, const void* b, float* d) { return fcsa::sm90::product_and_sums(a, b, d); }

FCSA_EXPORT run_chain(bool transposed, const void* a, const void* b, float* d) {
  return transposed ? fcsa::sm90::chain<true>(a, b, d) : fcsa::sm90::chain<false>(a, b, d);
}

FCSA_EXPORT run_narrow(bool transposed, const void* a, const void* b, float* d) {
  const auto *left = static_cast<const __nv_bfloat16*>(a), *right = static_cast<const __nv_bfloat16*>(b);
  if (transposed) {
    fcsa::sm90::narrow_kernel<true><<<1, 128, 16384, 0>>>(d, left, right);
  } else {
    fcsa::sm90::narrow_kernel<false><<<1, 128, 16384, 0>>>(d, left, right);
  }
  return cudaGetLastError();
}

FCSA_EXPORT run_reduce(float* sums, const float* x, int chunks) {
  fcsa::sm90::reduce_kernel<64><<<1, 64, sizeof(fcsa::sm90::ReduceStorage), 0>>>(sums, x, chunks);
  return cudaGetLastError();
}
