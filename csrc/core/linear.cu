// linear_activation and gated_linear: tiles of x times tiles of the weight, both contiguous along K. 16-bit dtypes on
// the tensor cores with float32 sums, float32 in plain float32. A few rows: each row of the weight is read once.

#include "cublaslt.h"
#include "device.cuh"
#include "gpu_choice.h"
#include "hopper_linear.h"

namespace kpdeploy {
namespace {

constexpr int kThreads = 256;
constexpr int kDotRows = 4;

int64_t blocks(int64_t n, int64_t size) { return (n + size - 1) / size; }

// Where a block's tile starts. Blocks that run together share a band of rows, and with it what is in the second cache.
struct Corner {
  int64_t row, column;
};

__device__ Corner corner(int64_t rows, int64_t columns, int tile_rows, int tile_columns) {
  constexpr int64_t kBand = 8;
  const int64_t down = (rows + tile_rows - 1) / tile_rows, across = (columns + tile_columns - 1) / tile_columns;
  const int64_t band = blockIdx.x / (kBand * across), within = blockIdx.x % (kBand * across);
  const int64_t height = min(kBand, down - band * kBand);
  return {(band * kBand + within % height) * tile_rows, within / height * tile_columns};
}

// activation(product + bias) + residual, or SiLU(gate) * product.
template <class T, bool kGated>
__device__ float finished(const CudaLinear& a, float product, float gate, int64_t row, int64_t column) {
  if (kGated) return silu(gate) * product;
  if (column >= a.n) return product;
  if (a.bias) product += to_float(static_cast<const T*>(a.bias)[column]);
  product = activated(product, a.activation);
  return a.residual.data ? product + to_float(row_of<const T>(a.residual, row)[column]) : product;
}

// Tensor cores: 2 x 4 warps, three stages of kDepth columns of K in shared memory.
template <class T, int kRows, int kColumns, bool kGated>
struct Tiles {
  static constexpr int kDepth = 32, kWidth = kDepth + 8;  // 80 bytes a row: ldmatrix meets no bank twice
  static constexpr int kStages = 3, kWeights = kGated ? 2 : 1;
  static constexpr int kStage = (kRows + kWeights * kColumns) * kWidth;
  static constexpr size_t kBytes = sizeof(T) * kStage * kStages;
};

template <class T, int kRows, int kColumns, bool kGated>
__global__ void __launch_bounds__(kThreads) multiply(const CudaLinear a, const bool is_aligned) {
  using S = Tiles<T, kRows, kColumns, kGated>;
  constexpr int kDown = kRows / 2 / 16, kAcross = kColumns / 4 / 8;  // 16 x 8 products of one warp
  constexpr int kChunks = S::kDepth / 8, kStep = kThreads / kChunks;  // chunks in a row; rows that all threads copy
  extern __shared__ __align__(16) unsigned char memory[];
  T* const shared = reinterpret_cast<T*>(memory);
  const Corner at = corner(a.rows, a.n, kRows, kColumns);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int own_row = threadIdx.x / kChunks, own_column = threadIdx.x % kChunks * 8;

  // The rows that this thread copies its part of: of x, then of the weights; null beyond the last.
  constexpr int kOfX = kRows / kStep, kOfWeight = kColumns / kStep;
  const T* from[kOfX + S::kWeights * kOfWeight];
#pragma unroll
  for (int i = 0; i < kOfX; ++i) {
    const int64_t r = at.row + own_row + i * kStep;
    from[i] = r < a.rows ? row_of<const T>(a.x, r) + own_column : nullptr;
  }
#pragma unroll
  for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
    for (int i = 0; i < kOfWeight; ++i) {
      const int64_t n = at.column + own_row + i * kStep;
      const CudaMatrix& matrix = w == 0 ? a.weight : a.gate;
      from[kOfX + w * kOfWeight + i] =
          n < a.n ? static_cast<const T*>(matrix.data) + n * matrix.stride + own_column : nullptr;
    }

  const auto fill = [&](int64_t step, int slot) {
    T* const to = shared + slot * S::kStage + own_row * S::kWidth + own_column;
    const int64_t k = step * S::kDepth, left = a.k - k - own_column;
#pragma unroll
    for (int i = 0; i < kOfX + S::kWeights * kOfWeight; ++i) {
      const bool there = from[i] && left > 0;
      copy_chunk(to + i * kStep * S::kWidth, there ? from[i] + k : static_cast<const T*>(a.weight.data),
                 there ? left : 0, is_aligned);
    }
  };

  float sums[S::kWeights][kDown][kAcross][4] = {};
  const int warp_row = warp / 4 * (kRows / 2), warp_column = warp % 4 * (kColumns / 4);
  const int64_t steps = (a.k + S::kDepth - 1) / S::kDepth;
#pragma unroll
  for (int s = 0; s < S::kStages - 1; ++s) {
    if (s < steps) fill(s, s);
    commit();
  }
  int slot = 0, next = S::kStages - 1;
  for (int64_t step = 0; step < steps; ++step) {
    wait<S::kStages - 2>();
    __syncthreads();  // this step's stage is there, and the one before it has been used
    if (step + S::kStages - 1 < steps) fill(step + S::kStages - 1, next);
    commit();
    const T* const stage = shared + slot * S::kStage;
    next = slot;
    slot = slot + 1 == S::kStages ? 0 : slot + 1;
#pragma unroll
    for (int k = 0; k < S::kDepth; k += 16) {
      uint32_t left[kDown][4];
#pragma unroll
      for (int i = 0; i < kDown; ++i)
        load_matrices(left[i], stage + (warp_row + i * 16 + lane % 16) * S::kWidth + k + lane / 16 * 8);
#pragma unroll
      for (int w = 0; w < S::kWeights; ++w)
#pragma unroll
        for (int j = 0; j < kAcross; j += 2) {
          uint32_t right[4];
          const int n = kRows + w * kColumns + warp_column + j * 8 + lane / 16 * 8 + lane % 8;
          load_matrices(right, stage + n * S::kWidth + k + lane / 8 % 2 * 8);
#pragma unroll
          for (int i = 0; i < kDown; ++i) {
            multiply_add<T>(sums[w][i][j], left[i], right[0], right[1]);
            multiply_add<T>(sums[w][i][j + 1], left[i], right[2], right[3]);
          }
        }
    }
  }
  wait<0>();

#pragma unroll
  for (int i = 0; i < kDown; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t r = at.row + warp_row + i * 16 + half * 8 + lane / 4;
      if (r >= a.rows) continue;
      T* const out = row_of<T>(a.out, r);
      const bool paired = reinterpret_cast<uintptr_t>(out) % (2 * sizeof(T)) == 0;
#pragma unroll
      for (int j = 0; j < kAcross; ++j) {
        const int64_t n = at.column + warp_column + j * 8 + lane % 4 * 2;
        float values[2];
#pragma unroll
        for (int c = 0; c < 2; ++c)
          values[c] = finished<T, kGated>(a, sums[0][i][j][half * 2 + c], sums[S::kWeights - 1][i][j][half * 2 + c],
                                          r, n + c);
        store_pair(out + n, values[0], values[1], paired, n < a.n, n + 1 < a.n);
      }
    }
}

// Plain float32: 16 x 16 threads, each with kDown x kAcross sums in groups of four.
template <int kRows, int kColumns, bool kGated>
__global__ void __launch_bounds__(kThreads, 2) multiply_plain(const CudaLinear a, const bool is_aligned) {
  constexpr int kDepth = 16, kDown = kRows / 16, kAcross = kColumns / 16, kWeights = kGated ? 2 : 1;
  constexpr int kStep = kThreads / 4;  // rows that all threads copy, four floats each
  __shared__ __align__(16) float left[kDepth][kRows + 4], right[kWeights][kDepth][kColumns + 4];
  const Corner at = corner(a.rows, a.n, kRows, kColumns);
  const int own_row = threadIdx.x / 4, own_column = threadIdx.x % 4 * 4;
  const int down = threadIdx.x / 16 * 4, across = threadIdx.x % 16 * 4;
  const float* x[kRows / kStep];
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int64_t r = at.row + own_row + i * kStep;
    x[i] = r < a.rows ? row_of<const float>(a.x, r) : nullptr;
  }
  const float* const weights[2] = {static_cast<const float*>(a.weight.data), static_cast<const float*>(a.gate.data)};
  const int64_t strides[2] = {a.weight.stride, a.gate.stride};

