// The instructions of csrc/sm80/ptx.cuh, by their definition.
#pragma once

#include <type_traits>

namespace fcsa::sm80::ptx {

inline uint32_t smem_address(const void* pointer) { return emulator::shared_address(pointer); }

inline void take_effect(const emulator::Copy& copy) {
  if (copy.valid) {
    std::memcpy(copy.target, copy.source, copy.bytes);
  } else {
    std::memset(copy.target, 0, copy.bytes);
  }
}

inline void copy_async(uint32_t smem, const void* global, size_t bytes, bool valid) {
  if (smem % bytes != 0 || (valid && reinterpret_cast<uintptr_t>(global) % bytes != 0)) std::abort();
  const emulator::Copy copy{emulator::shared_memory + smem, global, bytes, valid};
  if (emulator::copies_are_late) {
    emulator::fiber().open.push_back(copy);
  } else {
    take_effect(copy);
  }
}

inline void cp_async_16(uint32_t smem, const void* global, bool valid) { copy_async(smem, global, 16, valid); }
inline void cp_async_4(uint32_t smem, const void* global, bool valid) { copy_async(smem, global, 4, valid); }

inline void cp_async_commit() {
  emulator::fiber().groups.push_back(emulator::fiber().open);
  emulator::fiber().open.clear();
}

template <int kPending>
inline void cp_async_wait() {
  auto& groups = emulator::fiber().groups;
  while (static_cast<int>(groups.size()) > kPending) {
    for (const emulator::Copy& copy : groups.front()) take_effect(copy);
    groups.erase(groups.begin());
  }
}

inline void ldmatrix_x4(uint32_t (&result)[4], uint32_t smem) { emulator::load_matrices(result, smem, false); }
inline void ldmatrix_x4_trans(uint32_t (&result)[4], uint32_t smem) { emulator::load_matrices(result, smem, true); }

template <class Element>
inline void mma_16816(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  constexpr bool kHalf = std::is_same_v<Element, __half>;
  const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const auto words = emulator::exchange(mine, 6);
  const int group = emulator::lane() / 4, pair = emulator::lane() % 4;
  for (int r = 0; r < 4; ++r) {
    const int row = group + r / 2 * 8, column = 2 * pair + r % 2;
    double sum = c[r];
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = words[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const uint32_t right = words[column * 4 + k % 8 / 2][4 + k / 8];
      sum += emulator::element<kHalf>(left >> k % 2 * 16) * emulator::element<kHalf>(right >> k % 2 * 16);
    }
    c[r] = emulator::truncate(sum);
  }
}

inline void reduce_add_4(float* target, int stride, const float (&x)[4]) {
  for (int i = 0; i < 4; ++i) target[i * stride] += x[i];
}

inline float reciprocal_approx(float x) { return 1.0f / x; }

inline float exp2_approx(float x) { return exp2f(x); }

inline void store_shared(uint32_t smem, int offset, uint32_t value) { std::memcpy(emulator::shared_memory + smem + offset, &value, 4); }

template <class T>
inline T* opaque(T* pointer) {
  return pointer;
}

}  // namespace fcsa::sm80::ptx
