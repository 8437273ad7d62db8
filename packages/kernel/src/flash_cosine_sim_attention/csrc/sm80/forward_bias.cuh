// The additive bias of one chunk of scores: read ahead of the products, added after them.
#pragma once

#include <type_traits>

#include "../common/diagonal_window.cuh"
#include "../common/softmax.cuh"
#include "../common/tile_index.cuh"
#include "../common/vectorized.cuh"
#include "packed_bias.cuh"

namespace fcsa::sm80 {

enum class Bias { kNone, kElement, kFloat32, kToeplitz };

template <class Config, Bias kBias>
class BiasChunk {
  using Value = std::conditional_t<kBias == Bias::kFloat32, float, typename Config::Element>;
  using Pair = std::conditional_t<kBias == Bias::kFloat32, float2, uint32_t>;  // unconverted, so that a load can wait
  Pair pairs_[Config::kRowTiles][Config::kScoreTiles][2];

  __device__ __forceinline__ static Pair join(Value low, Value high) {
    if constexpr (kBias == Bias::kFloat32) {
      return make_float2(low, high);
    } else {
      const Value both[2] = {low, high};
      return reinterpret_cast<const uint32_t&>(both);
    }
  }

 public:
  // first_row: this thread's first query, the others are 8 and 16 further; first_key: this thread's first key.
  __device__ __forceinline__ void load(const Problem& p, const TileIndex& index, int first_row, int first_key) {
    if (p.packed_bias != nullptr) return load_packed(p, index, first_row, first_key);
    const Value* bias = static_cast<const Value*>(p.bias) + index.b0 * p.bias_b0 + index.b1 * p.bias_b1 +
                        index.head * p.bias_head + first_key * p.bias_key;
    // Pairs in one access where all of them lie on pair boundaries; first_key is even.
    const bool paired = p.bias_key == 1 && p.bias_query % 2 == 0 && reinterpret_cast<uintptr_t>(bias) % sizeof(Pair) == 0;
    const bool inside = first_key - threadIdx.x % 4 * 2 + Config::kChunkN <= p.num_keys;
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first_row + m * 16 + half * 8, p.num_queries - 1);
        const Value* source = bias + row * p.bias_query;
        if (paired && inside) {
#pragma unroll
          for (int n = 0; n < Config::kScoreTiles; ++n) {
            pairs_[m][n][half] = *reinterpret_cast<const Pair*>(source + n * 8);
          }
        } else {
#pragma unroll
          for (int n = 0; n < Config::kScoreTiles; ++n) {
            const int key = first_key + n * 8;
            const Value zero = from_float<Value>(0.0f);
            pairs_[m][n][half] = join(key < p.num_keys ? source[n * 8 * p.bias_key] : zero,
                                      key + 1 < p.num_keys ? source[(n * 8 + 1) * p.bias_key] : zero);
          }
        }
      }
    }
  }

  // From fragments of 32 queries x 16 keys; of those that do not exist any other, since their keys or queries do not either.
  __device__ __forceinline__ void load_packed(const Problem& p, const TileIndex& index, int first_row, int first_key) {
    struct alignas(2 * sizeof(Pair)) Pairs {
      Pair halves[2];
    };
    const PackedBias packed(p, false);
    const int lane = threadIdx.x % 32, row = first_row - lane / 4, column_fragment = (first_key - lane % 4 * 2) / 16;
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
      const int m16 = row / 16 + m, row_fragment = min(m16 / 2, packed.row_fragments - 1);
#pragma unroll
      for (int n = 0; n < Config::kScoreTiles; ++n) {
        const int column = min(column_fragment + n / 2, packed.column_fragments - 1);
        const Value* source = static_cast<const Value*>(p.packed_bias) + packed.at(index, row_fragment, column, lane);
        const Pairs pairs = *reinterpret_cast<const Pairs*>(source + m16 % 2 * 8 + n % 2 * 4);
        pairs_[m][n][0] = pairs.halves[0], pairs_[m][n][1] = pairs.halves[1];
      }
    }
  }

  __device__ __forceinline__ void add_to(float (&x)[Config::kRowTiles][Config::kScoreTiles][4]) const {
#pragma unroll
    for (int m = 0; m < Config::kRowTiles; ++m) {
#pragma unroll
      for (int n = 0; n < Config::kScoreTiles; ++n) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float2 pair;
          if constexpr (kBias == Bias::kFloat32) {
            pair = pairs_[m][n][half];
          } else {
            pair = unpack<Value>(pairs_[m][n][half]);
          }
          x[m][n][2 * half] = fmaf(pair.x, kLog2e, x[m][n][2 * half]);
          x[m][n][2 * half + 1] = fmaf(pair.y, kLog2e, x[m][n][2 * half + 1]);
        }
      }
    }
  }
};

template <class Config>
class BiasChunk<Config, Bias::kNone> {
 public:
  __device__ __forceinline__ void load(const Problem&, const TileIndex&, int, int) {}
  __device__ __forceinline__ void add_to(float (&)[Config::kRowTiles][Config::kScoreTiles][4]) const {}
};

// Element (m, n, half, c) lies on diagonal 8 (n - 2 m - half) + c, counted from that of the first.
template <class Config>
class BiasChunk<Config, Bias::kToeplitz> {
  static constexpr int kAbove = 2 * Config::kRowTiles - 1;
  DiagonalWindow<Config::kScoreTiles + kAbove> window_;

 public:
  __device__ __forceinline__ void load(const Problem& p, const TileIndex& index, int first_row, int first_key) {
    window_.load(p, bias_diagonals(p, index), first_key - first_row - 8 * kAbove);
  }

  // In the base of the logits.
  __device__ __forceinline__ float operator()(int m, int n, int e) const {
    return window_.values[n - 2 * m - e / 2 + kAbove][e % 2];
  }
};

}  // namespace fcsa::sm80
