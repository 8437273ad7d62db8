// Which tile of the bias a block of threads owns, what shares that tile, and how the sharers are dealt out.
#pragma once

#include "backward_tiles.cuh"
#include "backward_traits.cuh"

namespace fcsa::sm80 {

// Tile and warp shapes. A warp owns 16 kM queries x 8 kN keys, whose sums and bias stay in registers; the larger, the
// fewer bytes of q, k, v and dout a logit costs. kChunkN n8 tiles of keys have their scores in registers at a time.
template <class Traits, bool kSmall>
struct DbiasConfig : Traits {
  static constexpr int kDepth = Traits::kPlanes * Traits::kHeadDim;
  static constexpr int kQueries = kDepth <= 64 ? 128 : 64;
  static constexpr int kKeys = kDepth <= 32 ? 128 : kDepth <= 128 ? 64 : 32;
  static constexpr int kM = kDepth <= 64 ? 2 : 1;  // beyond 64 twice the sums would spill 2 KB a thread
  static constexpr int kN = kDepth <= 128 ? 8 : 4;
  static constexpr int kStages = kDepth <= 32 || (kDepth <= 64 && !kSmall) ? 2 : 1;
  static constexpr bool kHoldRows = kDepth <= 32;  // operands of q and dout in registers
  static constexpr int kChunkN = kHoldRows || Traits::kPlanes == 2 ? 2 : 4;
  static constexpr int kKeyWarps = kKeys / (8 * kN);
  static constexpr int kThreads = kQueries / (16 * kM) * kKeyWarps * 32;
  static constexpr int kMinBlocks = 256 / kThreads;
  static constexpr int kTileFloats = kQueries * kKeys;
  static constexpr int kStageAlignment = 128;
  static_assert(kKeys <= kThreads && kN % 4 == 0);

  static __device__ __forceinline__ int first_row(int warp) { return warp / kKeyWarps * (16 * kM); }  // of the warp's
  static __device__ __forceinline__ int first_column(int warp) { return warp % kKeyWarps * (8 * kN); }
};

// A dim that the bias has is one index of the grid; a dim that it is summed over is a range to walk.
struct Range {
  int first, count;

  static __device__ __forceinline__ Range take(int& block, int size, bool is_summed) {
    if (is_summed) return {0, size};
    const int own = block % size;
    block /= size;
    return {own, 1};
  }

  __device__ __forceinline__ int at(int& sharer) const {
    const int index = first + sharer % count;
    sharer /= count;
    return index;
  }
};

// A sharer: what one step of the walk adds to the tile.
struct DbiasStep {
  TileIndex head;  // tile: query block
  int key_block;
  int index;       // among the sharers
};

template <class Config>
struct DbiasOwner {
  Range key_blocks, q_blocks, heads, b1, b0;

  __device__ __forceinline__ DbiasOwner(const BackwardParams& p, int tile)
      : key_blocks(Range::take(tile, ceil_div(p.num_keys, Config::kKeys), p.dbias_key == 0)),
        q_blocks(Range::take(tile, ceil_div(p.num_queries, Config::kQueries), p.dbias_query == 0)),
        heads(Range::take(tile, p.heads, p.dbias_head == 0)),
        b1(Range::take(tile, p.b1, p.dbias_b1 == 0)),
        b0(Range::take(tile, p.b0, p.dbias_b0 == 0)) {}

  __device__ __forceinline__ int num_sharers() const {
    return key_blocks.count * q_blocks.count * heads.count * b1.count * b0.count;
  }

  __device__ __forceinline__ DbiasStep sharer(int index) const {
    DbiasStep step;
    step.index = index;
    step.key_block = key_blocks.at(index);
    step.head.tile = q_blocks.at(index);
    step.head.head = heads.at(index);
    step.head.b1 = b1.at(index);
    step.head.b0 = b0.at(index);
    return step;
  }

  // The next sharer, without a division.
  __device__ __forceinline__ void advance(DbiasStep& step) const {
    ++step.index;
    if (next_of(key_blocks, step.key_block) || next_of(q_blocks, step.head.tile) || next_of(heads, step.head.head)) return;
    if (!next_of(b1, step.head.b1)) next_of(b0, step.head.b0);
  }

  // To the first sharer from `step` on that the causal mask does not hide as a whole; one of index `end`: there is none.
  __device__ __forceinline__ void skip_hidden(const BackwardParams& p, DbiasStep& step, int end) const {
    if (!p.causal) return;
    for (; step.index < end; advance(step)) {
      const int last_query = min((step.head.tile + 1) * Config::kQueries, p.num_queries) - 1;
      if (step.key_block * Config::kKeys <= last_query + p.num_keys - p.num_queries) break;
    }
  }

  static __device__ __forceinline__ bool next_of(const Range& range, int& index) {
    if (++index < range.first + range.count) return true;
    index = range.first;
    return false;
  }

