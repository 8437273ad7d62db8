// Additions to dq in a fixed order, for results that are bit-equal from run to run.
//
// Every block of keys adds to dq of every query that sees it. A turn is the right to add to dq of 128 queries of a head. The
// blocks of one kv head take it one after another, in the order in which they are launched. A block waits for the one before
// it alone (`previous`), by a word in which that one counts the turns it is done with: dq_progress (b0, b1, hk, block, warpgroup).
//
//   full     block 0, 1, 2, ...: all begin with the first queries, so each is soon one turn behind the one before
//   causal   the last block first: block j begins with the queries of its diagonal, where no earlier block has anything to add,
//            and block j - 1 comes there a turn later
//
// Nobody waits for ever: a block of threads takes one block of keys, the hardware starts them in the order of their index,
// `previous` has the index below, and the first of a kv head waits for none. Blocks without a visible key take their turns too.
#pragma once

#include "backward_traits.cuh"

namespace fcsa::sm90 {

// Of one thread, which adds the dq of one warpgroup.
template <class Traits>
class DqTurns {
 public:
  static constexpr int kSteps = 128 / Traits::kBlockQ;  // of a turn

  __device__ __forceinline__ DqTurns(const BackwardParams& p, const BlockOfKeys<Traits>& block, int warpgroup)
      : num_turns_(ceil_div(p.num_queries, 128)) {
    const int num_tiles = ceil_div(p.num_keys, Traits::kBlockK), tile = block.index.tile;
    own_ = p.dq_progress + (block.index.first_row(p.b1, p.kv_heads, num_tiles) + tile) * 2 + warpgroup;
    const int previous = p.causal ? tile + 1 : tile - 1;
    has_previous_ = previous >= 0 && previous < num_tiles;
    previous_ = own_ + (previous - tile) * 2;
    first_turn_of_previous_ = p.causal ? max(0, previous * Traits::kBlockK - (p.num_keys - p.num_queries)) / 128 : 0;
  }

  // Before the first addition of a turn of the head, the i-th of the kv head.
  __device__ __forceinline__ void wait_for(int head, int turn) {
    const uint32_t wanted = head * num_turns_ + turn + 1;
    if (!has_previous_ || turn < first_turn_of_previous_ || seen_ >= wanted) return;
    seen_ = wait_for_value(previous_, wanted);
    fence_async_global();
  }

  // After the last one.
  __device__ __forceinline__ void pass_on(int head, int turn) {
    bulk_wait<0>();
    fence_async_global();
    store_release(own_, head * num_turns_ + turn + 1);
  }

 private:
  uint32_t* own_;
  const uint32_t* previous_;
  bool has_previous_;
  int num_turns_, first_turn_of_previous_;
  uint32_t seen_ = 0;
};

}  // namespace fcsa::sm90
