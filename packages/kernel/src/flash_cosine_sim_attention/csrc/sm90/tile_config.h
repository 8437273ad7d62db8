// Tile sizes of the Hopper kernels. One block a multiprocessor: 227 KiB of shared memory and 64 K registers are its budget.
#pragma once

namespace fcsa::sm90 {

struct ForwardTile {
  int consumer_warpgroups;  // 64 queries each
  int block_n;              // keys of a tile: one stage of the K and V rings
  int stages;
  int consumer_registers, producer_registers;
  bool q_in_registers;  // operands of S for the whole walk; the next block's queries are then loaded meanwhile
  int parts;            // S of a tile is multiplied, and exponentiated, in so many groups of keys
};

// From so many keys on three warpgroups of 96 keys beat two of 128 at head dim 64 (7 per cent; at 1024 they lose as much, to
// blocks of queries that are half as many again).
constexpr int kManyKeys = 1536;

// kBiasBytes: of a value of the bias, of which a tile, kBlockM x block_n, lies in shared memory beside each K; 0: there is no
// bias; 1: it comes by its diagonals, and takes little room.
template <int kHeadDim, bool kForManyKeys, int kBiasBytes = 0>
constexpr ForwardTile forward_tile() {
  // A consumer holds S (block_n / 2 registers), P (block_n / 4), O (head_dim / 2) and the queries (head_dim / 4).
  if constexpr (kBiasBytes == 1) {
    if constexpr (kHeadDim <= 64) return {2, 128, 4, 232, 40, true, 2};  // the producer holds some of its entries
    if constexpr (kHeadDim <= 128) return {2, 96, 2, 232, 40, true, 1};
    return {2, kHeadDim <= 192 ? 96 : 64, 2, 232, 40, false, 1};
  }
  if constexpr (kBiasBytes != 0) {
    if constexpr (kHeadDim <= 64) return {2, 128, kBiasBytes == 2 ? 3 : 2, 240, 24, true, 2};  // 192 queries: 10 per cent slower
    if constexpr (kHeadDim <= 128) return {2, kBiasBytes == 2 ? 96 : 64, 2, 240, 24, kBiasBytes == 2, 1};
    return {2, kHeadDim > 192 && kBiasBytes == 4 ? 32 : 64, 2, 240, 24, false, 1};
  }
  if constexpr (kHeadDim <= 64 && kForManyKeys) return {3, 96, 4, 160, 32, true, 1};
  if constexpr (kHeadDim <= 64) return {2, 128, 4, 240, 24, true, 1};
  if constexpr (kHeadDim <= 128) return {2, 128, 3, 232, 40, true, 1};   // queries in registers: 3 per cent; 224 KiB
  if constexpr (kHeadDim <= 192) return {2, 96, 2, 240, 24, false, 1};   // 192 KiB
  return {2, 64, 2, 240, 24, false, 1};                                  // 192 KiB
}

}  // namespace fcsa::sm90
