// Tile sizes of the Hopper kernels. One block a multiprocessor: 227 KiB of shared memory and 64 K registers are its budget.
#pragma once

namespace fcsa::sm90 {

struct ForwardTile {
  int consumer_warpgroups;  // 64 queries each
  int block_n;              // keys of a tile: one stage of the K and V rings
  int stages;
  int consumer_registers, producer_registers;
  bool queries_in_registers;  // halves what Q K^T reads from shared memory; head_dim / 4 registers
  int polynomial_every;       // every n-th pair of exponentials goes to the FMA units (exp2.cuh); 0: none
};

template <int kHeadDim>
constexpr ForwardTile forward_tile() {
  // A consumer holds two tiles of S (block_n registers), two of P (block_n / 2), O (head_dim / 2), Q (head_dim / 4).
  if constexpr (kHeadDim <= 64) return {2, 64, 4, 232, 40, true, 0};
  if constexpr (kHeadDim <= 128) return {2, 64, 4, 232, 40, true, 0};
  if constexpr (kHeadDim <= 192) return {2, 64, 3, 232, 40, false, 0};
  return {2, 64, 2, 232, 40, false, 0};
}

}  // namespace fcsa::sm90
