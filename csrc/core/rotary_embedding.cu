// Rotary embedding: a thread takes one chunk of columns of a head, and those that they turn with.

#include "device.cuh"

namespace kpdeploy {
namespace {

constexpr int kThreads = 128;

// Cosines or sines, 16 bytes an access where x is read so.
template <int n>
__device__ inline void load_table(const float* p, float (&to)[n]) {
  constexpr int kAtOnce = n < 4 ? 1 : 4;
#pragma unroll
  for (int i = 0; i < n; i += kAtOnce) {
    float some[kAtOnce];
    load<kAtOnce>(p + i, some);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) to[i + j] = some[j];
  }
}

// Heads of one row lie in one block, or in few: what they read of the tables is in its cache. Threads that took several
// heads, with cosines and sines in registers, were slower.
template <class T, int kVector>
__global__ void __launch_bounds__(kThreads) rotary_rows(const __grid_constant__ CudaRotary a) {
  let_next_kernel_begin();
  const uint32_t half = static_cast<uint32_t>(a.turned) / 2, pairs = half / kVector;
  const uint32_t parts = pairs + static_cast<uint32_t>(a.size - a.turned) / kVector, heads = a.heads;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t part = thread % parts, head = thread / parts % heads, r = thread / parts / heads;
  const bool turns = part < pairs;  // the others are only copied
  const uint32_t at = turns ? part * kVector : 2 * half + (part - pairs) * kVector;
  wait_for_earlier_kernels();
  if (r >= a.rows) return;
  const T* const x = row_of<const T>(a.x, r) + head * a.size + at;
  T* const out = row_of<T>(a.out, r) + head * a.size + at;
  if (!turns) {
    using Chunk = Vector<T, kVector>;
    *reinterpret_cast<Chunk*>(out) = *reinterpret_cast<const Chunk*>(x);
    return;
  }
  const uint32_t table = r % static_cast<uint32_t>(a.tables);
  const float* const cos = row_of<const float>(a.cos, table) + at;
  const float* const sin = row_of<const float>(a.sin, table) + at;
  float low[kVector], high[kVector], cos_low[kVector], cos_high[kVector], sin_low[kVector], sin_high[kVector];
  load<kVector>(x, low);
  load<kVector>(x + half, high);
  load_table(cos, cos_low);
  load_table(cos + half, cos_high);
  load_table(sin, sin_low);
  load_table(sin + half, sin_high);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    const float first = low[i], second = high[i];
    low[i] = first * cos_low[i] - second * sin_low[i];
    high[i] = second * cos_high[i] + first * sin_high[i];
  }
  store(out, low);
  store(out + half, high);
}

template <class T, int kVector>
void rotary_in(const CudaRotary& a, void* stream) {
  const int64_t threads = a.rows * a.heads * (a.size - a.turned / 2) / kVector;
  if (threads > INT32_MAX) refuse_unsupported("the tensors are too large for one launch");
  launch_rows(a.rows, rotary_rows<T, kVector>, (threads + kThreads - 1) / kThreads, kThreads, stream, a);
}

}  // namespace

template <class T>
void rotary(const CudaRotary& a, void* stream) {
  constexpr int kVector = kChunk<T>;
  const bool in_chunks = a.turned / 2 % kVector == 0 && a.size % kVector == 0 && aligned(a.x, sizeof(T)) &&
                         aligned(a.out, sizeof(T)) && aligned(a.cos, sizeof(float)) && aligned(a.sin, sizeof(float));
  return in_chunks ? rotary_in<T, kVector>(a, stream) : rotary_in<T, 1>(a, stream);
}

template void rotary<float>(const CudaRotary&, void*);
template void rotary<bf16>(const CudaRotary&, void*);
template void rotary<f16>(const CudaRotary&, void*);

}  // namespace kpdeploy