  const auto read = [&](const float* row, int64_t k, float (&to)[4]) {
    if (row && is_aligned && k < a.k) return load(row + k, to);
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = row && k + i < a.k ? row[k + i] : 0;
  };
  float next_left[kRows / kStep][4], next_right[kWeights][kColumns / kStep][4];
  const auto fetch = [&](int64_t k) {
#pragma unroll
    for (int i = 0; i < kRows / kStep; ++i) read(x[i], k + own_column, next_left[i]);
#pragma unroll
    for (int w = 0; w < kWeights; ++w)
#pragma unroll
      for (int i = 0; i < kColumns / kStep; ++i) {
        const int64_t n = at.column + own_row + i * kStep;
        read(n < a.n ? weights[w] + n * strides[w] : nullptr, k + own_column, next_right[w][i]);
      }
  };

  float sums[kWeights][kDown][kAcross] = {};
  fetch(0);
  for (int64_t k = 0; k < a.k; k += kDepth) {
    __syncthreads();  // the tiles before have been used
#pragma unroll
    for (int c = 0; c < 4; ++c) {
#pragma unroll
      for (int i = 0; i < kRows / kStep; ++i) left[own_column + c][own_row + i * kStep] = next_left[i][c];
#pragma unroll
      for (int w = 0; w < kWeights; ++w)
#pragma unroll
        for (int i = 0; i < kColumns / kStep; ++i) right[w][own_column + c][own_row + i * kStep] = next_right[w][i][c];
    }
    __syncthreads();
    if (k + kDepth < a.k) fetch(k + kDepth);
#pragma unroll
    for (int p = 0; p < kDepth; ++p) {
      float l[kDown];
#pragma unroll
      for (int i = 0; i < kDown; i += 4)
        *reinterpret_cast<float4*>(l + i) = *reinterpret_cast<const float4*>(&left[p][i / 4 * 64 + down]);
#pragma unroll
      for (int w = 0; w < kWeights; ++w)
#pragma unroll
        for (int j = 0; j < kAcross; j += 4) {
          const float4 r = *reinterpret_cast<const float4*>(&right[w][p][j / 4 * 64 + across]);
#pragma unroll
          for (int i = 0; i < kDown; ++i) {
            sums[w][i][j] = fmaf(l[i], r.x, sums[w][i][j]);
            sums[w][i][j + 1] = fmaf(l[i], r.y, sums[w][i][j + 1]);
            sums[w][i][j + 2] = fmaf(l[i], r.z, sums[w][i][j + 2]);
            sums[w][i][j + 3] = fmaf(l[i], r.w, sums[w][i][j + 3]);
          }
        }
    }
  }

#pragma unroll
  for (int i = 0; i < kDown; ++i) {
    const int64_t r = at.row + i / 4 * 64 + down + i % 4;
    if (r >= a.rows) continue;
    float* const out = row_of<float>(a.out, r);
#pragma unroll
    for (int j = 0; j < kAcross; ++j) {
      const int64_t n = at.column + j / 4 * 64 + across + j % 4;
      if (n < a.n) out[n] = finished<float, kGated>(a, sums[0][i][j], sums[kWeights - 1][i][j], r, n);
    }
  }
}

// A warp for each row of the weight; kVector elements in one access.
template <class T, int kVector, bool kGated>
__global__ void __launch_bounds__(kThreads) multiply_few(const CudaLinear a) {
  const int64_t n = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  if (n >= a.n) return;
  const int lane = threadIdx.x % 32;
  const T* const weight = static_cast<const T*>(a.weight.data) + n * a.weight.stride;
  const T* const gate = static_cast<const T*>(a.gate.data) + n * a.gate.stride;
  float sums[kDotRows] = {}, gates[kDotRows] = {};
  for (int64_t k = lane * kVector; k < a.k; k += 32 * kVector) {
    float w[kVector], g[kVector], x[kVector];
    load(weight + k, w);
    if (kGated) load(gate + k, g);
#pragma unroll
    for (int r = 0; r < kDotRows; ++r) {
      if (r >= a.rows) break;
      load(row_of<const T>(a.x, r) + k, x);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sums[r] = fmaf(x[i], w[i], sums[r]);
        if (kGated) gates[r] = fmaf(x[i], g[i], gates[r]);
      }
    }
  }
#pragma unroll
  for (int r = 0; r < kDotRows; ++r) {
    if (r >= a.rows) break;
    const float sum = lanes_sum<32>(sums[r]), other = kGated ? lanes_sum<32>(gates[r]) : 0;
    if (lane == 0) row_of<T>(a.out, r)[n] = from_float<T>(finished<T, kGated>(a, sum, other, r, n));
  }
}

