// The producer warp of the Hopper forward: it feeds TMA and hands out the norm factors of the keys.
#pragma once

#include "../common/launch.cuh"
#include "forward_traits.cuh"
#include "key_factors.cuh"
#include "load_tile.cuh"

namespace fcsa::sm90 {

// The norm factors of one tile of keys on their way from device memory to shared memory, kBlockN / 32 a lane.
template <class Traits>
struct KeyFactors {
  float values[Traits::kBlockN / 32];

  // k_rnorm: of the keys of one head; nullptr: the factors are 1.
  __device__ __forceinline__ void load(const float* k_rnorm, int tile, int num_keys) {
#pragma unroll
    for (int i = 0; i < Traits::kBlockN / 32; ++i) {
      const int key = tile * Traits::kBlockN + i * 32 + threadIdx.x % 32;
      values[i] = k_rnorm == nullptr ? 1.0f : key < num_keys ? k_rnorm[key] : 0.0f;
    }
  }

  __device__ __forceinline__ void store(float (&slots)[Traits::kBlockN]) const {
#pragma unroll
    for (int i = 0; i < Traits::kBlockN / 32; ++i) slots[factor_slot(i * 32 + threadIdx.x % 32)] = values[i];
  }
};

// The same for a bias by its diagonals; without one, nothing.
template <class Traits>
struct TileDiagonals {
  std::conditional_t<Traits::kDiagonals, DiagonalLoads<DiagonalTile<Traits::kBlockM, Traits::kBlockN>>, char> loads;

  __device__ __forceinline__ TileDiagonals(const Problem& p, const BlockOfQueries<Traits>& block) {
    if constexpr (Traits::kDiagonals) {
      loads.diagonals = static_cast<const float*>(p.bias) + block.b0 * p.bias_b0 + block.b1 * p.bias_b1 + block.head * p.bias_head;
    }
  }

  __device__ __forceinline__ void load(const Problem& p, const BlockOfQueries<Traits>& block, int tile) {
    if constexpr (Traits::kDiagonals) loads.load(p, block.first_query, tile * Traits::kBlockN);
  }

  __device__ __forceinline__ void store(ForwardStorage<Traits>& smem, int stage) const {
    if constexpr (Traits::kDiagonals) loads.store(smem.bias[stage]);
  }
};

// Takes the next item that no thread block has taken, or, without a counter, the next in turn. Two steps, so that the
// counter's latency passes meanwhile.
struct ItemRequest {
  uint32_t taken = 0;

  __device__ __forceinline__ void send(const ForwardParams& p) {
    if (p.next_item != nullptr && threadIdx.x % 32 == 0) taken = atomicAdd(p.next_item, 1u);
  }

  // The item after `item`; all lanes get it.
  __device__ __forceinline__ uint32_t answer(const ForwardParams& p, uint32_t item) const {
    if (p.next_item == nullptr) return item + gridDim.x;
    return gridDim.x + __shfl_sync(0xffffffffu, taken, 0);
  }
};

// The tiles of one block of queries, from the last to the first; with a key mask, those that have a visible key, or one if
// none has: its rows then come out as rows that see nothing.
template <class Traits>
struct TileWalk {
  KeyMask<Traits::kBlockN> mask;
  KeyBits<Traits::kBlockN> visible;  // of `tile`, with a key mask only
  int tile, next;

  __device__ __forceinline__ TileWalk(const Problem& p, const BlockOfQueries<Traits>& block)
      : mask(p, {0, block.head, block.b1, block.b0}), tile(block.num_tiles), next(block.num_tiles - 1) {
    if constexpr (Traits::kKeyMask) {
      if (next >= 0) mask.prefetch(next);
      next_bits = {};
      find();
      next = max(next, min(block.num_tiles, 1) - 1);
    }
  }

  // Goes on to the next tile; false: there is none.
  __device__ __forceinline__ bool advance() {
    tile = next;
    if (tile < 0) return false;
    --next;
    if constexpr (Traits::kKeyMask) {
      visible = next_bits;
      find();
    }
    return true;
  }

 private:
  KeyBits<Traits::kBlockN> next_bits;

