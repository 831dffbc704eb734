// Layer norm and RMS norm: a warp or a block for each row, which it holds in registers as far as they go; and what
// turns floats into 8-bit ones, of a norm's result or by itself.

#include <cuda_fp8.h>

#include <algorithm>

#include "device.cuh"

namespace kpdeploy {
namespace {

constexpr int kThreads = 256;

// Over the threads that share a row: a warp, or all of the block.
template <int kGroup>
__device__ float group_sum(float v) {
  v = lanes_sum<32>(v);
  if (kGroup == 32) return v;
  __shared__ float parts[kThreads / 32];
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) total += parts[i];
  return total;
}

// n elements times `by`, as 8-bit floats, at an address that is aligned to as many.
template <int n>
__device__ inline void store_f8(char* to, const float (&from)[n], float by) {
  if constexpr (n == 1) {
    *to = static_cast<char>(__nv_cvt_float_to_fp8(from[0] * by, __NV_SATFINITE, __NV_E4M3));
  } else {
    Vector<uint16_t, n / 2> v;
#pragma unroll
    for (int i = 0; i < n / 2; ++i)
      v.item[i] = __nv_cvt_float2_to_fp8x2({from[2 * i] * by, from[2 * i + 1] * by}, __NV_SATFINITE, __NV_E4M3);
    *reinterpret_cast<Vector<uint16_t, n / 2>*>(to) = v;
  }
}

// Elements as they were read: floats of them would take twice the registers. Forgotten between passes, so that the
// compiler does not keep those.
template <class T, int n>
struct Packed {
  static constexpr int kWords = n * sizeof(T) / 4;
  using Word = std::conditional_t<kWords != 0, uint32_t, uint16_t>;
  Vector<Word, kWords ? kWords : 1> words;

  __device__ float at(int i) const { return to_float(reinterpret_cast<const T*>(&words)[i]); }
  __device__ void forget() {
    if constexpr (kWords != 0)
#pragma unroll
      for (int i = 0; i < kWords; ++i) asm volatile("" : "+r"(words.item[i]));
  }
};

constexpr int kMost = 4;  // chunks that a thread holds

template <class T>
__device__ inline T* plain_row(const Walk& walk, int64_t r) {
  return reinterpret_cast<T*>(walk.data) + r * walk.strides[0];
}

// Rows of one stride that a warp holds, as floats, each all at once. Beside norm_rows it takes a fifth less for many rows of
// 768 (benchmarks/README.md).
template <class T, int kChunks>
__global__ void __launch_bounds__(kThreads) norm_short_rows(const __grid_constant__ CudaNorm a) {
  constexpr int kVector = kChunk<T>;
  using Chunk = Packed<T, kVector>;
  let_next_kernel_begin();
  const int lane = threadIdx.x % 32, chunks = static_cast<int>(a.n) / kVector;
  const int64_t r = blockIdx.x * int64_t{blockDim.x / 32} + threadIdx.x / 32;
  if (r >= a.rows) return;
  const auto there = [&](int c) { return lane + c * 32 < chunks; };
  const auto at = [&](int c) { return (lane + c * 32) * kVector; };
  const auto ask = [&](Chunk(&to)[kChunks], const void* from) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (there(c)) to[c] = static_cast<const Chunk*>(from)[lane + c * 32];
  };
  wait_for_earlier_kernels();
  Chunk own[kChunks], other[kChunks], weights[kChunks], biases[kChunks];
  ask(own, plain_row<const T>(a.x, r));
  if (a.adds) ask(other, plain_row<const T>(a.residual, r));
  ask(weights, a.weight);
  if (a.bias) ask(biases, a.bias);
  const float inverse = a.out_scale ? 1 / *a.out_scale : 1;

  float v[kChunks][kVector], total = 0;
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (there(c)) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        v[c][i] = own[c].at(i) + (a.adds ? other[c].at(i) : 0.0f);
        total += a.rms ? v[c][i] * v[c][i] : v[c][i];
      }
      if (a.adds) store(plain_row<T>(a.sum, r) + at(c), v[c]);
    }
  float mean = 0, variance = lanes_sum<32>(total) / a.n;
  if (!a.rms) {  // a second pass: E[x^2] - mean^2 would lose digits
    mean = variance;
    float squares = 0;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (there(c))
#pragma unroll
        for (int i = 0; i < kVector; ++i) squares += (v[c][i] - mean) * (v[c][i] - mean);
    variance = lanes_sum<32>(squares) / a.n;
  }
  const float scale = 1 / sqrtf(variance + a.eps);
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (there(c)) {
#pragma unroll
      for (int i = 0; i < kVector; ++i)
        v[c][i] = (v[c][i] - mean) * scale * weights[c].at(i) + (a.bias ? biases[c].at(i) : 0.0f);
      if (a.normalized.data) store(plain_row<T>(a.normalized, r) + at(c), v[c]);
      if (a.out_scale) store_f8(plain_row<char>(a.quantized, r) + at(c), v[c], inverse);
    }
}

