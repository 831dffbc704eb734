// What kernels for compute capability 9.0 share: barriers in shared memory, the copy engine, clusters.
//
// PTX ISA: "mbarrier", "cp.async.bulk.tensor", "barrier.cluster".
#pragma once

#include <cuda.h>

#include "device.cuh"

namespace kpdeploy {

// cuTensorMapEncodeTiled of the driver that is there: libcuda is not linked, so that the library loads without one.
using Encode = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                        const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                        CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

inline Encode* encoder() {
  static Encode* const encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result));
#else
    check_cuda(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result));
#endif
    if (result != cudaDriverEntryPointSuccess) refuse_unsupported("this NVIDIA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode*>(found);
  }();
  return encode;
}

// A barrier counts arrivals and bytes; its phases alternate in parity, 0 first.
__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}

// After all barrier_init of a thread, before others use them.
__device__ inline void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

__device__ inline void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is over.
__device__ inline void wait_for(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred over;\n"
      "KPDEPLOY_AGAIN_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n"
      "@!over bra KPDEPLOY_AGAIN_%=;\n}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// The box of a tensor that starts at (column, row), to shared memory; its bytes arrive at the barrier.
__device__ inline void copy_box(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}

// Back: what lies outside of the tensor is left out. What the thread's warp stored must be fenced first: see
// fence_stores. Then commit_boxes.
__device__ inline void store_box(const CUtensorMap& map, uint32_t from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n" ::"l"(&map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}

__device__ inline void commit_boxes() { asm volatile("cp.async.bulk.commit_group;\n" ::: "memory"); }

// Until at most `pending` committed groups of this thread still read shared memory.
template <int pending>
__device__ inline void wait_boxes_read() { asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(pending) : "memory"); }

// Makes this thread's ordinary stores to shared memory visible to the copy engine and the tensor cores.
__device__ inline void fence_stores() { asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory"); }

// Registers of each thread of this warpgroup from here on: they move from warpgroups that need few.
template <int count>
__device__ inline void registers_up() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(count)); }
template <int count>
__device__ inline void registers_down() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(count)); }

__device__ inline int cluster_rank() {
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release.aligned;\n" ::: "memory"); }
// Orders no memory but barriers_ready: a release waits for all that the thread has stored.
__device__ inline void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\n" ::: "memory");
}
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;\n" ::: "memory"); }

// `threads` of the block, whole warps; ids from 1 on.
__device__ inline void group_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(id), "r"(threads) : "memory");
}

// Four floats to shared memory of block `rank` of the cluster; 16 bytes arrive at the barrier there. Both addresses are
// those of this block's.
__device__ inline void send(uint32_t to, uint32_t barrier, int rank, float a, float b, float c, float d) {
  asm volatile(
      "{\n.reg .b32 there, at;\n"
      "mapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 at, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%3, %4, %5, %6}, [at];\n}\n" ::"r"(to),
      "r"(barrier), "r"(rank), "f"(a), "f"(b), "f"(c), "f"(d)
      : "memory");
}

// To the second cache, where a later write still finds it: allowed before wait_for_earlier_kernels.
__device__ inline void prefetch(const void* line) { asm volatile("prefetch.global.L2 [%0];\n" ::"l"(line) : "memory"); }
__device__ inline void prefetch_box(const CUtensorMap& map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];\n" ::"l"(&map), "r"(column), "r"(row)
               : "memory");
}

__device__ inline void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// A place in a ring, and the parity of how often it went round.
template <int kStages>
struct Place {
  int stage = 0, round = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      round ^= 1;
    }
  }
};

__device__ inline float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

// The first in the lower half.
template <class T>
__device__ inline uint32_t pack_pair(float low, float high) {
  uint32_t v;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;\n" : "=r"(v) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;\n" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// Four 8-bit floats, saturated, the first in the lowest byte.
__device__ inline uint32_t pack_four(float a, float b, float c, float d) {
  uint32_t v;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}\n"
      : "=r"(v)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return v;
}

__device__ inline uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.
__device__ inline void store_matrices(uint32_t row, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};\n" ::"r"(row), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

// Host side: a matrix [rows][columns] whose rows are `stride` bytes apart (a multiple of 16, as its address), for boxes
// of box_rows x `line` bytes (128 or 64), swizzled by as many; what lies outside reads as 0.
CUtensorMap tensor_map(const void* data, CUtensorMapDataType type, int item_bytes, int64_t rows, int64_t columns,
                       int64_t stride, int box_rows, int line = 128);

}  // namespace kpdeploy
