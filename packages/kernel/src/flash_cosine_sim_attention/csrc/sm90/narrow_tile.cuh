// What wgmma reads of a tile whose rows are 32 values, 64 bytes: their four 16-byte chunks are permuted by an XOR with row / 2
// ("64-byte swizzle"), as sm80/smem_tile.cuh does it. The tile starts on a multiple of 512 bytes.
#pragma once

#include <cstdint>

namespace fcsa::sm90 {

// Of a descriptor the lower word, in units of 16 bytes: the operand's address. Steps of 16 columns, and of a row.
constexpr uint32_t kNarrowColumnStep = 16 * 2 / 16, kNarrowRowStep = 64 / 16, kWideRowStep = 128 / 16;

// The lower word for byte `smem` of shared memory, the same in all lanes; one panel: the leading byte offset means nothing.
__device__ __forceinline__ uint32_t operand_address(uint32_t smem) {
  return __shfl_sync(0xffffffffu, smem >> 4 | 1u << 16, 0);
}

// Operand stored [row][k], 16 columns, or, transposed, [k][column], 16 rows of 32 columns. The stride byte offset is that of
// eight rows.
__device__ __forceinline__ uint64_t narrow_descriptor(uint32_t address) {
  return uint64_t{address} | uint64_t{8 * 64 / 16 | 2u << 30} << 32;
}

// The same of a tile of 64 columns, 128 bytes a row, XOR with the row; it starts on a multiple of 1024.
__device__ __forceinline__ uint64_t wide_descriptor(uint32_t address) {
  return uint64_t{address} | uint64_t{8 * 128 / 16 | 1u << 30} << 32;
}

}  // namespace fcsa::sm90
