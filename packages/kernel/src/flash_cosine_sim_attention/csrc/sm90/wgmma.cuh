// wgmma: D (64 x kN, float, in registers) += A (64 x 16) * B (16 x kN), issued by one warpgroup, asynchronous.
//
// A comes from shared memory or from registers, B from shared memory: as [m][k] and [n][k] rows (queries and keys times
// head dim, for Q K^T) or, transposed, as [k][m] and [k][n] rows (V for P V). Of D, thread t of the warpgroup (warp
// w = t / 32, g = t % 32 / 4, c = t % 4) holds in d[4 i + 0..1] row 16 w + g, columns 8 i + 2 c, + 1, and in d[4 i + 2..3]
// the same columns of row 16 w + g + 8.
// The A fragment of four registers holds, in pairs of columns: row g, cols 2c; row g + 8; row g, cols 8 + 2c; row g + 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace fcsa::sm90 {

// Orders register accesses before the wgmma that follow; all warps of the warpgroup.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>  // returns when at most kPending committed groups are still under way
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Tells the compiler that asynchronous instructions write these registers until here.
template <int kCount>
__device__ __forceinline__ void wgmma_pin(float (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Keeps operands that asynchronous instructions read from registers there until here.
template <int kSteps>
__device__ __forceinline__ void wgmma_keep(const uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) asm volatile("" ::"r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]) : "memory");
}

// A descriptor that the compiler knows nothing of. Where the products of a loop take theirs from such ones, step by step, it
// does not compute those of all steps before the loop, dozens of registers.
__device__ __forceinline__ uint64_t opaque_descriptor(uint64_t descriptor) {
  asm volatile("" : "+l"(descriptor));
  return descriptor;
}

// clang-format off
#define FCSA_F8(c, d, i) c(d[i]), c(d[i + 1]), c(d[i + 2]), c(d[i + 3]), c(d[i + 4]), c(d[i + 5]), c(d[i + 6]), c(d[i + 7])
#define FCSA_F16(c, d, i) FCSA_F8(c, d, i), FCSA_F8(c, d, i + 8)
#define FCSA_F32(c, d, i) FCSA_F16(c, d, i), FCSA_F16(c, d, i + 16)
#define FCSA_OPERANDS_32(c, d) FCSA_F16(c, d, 0)
#define FCSA_OPERANDS_64(c, d) FCSA_F32(c, d, 0)
#define FCSA_OPERANDS_72(c, d) FCSA_F32(c, d, 0), c(d[32]), c(d[33]), c(d[34]), c(d[35])
#define FCSA_OPERANDS_96(c, d) FCSA_F32(c, d, 0), FCSA_F16(c, d, 32)
#define FCSA_OPERANDS_128(c, d) FCSA_F32(c, d, 0), FCSA_F32(c, d, 32)
#define FCSA_OPERANDS_192(c, d) FCSA_F32(c, d, 0), FCSA_F32(c, d, 32), FCSA_F32(c, d, 64)
#define FCSA_OPERANDS_256(c, d) FCSA_F32(c, d, 0), FCSA_F32(c, d, 32), FCSA_F32(c, d, 64), FCSA_F32(c, d, 96)
#define FCSA_REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FCSA_REGISTERS_64 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FCSA_REGISTERS_72 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                          "%32, %33, %34, %35"
#define FCSA_REGISTERS_96 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                          "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FCSA_REGISTERS_128 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                          "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                          "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FCSA_REGISTERS_192 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                          "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                          "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
                          "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
                          "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FCSA_REGISTERS_256 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
                          "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
                          "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
                          "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
                          "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
                          "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
                          "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
                          "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

// o0..: the numbers of the operands behind the accumulators. access: "+f" where D is added to, "=f" where it is written
// only; the compiler then owes it nothing before.
#define FCSA_WGMMA_SS(n, type, access, accumulate, o0, o1, o2, o3)                                                 \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                             \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FCSA_REGISTERS_##n "}, "        \
               "%" #o0 ", %" #o1 ", p, 1, 1, %" #o2 ", %" #o3 ";\n}"                                               \
               : FCSA_OPERANDS_##n(access, d)                                                                       \
               : "l"(a_desc), "l"(b_desc), "n"(static_cast<int>(kTransposeA)), "n"(static_cast<int>(kTransposeB)))
#define FCSA_WGMMA_RS(n, type, access, accumulate, transpose_b, o0, o1, o2, o3, o4)                                \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " accumulate ", 0;\n"                                             \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" FCSA_REGISTERS_##n "}, "        \
               "{%" #o0 ", %" #o1 ", %" #o2 ", %" #o3 "}, %" #o4 ", p, 1, 1, " transpose_b ";\n}"                   \
               : FCSA_OPERANDS_##n(access, d) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_desc))

// Calls FORM(n, type, access, accumulate, ...) for the element type and for D written or added to.
#define FCSA_WGMMA_DISPATCH(FORM, n, ...)                                                                          \
  if constexpr (std::is_same_v<Element, __half> && kAccumulate) {                                                  \
    FORM(n, "f16", "+f", "1", __VA_ARGS__);                                                                        \
  } else if constexpr (std::is_same_v<Element, __half>) {                                                          \
    FORM(n, "f16", "=f", "0", __VA_ARGS__);                                                                        \
  } else if constexpr (kAccumulate) {                                                                              \
    FORM(n, "bf16", "+f", "1", __VA_ARGS__);                                                                       \
  } else {                                                                                                         \
    FORM(n, "bf16", "=f", "0", __VA_ARGS__);                                                                       \
  }

// wgmma_ss: A as [m][k] or, transposed, [k][m]; B as [n][k] or, transposed, [k][n]. wgmma_rs: A in registers, B as [n][k].
// wgmma_rs_transposed: the same, B as [k][n].
#define FCSA_DEFINE_WGMMA(n, o0, o1, o2, o3, o4)                                                                   \
  template <class Element, bool kAccumulate, bool kTransposeA = false, bool kTransposeB = false>                   \
  __device__ __forceinline__ void wgmma_ss(float (&d)[n / 2], uint64_t a_desc, uint64_t b_desc) {                  \
    FCSA_WGMMA_DISPATCH(FCSA_WGMMA_SS, n, o0, o1, o2, o3)                                                          \
  }                                                                                                                \
  template <class Element, bool kAccumulate>                                                                       \
  __device__ __forceinline__ void wgmma_rs(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b_desc) {           \
    FCSA_WGMMA_DISPATCH(FCSA_WGMMA_RS, n, "0", o0, o1, o2, o3, o4)                                                 \
  }                                                                                                                \
  template <class Element, bool kAccumulate>                                                                       \
  __device__ __forceinline__ void wgmma_rs_transposed(float (&d)[n / 2], const uint32_t (&a)[4], uint64_t b_desc) { \
    FCSA_WGMMA_DISPATCH(FCSA_WGMMA_RS, n, "1", o0, o1, o2, o3, o4)                                                 \
  }

FCSA_DEFINE_WGMMA(32, 16, 17, 18, 19, 20)
FCSA_DEFINE_WGMMA(64, 32, 33, 34, 35, 36)
FCSA_DEFINE_WGMMA(72, 36, 37, 38, 39, 40)
FCSA_DEFINE_WGMMA(96, 48, 49, 50, 51, 52)
FCSA_DEFINE_WGMMA(128, 64, 65, 66, 67, 68)
FCSA_DEFINE_WGMMA(192, 96, 97, 98, 99, 100)
FCSA_DEFINE_WGMMA(256, 128, 129, 130, 131, 132)

#undef FCSA_DEFINE_WGMMA
#undef FCSA_WGMMA_DISPATCH
#undef FCSA_WGMMA_RS
#undef FCSA_WGMMA_SS
#undef FCSA_REGISTERS_32
#undef FCSA_OPERANDS_32
#undef FCSA_REGISTERS_64
#undef FCSA_OPERANDS_64
#undef FCSA_REGISTERS_72
#undef FCSA_OPERANDS_72
#undef FCSA_REGISTERS_96
#undef FCSA_OPERANDS_96
#undef FCSA_REGISTERS_128
#undef FCSA_OPERANDS_128
#undef FCSA_REGISTERS_192
#undef FCSA_OPERANDS_192
#undef FCSA_REGISTERS_256
#undef FCSA_OPERANDS_256
#undef FCSA_F32
#undef FCSA_F16
#undef FCSA_F8
// clang-format on

}  // namespace fcsa::sm90
