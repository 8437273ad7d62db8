// The bias of a block of queries in shared memory, in the order of the accumulators of wgmma, for all rows that share it.
#pragma once

#include "../common/reduce.cuh"
#include "../common/softmax.cuh"
#include "../common/vectorized.cuh"
#include "../params.h"

namespace fcsa::sm90::pair {

constexpr int kQueries = 64;   // of a warpgroup
constexpr int kTileKeys = 64;  // of a product
constexpr int kLaneValues = kQueries * kTileKeys / 128;

// kQueryTiles x kKeyTiles tiles of 64 x 64. A thread of a warpgroup holds of a tile, in s[4 i + 2 half + e], query
// 16 warp + lane / 4 + 8 half and key 8 i + lane % 4 * 2 + e; they lie in 16-byte chunks, the same chunk of all threads
// side by side. Keys that do not exist are -inf.
// Stored: the dtype of the bias, or float, which saves the loop its conversion.
template <class Stored, int kQueryTiles, int kKeyTiles>
struct BiasTiles {
  static constexpr int kChunkValues = 16 / sizeof(Stored), kChunks = kLaneValues / kChunkValues;

  uint4 chunks[kQueryTiles][kKeyTiles][kChunks][128];

  // By all threads of the block. source: (query, key) with the strides of p; first_query: of the block.
  template <int kThreads, class Value>
  __device__ __forceinline__ void load(const Problem& p, const Value* source, int first_query) {
    const int thread = threadIdx.x % 128, num_tiles = (p.num_keys + kTileKeys - 1) / kTileKeys;
    const bool in_pairs = p.bias_key == 1 && p.num_keys % 2 == 0 && p.bias_query % 2 == 0 &&
                          reinterpret_cast<uintptr_t>(source) % (2 * sizeof(Value)) == 0;
#pragma unroll 1
    for (int i = threadIdx.x / 128; i < num_tiles * kQueryTiles; i += kThreads / 128) {
      const int query_tile = i % kQueryTiles, key_tile = i / kQueryTiles;
      const int query = first_query + query_tile * kQueries + thread / 32 * 16 + thread % 32 / 4;
      const int key = key_tile * kTileKeys + thread % 4 * 2;
      const int last_query = p.num_queries - 1;
      const Value* rows[2] = {source + min(query, last_query) * p.bias_query,
                              source + min(query + 8, last_query) * p.bias_query};
      Value values[kLaneValues];
      if (in_pairs) {
        load_pairs(values, rows, key, p.num_keys);
      } else {
        load_values(values, rows, key, p.num_keys, p.bias_key);
      }
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        alignas(16) Stored chunk[kChunkValues];
#pragma unroll
        for (int e = 0; e < kChunkValues; ++e) chunk[e] = convert<Stored>(values[c * kChunkValues + e]);
        chunks[query_tile][key_tile][c][thread] = *reinterpret_cast<const uint4*>(chunk);
      }
    }
  }

  // s = bias * log2(e) - shift, of a row for each half.
  __device__ __forceinline__ void start(float (&s)[kLaneValues], int query_tile, int key_tile,
                                        const float (&shift)[2]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      float values[kChunkValues];
      read(values, query_tile, key_tile, c);
#pragma unroll
      for (int i = 0; i < kChunkValues; ++i) s[c * kChunkValues + i] = fmaf(values[i], kLog2e, -shift[i / 2 % 2]);
    }
  }

  // The largest values of this thread's two rows.
  __device__ __forceinline__ void row_maxima(float (&largest)[2], int query_tile, int num_key_tiles) const {
    largest[0] = largest[1] = -INFINITY;
#pragma unroll 1
    for (int tile = 0; tile < num_key_tiles; ++tile) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        float values[kChunkValues];
        read(values, query_tile, tile, c);
#pragma unroll
        for (int i = 0; i < kChunkValues; ++i) largest[i / 2 % 2] = fmaxf(largest[i / 2 % 2], values[i]);
      }
    }
    largest[0] = lane_max<4>(largest[0]);
    largest[1] = lane_max<4>(largest[1]);
  }

 private:
  __device__ __forceinline__ void read(float (&values)[kChunkValues], int query_tile, int key_tile, int chunk) const {
    const uint4 raw = chunks[query_tile][key_tile][chunk][threadIdx.x % 128];
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(Stored) == 4) {
        values[i] = __uint_as_float(words[i]);
      } else {
        const float2 pair = unpack<Stored>(words[i]);
        values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
      }
    }
  }

  template <class To, class From>
  __device__ __forceinline__ static To convert(From x) {
    if constexpr (std::is_same_v<To, From>) return x;
    else return to_float(x);
  }

  // No branches: all loads are under way at once.
  template <class Value>
  __device__ __forceinline__ static void load_pairs(Value (&values)[kLaneValues], const Value* const (&rows)[2], int key,
                                                    int num_keys) {
    struct alignas(2 * sizeof(Value)) Pair {
      Value low, high;
    };
#pragma unroll
    for (int i = 0; i < kLaneValues / 2; ++i) {
      const int column = key + i / 2 * 8;
      const Pair pair = *reinterpret_cast<const Pair*>(rows[i % 2] + min(column, num_keys - 2));
      const bool exists = column < num_keys;
      values[2 * i] = exists ? pair.low : from_float<Value>(-INFINITY);
      values[2 * i + 1] = exists ? pair.high : from_float<Value>(-INFINITY);
    }
  }

  template <class Value>
  __device__ __forceinline__ static void load_values(Value (&values)[kLaneValues], const Value* const (&rows)[2], int key,
                                                     int num_keys, int64_t key_stride) {
#pragma unroll
    for (int i = 0; i < kLaneValues; ++i) {
      const int column = key + i / 4 * 8 + i % 2;
      const Value value = rows[i / 2 % 2][min(column, num_keys - 1) * key_stride];
      values[i] = column < num_keys ? value : from_float<Value>(-INFINITY);
    }
  }
};

}  // namespace fcsa::sm90::pair