  __device__ __forceinline__ int64_t offset(const BackwardParams& p) const {  // of the tile's first element
    return b0.first * p.dbias_b0 + b1.first * p.dbias_b1 + heads.first * p.dbias_head +
           static_cast<int64_t>(q_blocks.first) * Config::kQueries * p.dbias_query +
           static_cast<int64_t>(key_blocks.first) * Config::kKeys * p.dbias_key;
  }
};

template <class Config>
__device__ __forceinline__ void store_dbias(const BackwardParams& p, int64_t offset, float x) {
  if (p.bias_is_float32) {
    static_cast<float*>(p.dbias)[offset] = x;
  } else {
    static_cast<typename Config::Element*>(p.dbias)[offset] = from_float<typename Config::Element>(x);
  }
}

// From one sharer to the next where they are the rows of one batch dim: elements from row to row of every operand.
struct DbiasRowStep {
  bool is_linear;  // they are
  int b0, b1;      // 1 for the dim that is walked along
  int64_t q, k, v, dout, query_row, k_rnorm, mask;
};

template <class Config>
DbiasRowStep dbias_row_step(const BackwardParams& p) {
  const bool sums_b0 = p.dbias_b0 == 0 && p.b0 > 1, sums_b1 = p.dbias_b1 == 0 && p.b1 > 1;
  const bool sums_tiles = (p.dbias_key == 0 && p.num_keys > Config::kKeys) || (p.dbias_head == 0 && p.heads > 1) ||
                          (p.dbias_query == 0 && p.num_queries > Config::kQueries);
  DbiasRowStep step = {};
  if (p.causal || sums_tiles || sums_b0 == sums_b1) return step;
  const int64_t rows = sums_b0 ? p.b1 : 1, queries = rows * p.heads * p.num_queries, keys = rows * p.kv_heads * p.num_keys;
  const int64_t columns = Config::kPlanes * p.head_dim;
  const auto stride = [=](const Strides& strides) { return sums_b0 ? strides.b0 : strides.b1; };
  step.is_linear = true, step.b0 = sums_b0, step.b1 = sums_b1;
  step.q = p.q_unit == nullptr ? stride(p.q_strides) : queries * columns;
  step.k = p.k_unit == nullptr ? stride(p.k_strides) : keys * columns;
  step.v = Config::kFloat ? keys * columns : stride(p.v_strides);
  step.dout = Config::kFloat ? queries * columns : stride(p.dout_strides);
  step.query_row = rows * p.heads * padded_queries(p.num_queries), step.k_rnorm = keys;
  step.mask = p.mask == nullptr ? 0 : sums_b0 ? p.mask_b0 : p.mask_b1;
  return step;
}

// How the sharers of every tile are dealt out.
struct DbiasParts {
  int tiles, count, sharers_a_part;
  DbiasRowStep row;
};

// As many parts as make the walk of the busiest multiprocessor shortest, the adding up included; limited by the
// workspace. One part where there are tiles enough.
template <class Config>
DbiasParts dbias_parts(const BackwardParams& p, int multiprocessors) {
  const int key_blocks = ceil_div(p.num_keys, Config::kKeys), q_blocks = ceil_div(p.num_queries, Config::kQueries);
  const struct {
    int64_t size, stride;
  } dims[] = {{key_blocks, p.dbias_key}, {q_blocks, p.dbias_query}, {p.heads, p.dbias_head}, {p.b1, p.dbias_b1},
              {p.b0, p.dbias_b0}};
  int64_t tiles = 1, sharers = 1;
  for (const auto& dim : dims) (dim.stride == 0 ? sharers : tiles) *= dim.size;
  if (sharers > INT32_MAX || tiles > INT32_MAX) return {};
  const int64_t slots = static_cast<int64_t>(multiprocessors) * Config::kMinBlocks;
  int64_t best = 1;
  double best_cost = 0.0;
  for (int64_t parts = 1; parts <= sharers && (parts == 1 || parts * tiles * Config::kTileFloats <= p.dbias_parts_size);
       ++parts) {
    const int64_t waves = (parts * tiles + slots - 1) / slots, walk = (sharers + parts - 1) / parts;
    // In steps, of about a microsecond; a block starts and ends in two, and a tile's part is added up in 1/30.
    const double cost = waves * (walk + 2.0) + (parts == 1 ? 0.0 : 3.0 + parts * tiles / 30.0);
    if (parts == 1 || cost < best_cost) best = parts, best_cost = cost;
    if (waves > 4) break;
  }
  const int64_t walk = (sharers + best - 1) / best;
  return {static_cast<int>(tiles), static_cast<int>((sharers + walk - 1) / walk), static_cast<int>(walk),
          dbias_row_step<Config>(p)};
}

}  // namespace fcsa::sm80
