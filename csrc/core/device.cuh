// What the CUDA kernels share: conversions, 16-byte chunks, rows, activations, copies to shared memory, launches.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "checks.h"

namespace kpdeploy {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(bf16 v) { return __bfloat162float(v); }
__device__ inline float to_float(f16 v) { return __half2float(v); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) { return v; }
template <>
__device__ inline bf16 from_float<bf16>(float v) { return __float2bfloat16_rn(v); }
template <>
__device__ inline f16 from_float<f16>(float v) { return __float2half_rn(v); }

template <class T>
constexpr int kChunk = 16 / sizeof(T);  // elements that one access can move

template <class T, int n>
struct alignas(sizeof(T) * n) Vector {
  T item[n];
};

// The n elements at p, which is aligned to as many, as floats; and back.
template <int n, class T>
__device__ inline void load(const T* p, float (&to)[n]) {
  const auto v = *reinterpret_cast<const Vector<T, n>*>(p);
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = to_float(v.item[i]);
}

template <int n, class T>
__device__ inline void store(T* p, const float (&from)[n]) {
  Vector<T, n> v;
#pragma unroll
  for (int i = 0; i < n; ++i) v.item[i] = from_float<T>(from[i]);
  *reinterpret_cast<Vector<T, n>*>(p) = v;
}

// Two elements in one access where `paired`, else those that `first` and `second` name.
template <class T>
__device__ inline void store_pair(T* p, float a, float b, bool paired, bool first, bool second) {
  if (paired && first && second) return store<2>(p, {a, b});
  if (first) p[0] = from_float<T>(a);
  if (second) p[1] = from_float<T>(b);
}

template <class T>
__device__ inline T* row_of(const Walk& walk, int64_t r) {
  T* data = reinterpret_cast<T*>(walk.data);
  if (walk.dims <= 1) return data + r * walk.strides[0];
  for (int i = walk.dims - 1; i >= 0; --i) {
    data += r % walk.sizes[i] * walk.strides[i];
    r /= walk.sizes[i];
  }
  return data;
}

__device__ inline float silu(float x) { return x / (1 + expf(-x)); }

__device__ inline float activated(float x, int activation) {
  switch (activation) {
    case KPDEPLOY_RELU: return x < 0 ? 0 : x;  // a NaN stays one
    case KPDEPLOY_GELU: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case KPDEPLOY_GELU_TANH: return x / (1 + expf(-1.59576912f * (x + 0.044715f * x * x * x)));
    case KPDEPLOY_SILU: return silu(x);
    default: return x;
  }
}

// Sum or maximum over groups of `lanes` neighbours of a warp; every lane gets it.
template <int lanes>
__device__ inline float lanes_sum(float v) {
#pragma unroll
  for (int i = lanes / 2; i > 0; i /= 2) v += __shfl_xor_sync(~0u, v, i);
  return v;
}

template <int lanes>
__device__ inline float lanes_max(float v) {
#pragma unroll
  for (int i = lanes / 2; i > 0; i /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, i));
  return v;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// One chunk from global to shared memory: its first `count` elements (0 or all where `aligned`), the others 0.
// Asynchronous where aligned: see commit and wait.
template <class T>
__device__ inline void copy_chunk(T* to, const T* from, int64_t count, bool aligned) {
  if (aligned) {
    const int bytes = count > 0 ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes));
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) to[i] = i < count ? from[i] : from_float<T>(0);
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;\n"); }

// Until at most `pending` committed groups of this thread are under way.
template <int pending>
__device__ inline void wait() { asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory"); }

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row)
               : "memory");
}
__device__ inline void load_matrices(uint32_t (&to)[4], const void* row) { load_matrices(to, shared_address(row)); }

__device__ inline void load_transposed(uint32_t (&to)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row))
               : "memory");
}

// c [16][8] += a [16][16] b [16][8], in float32.
template <class T>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                 "{%0,%1,%2,%3};\n"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <class T>
__device__ inline uint32_t pack(float low, float high) {
  const Vector<T, 2> v{{from_float<T>(low), from_float<T>(high)}};
  return *reinterpret_cast<const uint32_t*>(&v);
}

// Host side: whether rows, or a pointer, can be read in accesses of 16 bytes.
inline bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

inline bool aligned(const Walk& walk, int64_t item_bytes) {
  bool fits = aligned(walk.data);
  for (int i = 0; i < walk.dims; ++i) fits = fits && walk.strides[i] * item_bytes % 16 == 0;
  return fits;
}