template <class T, int kRows, int kColumns, bool kGated>
void multiply_tiles(const CudaLinear& a, bool is_aligned, void* stream) {
  const int64_t count = blocks(a.rows, kRows) * blocks(a.n, kColumns);
  if constexpr (std::is_same_v<T, float>)
    launch(multiply_plain<kRows, kColumns, kGated>, count, kThreads, 0, stream, a, is_aligned);
  else
    launch(multiply<T, kRows, kColumns, kGated>, count, kThreads, Tiles<T, kRows, kColumns, kGated>::kBytes, stream, a,
           is_aligned);
}

template <class T, bool kGated>
void multiply_any(const CudaLinear& a, void* stream) {
  const auto fits = [](const CudaMatrix& m) { return aligned(m.data) && m.stride * sizeof(T) % 16 == 0; };
  const bool is_aligned = a.k % kChunk<T> == 0 && aligned(a.x, sizeof(T)) && fits(a.weight) && fits(a.gate);
  if (a.rows <= kDotRows) {
    const int64_t count = blocks(a.n, kThreads / 32);
    return is_aligned ? launch(multiply_few<T, kChunk<T>, kGated>, count, kThreads, 0, stream, a)
                      : launch(multiply_few<T, 1, kGated>, count, kThreads, 0, stream, a);
  }
  constexpr int kColumns = kGated ? 64 : 128;
  int device = 0, processors = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  if (blocks(a.rows, 128) * blocks(a.n, kColumns) >= processors)
    multiply_tiles<T, 128, kColumns, kGated>(a, is_aligned, stream);
  else
    multiply_tiles<T, 64, 64, kGated>(a, is_aligned, stream);
}

}  // namespace

