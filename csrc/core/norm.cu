// Layer norm and RMS norm: a warp or a block for each row, which it holds in registers as far as they go.

#include "device.cuh"

namespace kpdeploy {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 32;  // elements that a thread holds; of longer rows it reads the rest again

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

// kVector elements in one access.
template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads) norm_rows(const CudaNorm a) {
  constexpr int kChunks = kHeld / kVector;
  const int64_t r = blockIdx.x * int64_t{kThreads / kGroup} + threadIdx.x / kGroup;
  if (r >= a.rows) return;  // a whole warp, and none where the block shares a row
  const T* x = row_of<const T>(a.x, r);
  const T* residual = a.adds ? row_of<const T>(a.residual, r) : nullptr;
  T* sum = a.adds ? row_of<T>(a.sum, r) : nullptr;
  T* normalized = row_of<T>(a.normalized, r);
  const int first = threadIdx.x % kGroup;
  const int64_t chunks = a.n / kVector, rest = first + int64_t{kChunks} * kGroup;

  const auto read = [&](int64_t chunk, float (&v)[kVector]) {
    load(x + chunk * kVector, v);
    if (!residual) return;
    float other[kVector];
    load(residual + chunk * kVector, other);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] += other[i];
  };

  float held[kChunks][kVector], total = 0;
  const auto take = [&](int64_t chunk, float (&v)[kVector]) {
    read(chunk, v);
    if (sum) store(sum + chunk * kVector, v);
#pragma unroll
    for (int i = 0; i < kVector; ++i) total += a.rms ? v[i] * v[i] : v[i];
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (first + c * kGroup < chunks) take(first + c * kGroup, held[c]);
  for (int64_t chunk = rest; chunk < chunks; chunk += kGroup) {
    float v[kVector];
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
      if (first + c * kGroup < chunks) add(held[c]);
    for (int64_t chunk = rest; chunk < chunks; chunk += kGroup) {
      float v[kVector];
      read(chunk, v);
      add(v);
    }
    variance = group_sum<kGroup>(squares) / a.n;
  }

  const float scale = 1 / sqrtf(variance + a.eps);
  const auto give = [&](int64_t chunk, float (&v)[kVector]) {
    float weight[kVector], bias[kVector] = {};
    load(static_cast<const T*>(a.weight) + chunk * kVector, weight);
    if (a.bias) load(static_cast<const T*>(a.bias) + chunk * kVector, bias);
#pragma unroll
    for (int i = 0; i < kVector; ++i) v[i] = (v[i] - mean) * scale * weight[i] + bias[i];
    store(normalized + chunk * kVector, v);
  };
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    if (first + c * kGroup < chunks) give(first + c * kGroup, held[c]);
  for (int64_t chunk = rest; chunk < chunks; chunk += kGroup) {
    float v[kVector];
    read(chunk, v);
    give(chunk, v);
  }
}

template <class T, int kVector>
void norm_in(const CudaNorm& a, void* stream) {
  if (a.n <= 32 * kHeld)
    launch(norm_rows<T, kVector, 32>, (a.rows + kThreads / 32 - 1) / (kThreads / 32), kThreads, 0, stream, a);
  else
    launch(norm_rows<T, kVector, kThreads>, a.rows, kThreads, 0, stream, a);
}

}  // namespace

template <class T>
void norm(const CudaNorm& a, void* stream) {
  const bool chunks = a.n % kChunk<T> == 0 && aligned(a.x, sizeof(T)) && aligned(a.normalized, sizeof(T)) &&
                      aligned(a.weight) && aligned(a.bias) &&
                      (!a.adds || (aligned(a.residual, sizeof(T)) && aligned(a.sum, sizeof(T))));
  if (chunks)
    norm_in<T, kChunk<T>>(a, stream);
  else
    norm_in<T, 1>(a, stream);
}

template void norm<float>(const CudaNorm&, void*);
template void norm<bf16>(const CudaNorm&, void*);
template void norm<f16>(const CudaNorm&, void*);

}  // namespace kpdeploy
