// The tensor cores of compute capability 9.0 (wgmma): 64 rows times n columns, both in shared memory in rows of 128
// swizzled bytes along K, sums in float32 registers.
//
// PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": the descriptors, the layout of the sums, what is supported.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <stdint.h>

#include <type_traits>

namespace kpdeploy {

using f8 = __nv_fp8_e4m3;

// Of a matrix of rows of 128 bytes, as the copy engine's 128-byte swizzle lays them out: groups of 8 rows, 1024 bytes
// apart. `address`: where it starts in shared memory. One step along K is 32 bytes: the descriptor + 2.
__device__ inline uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kGroup = 1024 >> 4, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | uint64_t{1} << 16 | kGroup << 32 | kSwizzle128 << 62;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until at most `pending` committed groups of this warp are under way.
template <int pending>
__device__ inline void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory"); }

// The operands of an asm statement cannot be counted by a template: %0 to %(n - 1), and d[i] to d[i + n - 1].
// clang-format off
#define KPDEPLOY_LIST_4 "%0, %1, %2, %3"
#define KPDEPLOY_LIST_8 KPDEPLOY_LIST_4 \
  ", %4, %5, %6, %7"
#define KPDEPLOY_LIST_16 KPDEPLOY_LIST_8 \
  ", %8, %9, %10, %11, %12, %13, %14, %15"
#define KPDEPLOY_LIST_32 KPDEPLOY_LIST_16 \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define KPDEPLOY_LIST_48 KPDEPLOY_LIST_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define KPDEPLOY_LIST_64 KPDEPLOY_LIST_32 \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define KPDEPLOY_LIST_96 KPDEPLOY_LIST_64 \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define KPDEPLOY_LIST_128 KPDEPLOY_LIST_96 \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define KPDEPLOY_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define KPDEPLOY_SUMS_8(i) KPDEPLOY_SUMS_4(i), KPDEPLOY_SUMS_4(i + 4)
#define KPDEPLOY_SUMS_16(i) KPDEPLOY_SUMS_8(i), KPDEPLOY_SUMS_8(i + 8)
#define KPDEPLOY_SUMS_32(i) KPDEPLOY_SUMS_16(i), KPDEPLOY_SUMS_16(i + 16)
#define KPDEPLOY_SUMS_48(i) KPDEPLOY_SUMS_32(i), KPDEPLOY_SUMS_16(i + 32)
#define KPDEPLOY_SUMS_64(i) KPDEPLOY_SUMS_32(i), KPDEPLOY_SUMS_32(i + 32)
#define KPDEPLOY_SUMS_128(i) KPDEPLOY_SUMS_64(i), KPDEPLOY_SUMS_64(i + 64)
#define KPDEPLOY_SUMS_96(i) KPDEPLOY_SUMS_64(i), KPDEPLOY_SUMS_32(i + 64)

#define KPDEPLOY_WGMMA(columns, sums, left_at, right_at, keep_at, depth, types, transposed)                        \
  asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #keep_at ", 0;\n"                                       \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k" #depth ".f32." types " {" KPDEPLOY_LIST_##sums "}, %" \
               #left_at ", %" #right_at ", keep, 1, 1" transposed ";\n}\n"                                         \
               : KPDEPLOY_SUMS_##sums(0)                                                                             \
               : "l"(left), "l"(right), "r"(keep))

#define KPDEPLOY_WGMMA_OF(columns, sums, left_at, right_at, keep_at)                                      \
  if constexpr (std::is_same_v<T, __nv_bfloat16>)                                                         \
    KPDEPLOY_WGMMA(columns, sums, left_at, right_at, keep_at, 16, "bf16.bf16", ", 0, 0");                 \
  else if constexpr (std::is_same_v<T, __half>)                                                           \
    KPDEPLOY_WGMMA(columns, sums, left_at, right_at, keep_at, 16, "f16.f16", ", 0, 0");                   \
  else                                                                                                    \
    KPDEPLOY_WGMMA(columns, sums, left_at, right_at, keep_at, 32, "e4m3.e4m3", "")
// clang-format on

// d (+)= left [64][32 bytes] right [columns][32 bytes]^T; keep = 0: what d held does not count. Lane l of the
// warpgroup's warp w has rows 16 w + l / 4 (d[4 j], d[4 j + 1]) and 8 below (d[4 j + 2], d[4 j + 3]), columns 8 j + l % 4 * 2
// and the next. Asynchronous: see wgmma_fence, wgmma_commit, wgmma_wait.
template <class T, int columns>
__device__ inline void wgmma(float (&d)[columns / 2], uint64_t left, uint64_t right, int keep) {
  if constexpr (columns == 8) {
    KPDEPLOY_WGMMA_OF(8, 4, 4, 5, 6);
  } else if constexpr (columns == 16) {
    KPDEPLOY_WGMMA_OF(16, 8, 8, 9, 10);
  } else if constexpr (columns == 32) {
    KPDEPLOY_WGMMA_OF(32, 16, 16, 17, 18);
  } else if constexpr (columns == 64) {
    KPDEPLOY_WGMMA_OF(64, 32, 32, 33, 34);
  } else if constexpr (columns == 96) {
    KPDEPLOY_WGMMA_OF(96, 48, 48, 49, 50);
  } else if constexpr (columns == 128) {
    KPDEPLOY_WGMMA_OF(128, 64, 64, 65, 66);
  } else if constexpr (columns == 192) {
    KPDEPLOY_WGMMA_OF(192, 96, 96, 97, 98);
  } else if constexpr (columns == 256) {
    KPDEPLOY_WGMMA_OF(256, 128, 128, 129, 130);
  } else {
    static_assert(columns == 8, "no such width");
  }
}

#undef KPDEPLOY_WGMMA_OF
#undef KPDEPLOY_WGMMA

}  // namespace kpdeploy
