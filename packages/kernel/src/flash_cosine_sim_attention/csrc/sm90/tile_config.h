// Tile sizes of the Hopper kernels. One block a multiprocessor: 227 KiB of shared memory and 64 K registers are its budget.
#pragma once

namespace fcsa::sm90 {

struct ForwardTile {
  int consumer_warpgroups;  // 64 queries each
  int block_n;              // keys of a tile: one stage of the K and V rings
  int stages;
  int consumer_registers, producer_registers;
  bool ping_pong = false;       // warpgroups take turns at issuing products: one multiplies while another exponentiates
  bool q_in_registers = false;  // queries as operands in registers for the whole walk
  bool halves = false;
  int polynomial = 0;
};

template <int kHeadDim>
constexpr ForwardTile forward_tile() {
  // A consumer holds S (block_n / 2 registers), P (block_n / 4) and O (head_dim / 2).
  if constexpr (kHeadDim <= 128) return {2, 128, 2, 240, 24};  // d 64: three warpgroups of 96 keys win beyond 8k only
  if constexpr (kHeadDim <= 192) return {2, 96, 2, 240, 24};   // 48 + 24 + 96; 192 KiB
  return {2, 64, 2, 240, 24};                                  // 32 + 16 + 128; 192 KiB
}

}  // namespace fcsa::sm90