// kVector elements in one access; kChunks of them in registers. Of rows that are longer than the most, the rest is read
// again.
template <class T, int kVector, int kGroup, int kChunks>
__global__ void __launch_bounds__(kThreads, kGroup == 32 ? 1 : kChunks <= 2 ? 4 : 2) norm_rows(const __grid_constant__ CudaNorm a) {
  using Chunk = Packed<T, kVector>;
  constexpr bool kLong = kVector == 1 || kChunks == kMost;
  let_next_kernel_begin();
  const int64_t r = blockIdx.x * int64_t{blockDim.x / kGroup} + threadIdx.x / kGroup;
  if (r >= a.rows) return;  // a whole warp, and none where the block shares a row
  const T* x = row_of<const T>(a.x, r);
  const T* residual = a.adds ? row_of<const T>(a.residual, r) : nullptr;
  T* sum = a.adds ? row_of<T>(a.sum, r) : nullptr;
  T* normalized = row_of<T>(a.normalized, r);
  char* quantized = a.out_scale ? row_of<char>(a.quantized, r) : nullptr;
  const int first = threadIdx.x % kGroup, chunks = static_cast<int>(a.n / kVector);
  const int rest = kLong ? first + kChunks * kGroup : chunks;
  const auto there = [&](int c) { return first + c * kGroup < chunks; };

  // All that the row needs is asked for before any of it is used.
  wait_for_earlier_kernels();
  Chunk own[kChunks], other[kChunks], weights[kChunks], biases[kChunks];
  const auto ask = [&](Chunk(&to)[kChunks], const void* from) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (there(c)) to[c] = static_cast<const Chunk*>(from)[first + c * kGroup];
  };
  ask(own, x);
  if (residual) ask(other, residual);
  ask(weights, a.weight);
  if (a.bias) ask(biases, a.bias);
  const float inverse = a.out_scale ? 1 / *a.out_scale : 1;

  const auto add_up = [&](Chunk& one, Chunk& two, float (&v)[kVector]) {
    if constexpr (kGroup > 32) {  // rows of a warp are short: there registers are no limit
      one.forget();
      two.forget();
    }
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = one.at(i) + (residual ? two.at(i) : 0.0f);
  };
  const auto read = [&](int chunk, float (&v)[kVector]) {
    Chunk one = reinterpret_cast<const Chunk*>(x)[chunk], two = one;
    if (residual) two = reinterpret_cast<const Chunk*>(residual)[chunk];
    add_up(one, two, v);
  };
  float total = 0;
  const auto take = [&](int chunk, const float (&v)[kVector]) {
    if (sum) store(sum + chunk * kVector, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += a.rms ? v[i] * v[i] : v[i];
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (there(c)) {
      float v[kVector];
      add_up(own[c], other[c], v);
      take(first + c * kGroup, v);
    }
  for (int chunk = rest; chunk < chunks; chunk += kGroup) {
    float v[kVector];
    read(chunk, v);
    take(chunk, v);
  }

  float mean = 0, variance = group_sum<kGroup>(total) / a.n;
  if (!a.rms) {  // a second pass: E[x^2] - mean^2 would lose digits
    mean = variance;
    float squares = 0;
    const auto add = [&](const float (&v)[kVector]) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) squares += (v[i] - mean) * (v[i] - mean);
    };
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
      if (there(c)) {
      float v[kVector];
      add_up(own[c], other[c], v);
      add(v);
    }
    for (int chunk = rest; chunk < chunks; chunk += kGroup) {
      float v[kVector];
      read(chunk, v);
      add(v);
    }
    variance = group_sum<kGroup>(squares) / a.n;
  }

  const float scale = 1 / sqrtf(variance + a.eps);
  const auto give = [&](int chunk, float (&v)[kVector], const Chunk& weight, const Chunk& bias) {
#pragma unroll
    for (int i = 0; i < kVector; ++i)
      v[i] = (v[i] - mean) * scale * weight.at(i) + (a.bias ? bias.at(i) : 0.0f);
    if (a.normalized.data) store(normalized + chunk * kVector, v);
    if (quantized) store_f8(quantized + chunk * kVector, v, inverse);
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (there(c)) {
      float v[kVector];
      add_up(own[c], other[c], v);
      give(first + c * kGroup, v, weights[c], biases[c]);
    }
  for (int chunk = rest; chunk < chunks; chunk += kGroup) {
    float v[kVector];
    read(chunk, v);
    const Chunk weight = static_cast<const Chunk*>(a.weight)[chunk];
    give(chunk, v, weight, a.bias ? static_cast<const Chunk*>(a.bias)[chunk] : weight);
  }
}

// kAtOnce elements of a row to a thread.
constexpr int kAtOnce = 16;