  __device__ __forceinline__ void find() {  // the first from `next` on, which is prefetched, that has a visible key
#pragma unroll 1
    for (; next >= 0; --next) {
      const auto bits = mask.bits();
      if (next > 0) mask.prefetch(next - 1);
      if (bits.none()) continue;
      next_bits = bits;
      return;
    }
  }
};

// One warp. Its lanes hand out the norm factors of the keys, loaded a tile ahead; lane 0 issues the copies. Every lane
// arrives at full_k, for its own factors, lane 0 once more for the copy, which does not wait for them.
//
// smem.block[] is written again when every warpgroup has taken the queries of the block between.
//
// A slot of k_factor is free when the product with V of the tile that used it is done. K of tile t is loaded after the
// wait for V's slot of tile t - 1, that is, after tile t - 1 - kStages is done: kFactorStages > kStages slots suffice.
template <class Traits>
__device__ __forceinline__ void produce(const ForwardParams& p, const ForwardMaps& maps, const Schedule& schedule,
                                        ForwardStorage<Traits>& smem) {
  const int lane = threadIdx.x % 32;
  RingPosition<Traits::kStages> ring;
  RingPosition<Traits::kFactorStages> factors;
  uint32_t q_phase = 0;
  ItemRequest request;
  wait_for_prologue();
  for (uint32_t index = blockIdx.x; index < schedule.num_items; index = request.answer(p, index)) {
    const auto block = BlockOfQueries<Traits>::from(p, schedule, index);
    const int kv_head = block.head / (p.heads / p.kv_heads);
    const int64_t first_key = ((static_cast<int64_t>(block.b0) * p.b1 + block.b1) * p.kv_heads + kv_head) * p.num_keys;
    const float* k_rnorm = p.k_rnorm != nullptr && p.k_unit == nullptr ? p.k_rnorm + first_key : nullptr;
    TileWalk<Traits> walk(p, block);
    KeyFactors<Traits> key_factors;
    TileDiagonals<Traits> diagonals(p, block);
    if (walk.next >= 0) {
      key_factors.load(k_rnorm, walk.next, p.num_keys);
      diagonals.load(p, block, walk.next);
    }

#pragma unroll
    for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
      wait(smem.empty_q[warpgroup], q_phase ^ 1);
      if (lane == 0) {
        if (warpgroup == 0) smem.block[q_phase] = block;
        arrive_and_expect(smem.full_q[warpgroup], Traits::QueryTile::kBytes);
        load_tile(smem.q[warpgroup], maps.q, block.first_query + warpgroup * 64, block.head, block.b1, block.b0,
                  smem.full_q[warpgroup]);
      }
    }
    q_phase ^= 1;
    if (walk.next < 0) request.send(p);
    while (walk.advance()) {
      const int stage = ring.stage, first_row = walk.tile * Traits::kBlockN;
      if (walk.next < 0) request.send(p);
      wait(smem.empty_k[stage], ring.phase ^ 1);
      if (lane == 0) {
        if constexpr (Traits::kKeyMask) smem.records[factors.stage] = {walk.visible, walk.tile, walk.next < 0, false};
        arrive_and_expect(smem.full_k[stage], Traits::kStageBytes);
        load_tile(smem.k[stage], maps.k, first_row, kv_head, block.b1, block.b0, smem.full_k[stage]);
        if constexpr (Traits::kBias && !Traits::kDiagonals) {
          load_bias_tile(smem.bias[stage], maps.bias, block.first_query, first_row, block.head, block.b1, block.b0,
                         smem.full_k[stage]);
        }
      }
      key_factors.store(smem.k_factor[factors.stage]);
      diagonals.store(smem, stage);
      arrive(smem.full_k[stage]);
      if (walk.next >= 0) {
        key_factors.load(k_rnorm, walk.next, p.num_keys);
        diagonals.load(p, block, walk.next);
      }
      wait(smem.empty_v[stage], ring.phase ^ 1);
      if (lane == 0) {
        uint64_t& barrier = Traits::kKeyMask ? smem.loaded_v[stage] : smem.full_v[stage];
        arrive_and_expect(barrier, Traits::KeyTile::kBytes);
        load_tile(smem.v[stage], maps.v, first_row, kv_head, block.b1, block.b0, barrier);
      }
      ring.advance();
      factors.advance();
    }
  }
  for (int warpgroup = 0; warpgroup < Traits::kConsumerWarpgroups; ++warpgroup) {
    wait(smem.empty_q[warpgroup], q_phase ^ 1);
    if (lane == 0) {
      if (warpgroup == 0) smem.block[q_phase].num_tiles = -1;
      arrive(smem.full_q[warpgroup]);
    }
  }
  if constexpr (Traits::kKeyMask) {
    wait(smem.empty_k[ring.stage], ring.phase ^ 1);
    if (lane == 0) {
      smem.records[factors.stage].end = true;
      arrive(smem.full_k[ring.stage]);
    }
    arrive(smem.full_k[ring.stage]);
  }
}

// Zeros in the rows of masked keys: P is 0 there, but 0 times NaN is not.
template <class Tile>
__device__ __forceinline__ void clear_rows(Tile& v, const KeyBits<Tile::kRows>& visible) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int w = 0; w < Tile::kRows / 32; ++w) {
    if (visible.words[w] == 0xffffffffu) continue;
    if (visible.words[w] >> lane & 1) continue;
#pragma unroll
    for (int col = 0; col < Tile::kCols; col += 8) {
      *reinterpret_cast<uint4*>(v.chunk(w * 32 + lane, col)) = make_uint4(0, 0, 0, 0);
    }
  }
}

// One warp beside the producer where there is a key mask: each tile of V goes through its hands.
template <class Traits>
__device__ __forceinline__ void clean(ForwardStorage<Traits>& smem) {
  RingPosition<Traits::kStages> ring;
  RingPosition<Traits::kFactorStages> factors;
  for (;; ring.advance(), factors.advance()) {
    wait(smem.full_k[ring.stage], ring.phase);
    const KeyTileRecord<Traits> record = smem.records[factors.stage];
    if (record.end) return;
    arrive(smem.empty_k[ring.stage]);
    wait(smem.loaded_v[ring.stage], ring.phase);
    clear_rows(smem.v[ring.stage], record.visible);
    fence_async_shared();
    arrive(smem.full_v[ring.stage]);
  }
}

}  // namespace fcsa::sm90
