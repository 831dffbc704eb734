// Rotary embedding: a thread takes the same columns of a few heads of one row, whose cosines and sines it reads once.

#include "device.cuh"

namespace kpdeploy {
namespace {

constexpr int kThreads = 128;
constexpr int kHeads = 4;                 // of one thread, where rows are many
constexpr int64_t kManyThreads = 1 << 17;  // more than a GPU runs at once: then a thread takes several heads

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

// kVector columns of the first half and those of the second that they turn with; behind them, of what is only copied.
// `groups` of kGroup heads in a row.
template <class T, int kVector, int kGroup>
__global__ void __launch_bounds__(kThreads) rotary_rows(const __grid_constant__ CudaRotary a, const uint32_t groups) {
  using Chunk = Vector<T, kVector>;
  let_next_kernel_begin();
  const uint32_t half = static_cast<uint32_t>(a.turned) / 2, pairs = half / kVector;
  const uint32_t parts = pairs + static_cast<uint32_t>(a.size - a.turned) / kVector, thread = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t part = thread % parts, group = thread / parts % groups, r = thread / parts / groups;
  wait_for_earlier_kernels();
  if (r >= a.rows) return;
  const bool turns = part < pairs;
  const uint32_t at = turns ? part * kVector : static_cast<uint32_t>(a.turned) + (part - pairs) * kVector;
  const uint32_t first = group * kGroup, size = static_cast<uint32_t>(a.size);
  const T* const x = row_of<const T>(a.x, r) + at;
  T* const out = row_of<T>(a.out, r) + at;
  const auto there = [&](int h) { return first + h < a.heads; };

  Chunk low[kGroup], high[kGroup];
#pragma unroll
  for (int h = 0; h < kGroup; ++h)
    if (there(h)) {
      const T* const from = x + (first + h) * size;
      low[h] = *reinterpret_cast<const Chunk*>(from);
      if (turns) high[h] = *reinterpret_cast<const Chunk*>(from + half);
    }
  if (!turns) {
#pragma unroll
    for (int h = 0; h < kGroup; ++h)
      if (there(h)) *reinterpret_cast<Chunk*>(out + (first + h) * size) = low[h];
    return;
  }
  float cos_low[kVector], cos_high[kVector], sin_low[kVector], sin_high[kVector];
  const float* const cos = row_of<const float>(a.cos, r % a.tables) + at;
  const float* const sin = row_of<const float>(a.sin, r % a.tables) + at;
  load_table(cos, cos_low);
  load_table(cos + half, cos_high);
  load_table(sin, sin_low);
  load_table(sin + half, sin_high);
#pragma unroll
  for (int h = 0; h < kGroup; ++h)
    if (there(h)) {
      float one[kVector], two[kVector];
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const float u = to_float(low[h].item[i]), v = to_float(high[h].item[i]);
        one[i] = u * cos_low[i] - v * sin_low[i];
        two[i] = v * cos_high[i] + u * sin_high[i];
      }
      T* const to = out + (first + h) * size;
      store(to, one);
      store(to + half, two);
    }
}

template <class T, int kVector, int kGroup>
void rotary_in(const CudaRotary& a, int64_t threads_of_a_head, void* stream) {
  const int64_t groups = (a.heads + kGroup - 1) / kGroup, threads = threads_of_a_head * groups;
  if (threads > UINT32_MAX) refuse_unsupported("the tensors are too large for one launch");
  launch_rows(a.rows, rotary_rows<T, kVector, kGroup>, (threads + kThreads - 1) / kThreads, kThreads, stream, a,
              static_cast<uint32_t>(groups));
}

}  // namespace

template <class T>
void rotary(const CudaRotary& a, void* stream) {
  constexpr int kVector = kChunk<T>;
  const bool in_chunks = a.turned / 2 % kVector == 0 && a.size % kVector == 0 && aligned(a.x, sizeof(T)) &&
                         aligned(a.out, sizeof(T)) && aligned(a.cos, sizeof(float)) && aligned(a.sin, sizeof(float));
  const int64_t each = a.rows * (a.size - a.turned / 2) / (in_chunks ? kVector : 1);
  if (!in_chunks) return rotary_in<T, 1, 1>(a, each, stream);
  if (each * a.heads < kManyThreads) return rotary_in<T, kVector, 1>(a, each, stream);
  rotary_in<T, kVector, kHeads>(a, each, stream);
}

template void rotary<float>(const CudaRotary&, void*);
template void rotary<bf16>(const CudaRotary&, void*);
template void rotary<f16>(const CudaRotary&, void*);

}  // namespace kpdeploy