template <class T>
__global__ void __launch_bounds__(kThreads) quantize_rows(const __grid_constant__ CudaQuantize a, const bool is_aligned) {
  let_next_kernel_begin();
  const int64_t parts = (a.n + kAtOnce - 1) / kAtOnce, part = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const int64_t r = part / parts, at = part % parts * kAtOnce;
  wait_for_earlier_kernels();
  if (r >= a.rows) return;
  const T* const from = row_of<const T>(a.x, r) + at;
  char* const to = a.out + r * a.n + at;
  const float inverse = 1 / *a.scale;
  if (is_aligned && at + kAtOnce <= a.n) {
    float v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; i += kChunk<T>) {
      const auto some = *reinterpret_cast<const Vector<T, kChunk<T>>*>(from + i);
#pragma unroll
      for (int j = 0; j < kChunk<T>; ++j) v[i + j] = to_float(some.item[j]);
    }
    return store_f8(to, v, inverse);
  }
  for (int i = 0; i < kAtOnce && at + i < a.n; ++i) store_f8<1>(to + i, {to_float(from[i])}, inverse);
}

// A few rows are spread over the chip, a warp a block.
void norm_in_warps(void (*kernel)(CudaNorm), const CudaNorm& a, void* stream) {
  const int64_t each = std::clamp<int64_t>(a.rows / 256, 1, kThreads / 32);
  launch_rows(a.rows, kernel, (a.rows + each - 1) / each, static_cast<int>(each) * 32, stream, a);
}

template <class T, int kVector, int kChunks>
void norm_in_blocks(const CudaNorm& a, void* stream) {
  launch_rows(a.rows, norm_rows<T, kVector, kThreads, kChunks>, a.rows, kThreads, stream, a);
}

// The form of a kernel with room for so many chunks, up to kMost.
template <class Form>
void with_chunks(int64_t chunks, const Form& form) {
  if (chunks <= 1) return form(std::integral_constant<int, 1>{});
  if (chunks == 2) return form(std::integral_constant<int, 2>{});
  if (chunks == 3) return form(std::integral_constant<int, 3>{});
  form(std::integral_constant<int, kMost>{});
}

// Whether rows of bytes can be written `bytes` at a time.
bool lies_in(const Walk& walk, int64_t bytes) {
  bool fits = reinterpret_cast<uintptr_t>(walk.data) % bytes == 0;
  for (int i = 0; i < walk.dims; ++i) fits = fits && walk.strides[i] % bytes == 0;
  return fits;
}

}  // namespace

template <class T>
void norm(const CudaNorm& a, void* stream) {
  constexpr int kVector = kChunk<T>;
  if (a.n > INT32_MAX) refuse_unsupported("rows of %lld elements are too long for one launch", (long long)a.n);
  const bool in_chunks = a.n % kVector == 0 && aligned(a.x, sizeof(T)) && aligned(a.normalized, sizeof(T)) &&
                         aligned(a.weight) && aligned(a.bias) &&
                         (!a.adds || (aligned(a.residual, sizeof(T)) && aligned(a.sum, sizeof(T)))) &&
                         (!a.out_scale || lies_in(a.quantized, kVector));
  if (!in_chunks && a.n <= 8 * 32) return norm_in_warps(norm_rows<T, 1, 32, 8>, a, stream);
  if (!in_chunks) return norm_in_blocks<T, 1, 8>(a, stream);
  const bool one_stride = std::max({a.x.dims, a.residual.dims, a.normalized.dims, a.sum.dims, a.quantized.dims}) <= 1;
  const bool in_warp = one_stride && a.n <= kMost * 32 * kVector;
  const int64_t at_once = (in_warp ? 32 : kThreads) * kVector;
  with_chunks((a.n + at_once - 1) / at_once, [&](auto chunks) {
    if (in_warp) return norm_in_warps(norm_short_rows<T, chunks>, a, stream);
    norm_in_blocks<T, kVector, chunks>(a, stream);
  });
}

template <class T>
void quantize(const CudaQuantize& a, void* stream) {
  const bool is_aligned = aligned(a.x, sizeof(T)) && aligned(a.out) && (a.rows == 1 || a.n % kAtOnce == 0);
  const int64_t parts = a.rows * ((a.n + kAtOnce - 1) / kAtOnce);
  // In rows of 1024: many may lie in one.
  launch_rows(a.rows * a.n / 1024, quantize_rows<T>, (parts + kThreads - 1) / kThreads, kThreads, stream, a, is_aligned);
}

template void norm<float>(const CudaNorm&, void*);
template void norm<bf16>(const CudaNorm&, void*);
template void norm<f16>(const CudaNorm&, void*);
template void quantize<float>(const CudaQuantize&, void*);
template void quantize<bf16>(const CudaQuantize&, void*);
template void quantize<f16>(const CudaQuantize&, void*);

}  // namespace kpdeploy