inline void check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return;
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction)
    refuse_unsupported("this GPU is older than these kernels: they need compute capability 8.0 or later");
  if (error == cudaErrorInsufficientDriver)
    refuse_unsupported("this NVIDIA driver is older than CUDA %d.%d, with which the kernels were built",
                       CUDART_VERSION / 1000, CUDART_VERSION % 1000 / 10);
  throw Refusal{KPDEPLOY_DEVICE_ERROR, std::string("CUDA: ") + cudaGetErrorString(error)};
}

template <class Argument, class... More>
void launch(void (*kernel)(Argument, More...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
            const Argument& argument, More... more) {
  if (blocks > INT32_MAX) refuse_unsupported("the tensors are too large for one launch");
  if (shared_bytes > 48 << 10)
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  const auto queue = static_cast<cudaStream_t>(stream);
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, queue>>>(argument, more...);
  check_cuda(cudaGetLastError());
}

// A kernel of launch_clusters may begin while the one before it in the stream runs: to be called before memory that
// another kernel may have written, or may still read, is touched. Nothing before compute capability 9.0.
__device__ inline void wait_for_earlier_kernels() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}
__device__ inline void let_next_kernel_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// For how many rows, at most, a kernel should begin while the one ahead of it ends: of products, and of norms and
// attention. In models of more, all kernels took a tenth longer with such starts (benchmarks/README.md).
constexpr int64_t kEarlyRows = 256, kEarlySpreadRows = 1024;

// Shared memory to ask for, so that blocks which begin early do not crowd on the multiprocessors that are free then: no
// more of them fit on one than it takes when all are free.
inline size_t spread_bytes(int64_t rows, int64_t blocks, int processors, size_t bytes) {
  constexpr int64_t kAll = 227 << 10, kReserved = 1024, kStatic = 256;  // of a multiprocessor; of each block
  if (rows <= kEarlyRows || blocks > 8 * processors) return bytes;
  const int64_t each = kAll / ((blocks + processors - 1) / processors) - kReserved - kStatic;
  return each > static_cast<int64_t>(bytes) ? static_cast<size_t>(each) : bytes;
}

// From compute capability 9.0 on. `early`: the kernel may begin while the one ahead of it in the stream runs.
template <class... Parameters, class... Arguments>
void launch_when(bool early, void (*kernel)(Parameters...), int blocks, int cluster, int threads, size_t shared_bytes,
                 void* stream, const Arguments&... arguments) {
  if (shared_bytes > 48 << 10)
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  cudaLaunchAttribute attributes[2]{};
  int count = 0;
  if (early) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  check_cuda(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), int blocks, int cluster, int threads, size_t shared_bytes,
                     void* stream, const Arguments&... arguments) {
  launch_when(true, kernel, blocks, cluster, threads, shared_bytes, stream, arguments...);
}

struct Gpu {
  int index, capability, processors;
  const char* name;
};

// The current device.
Gpu current_gpu();

// For rows that are few, the kernel begins while the one ahead of it ends, on a GPU that can.
template <class Kernel, class... Arguments>
void launch_rows(int64_t rows, Kernel kernel, int64_t blocks, int threads, void* stream, const Arguments&... arguments) {
  const Gpu gpu = current_gpu();
  const int64_t most = gpu.capability == 90 ? kEarlySpreadRows : kEarlyRows;  // others have less shared memory
  if (blocks <= INT32_MAX && rows <= most && gpu.capability >= 90)
    launch_clusters(kernel, static_cast<int>(blocks), 1, threads, spread_bytes(rows, blocks, gpu.processors, 0), stream,
                    arguments...);
  else
    launch(kernel, blocks, threads, 0, stream, arguments...);
}

// The entries of the table, from linear.cu, norm.cu, attention.cu and others; cuda.cu gathers them.
template <class T>
void norm(const CudaNorm& a, void* stream);
template <class T>
void quantize(const CudaQuantize& a, void* stream);
template <class T>
void rotary(const CudaRotary& a, void* stream);
template <class T>
void linear(const CudaLinear& a, void* stream);
void fp8_linear(const CudaLinear& a, void* stream);
template <class T>
void attention(const CudaAttention& a, void* stream);
template <class T>
void fp8_attention_operands(const CudaFp8Operands& a, void* stream);
void fp8_attention(const CudaFp8Attention& a, void* stream);
template <class T>
bool attended(const CudaAttended& a, void* stream);

}  // namespace kpdeploy
