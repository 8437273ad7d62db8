// A bias that many rows share, repacked once a call in the order of the threads' accumulators: a thread then reads its
// values 16 bytes at a time, whatever the strides and the length of the bias are.
#pragma once

#include "../common/softmax.cuh"
#include "../common/tile_index.cuh"
#include "../common/vectorized.cuh"

namespace fcsa::sm80 {

constexpr int kFragment = 32 * 16;  // values of a fragment, 16 of a lane

// Fragments of 32 rows x 16 columns, columns fastest; in a fragment 16 values a lane, in the order of accumulators
// [m16 tile][n8 tile][register]. Rows are queries and columns keys, or the other way. A matrix for each bias that there
// is: at most one of the batch dims has biases of its own.
struct PackedBias {
  int row_fragments, column_fragments, heads;
  bool own_b0, own_b1;

  __host__ __device__ PackedBias(const Problem& p, bool keys_in_rows)
      : row_fragments(ceil_div(keys_in_rows ? p.num_keys : p.num_queries, 32)),
        column_fragments(ceil_div(keys_in_rows ? p.num_queries : p.num_keys, 16)),
        heads(p.bias_head == 0 ? 1 : p.heads),
        own_b0(p.bias_b0 != 0),
        own_b1(p.bias_b1 != 0) {}

  __host__ __device__ int64_t matrix_values() const {
    return static_cast<int64_t>(row_fragments) * column_fragments * kFragment;
  }
  __host__ __device__ int64_t matrices(const Problem& p) const {
    return static_cast<int64_t>(heads) * (own_b0 ? p.b0 : 1) * (own_b1 ? p.b1 : 1);
  }
  // Index of a lane's first value.
  __device__ __forceinline__ int64_t at(const TileIndex& index, int row_fragment, int column_fragment, int lane) const {
    const int64_t own = own_b0 ? index.b0 : own_b1 ? index.b1 : 0;
    return (own * heads + (heads == 1 ? 0 : index.head)) * matrix_values() +
           (static_cast<int64_t>(row_fragment) * column_fragments + column_fragment) * kFragment +
           lane * (kFragment / 32);
  }
};

constexpr int kPackThreads = 128;

// A fragment a warp. Keys that do not exist get -inf: who reads fragments need not look at the end of the keys.
template <class Value, bool kKeysInRows>
__global__ void __launch_bounds__(kPackThreads)
    pack_bias_kernel(const __grid_constant__ Problem p, const PackedBias packed, int64_t fragments) {
  const int64_t fragment = static_cast<int64_t>(blockIdx.x) * (kPackThreads / 32) + threadIdx.x / 32;
  if (fragment >= fragments) return;
  const int lane = threadIdx.x % 32;
  const int column_fragment = fragment % packed.column_fragments;
  const int64_t rest = fragment / packed.column_fragments;
  const int row_fragment = rest % packed.row_fragments, matrix = rest / packed.row_fragments;
  const int head = matrix % packed.heads, own = matrix / packed.heads;
  const int64_t offset = own * (packed.own_b0 ? p.bias_b0 : p.bias_b1) + head * p.bias_head;
  const Value* source = static_cast<const Value*>(p.bias) + offset;
  alignas(16) Value values[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) {
    const int row = row_fragment * 32 + i / 8 * 16 + i / 2 % 2 * 8 + lane / 4;
    const int column = column_fragment * 16 + i / 4 % 2 * 8 + lane % 4 * 2 + i % 2;
    const int key = kKeysInRows ? row : column, query = min(kKeysInRows ? column : row, p.num_queries - 1);
    const Value value = source[query * p.bias_query + min(key, p.num_keys - 1) * p.bias_key];  // no branch: all at once
    values[i] = key < p.num_keys ? value : from_float<Value>(-INFINITY);
  }
  uint4* target = reinterpret_cast<uint4*>(static_cast<Value*>(p.packed_bias) + fragment * kFragment + lane * 16);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(values) / 16); ++i) target[i] = reinterpret_cast<const uint4*>(values)[i];
}

// Where there is room for a packed bias, and something to pack.
template <class Element, bool kKeysInRows>
cudaError_t launch_pack_bias(const Problem& p, cudaStream_t stream) {
  if (p.packed_bias == nullptr || p.bias == nullptr) return cudaSuccess;
  const PackedBias packed(p, kKeysInRows);
  if (packed.own_b0 && packed.own_b1) return cudaErrorInvalidValue;
  const int64_t fragments = packed.matrix_values() / kFragment * packed.matrices(p);
  const int64_t blocks = (fragments + kPackThreads / 32 - 1) / (kPackThreads / 32);
  if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (p.bias_is_float32) {
    pack_bias_kernel<float, kKeysInRows><<<static_cast<uint32_t>(blocks), kPackThreads, 0, stream>>>(p, packed, fragments);
  } else {
    pack_bias_kernel<Element, kKeysInRows><<<static_cast<uint32_t>(blocks), kPackThreads, 0, stream>>>(p, packed, fragments);
  }
  return cudaGetLastError();
}

// The 16 values of a lane for 32 x 16 logits, as they lie in memory; converted when they are used.
template <class Value>
struct BiasFragment {
  uint4 words[sizeof(Value)];

  __device__ __forceinline__ void load(const Value* source) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Value)); ++i) words[i] = reinterpret_cast<const uint4*>(source)[i];
  }

  // Registers 2 r and 2 r + 1 of accumulator tile (m, n).
  __device__ __forceinline__ float2 pair(int m, int n, int r) const {
    const int i = (m * 2 + n) * 2 + r;
    const uint32_t* all = reinterpret_cast<const uint32_t*>(words);
    if constexpr (sizeof(Value) == 4) {
      return make_float2(__uint_as_float(all[2 * i]), __uint_as_float(all[2 * i + 1]));
    } else {
      return unpack<Value>(all[i]);
    }
  }
};

}  // namespace fcsa::sm80