void fp8_linear(const CudaLinear& a, void* stream) {
  const Gpu gpu = current_gpu();
  if (gpu.capability != 90) refuse_unsupported("products of 8-bit floats need a GPU of compute capability 9.0 (H100)");
  const Chosen chosen = chosen_for(gpu.name, a, KPDEPLOY_F8);
  if (chosen == Chosen::kCublasLt && cublaslt_linear(a, KPDEPLOY_F8, gpu.index, stream)) return;
  if (!hopper_fp8_linear(a, gpu.processors, stream))
    refuse_unsupported("these 8-bit floats do not lie in rows of a multiple of 16 bytes, 16-byte aligned, as the copy "
                       "engine needs them; nor fits out, whose rows too must be such");
}

template <class T>
void linear(const CudaLinear& a, void* stream) {
  constexpr int kDtype = std::is_same_v<T, float> ? KPDEPLOY_F32 : std::is_same_v<T, bf16> ? KPDEPLOY_BF16 : KPDEPLOY_F16;
  const Gpu gpu = current_gpu();
  const Chosen chosen = chosen_for(gpu.name, a, kDtype);
  if (chosen == Chosen::kCublasLt && cublaslt_linear(a, kDtype, gpu.index, stream)) return;
  if constexpr (!std::is_same_v<T, float>)
    if (gpu.capability == 90 && hopper_linear<T>(a, gpu.processors, stream)) return;
  // What is left is our general kernel, which is slower than cuBLASLt but for a few rows.
  if (chosen != Chosen::kOwn && a.rows > kDotRows && cublaslt_linear(a, kDtype, gpu.index, stream)) return;
  return a.gated ? multiply_any<T, true>(a, stream) : multiply_any<T, false>(a, stream);
}

template void linear<float>(const CudaLinear&, void*);
template void linear<bf16>(const CudaLinear&, void*);
template void linear<f16>(const CudaLinear&, void*);

}  // namespace kpdeploy
