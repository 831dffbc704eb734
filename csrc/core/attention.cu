// attention, packed_attention: a block for each sequence, head and run of queries, over blocks of keys with a running
// softmax (Milakov and Gimelshein 2018; FlashAttention, Dao et al. 2022). 16-bit dtypes on the tensor cores, float32 in
// plain float32.

#include <algorithm>
#include <cmath>

#include "cudnn_attention.h"
#include "device.cuh"
#include "gpu_choice.h"
#include "hopper_attended.h"
#include "hopper_attention.h"
#include "hopper_fp8_attention.h"

namespace kpdeploy {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// How many runs of so many queries a head has at most.
__host__ __device__ int64_t packed_runs(const CudaAttention& a, int64_t rows) {
  return a.queries / rows + a.sequences + 1;
}

// One block's share of the work.
struct Block {
  int64_t batch, head, first;  // query
  int64_t start, queries;      // of its sequence: the first row, and how many; see packed_runs
  int64_t keys, end;           // of the sequence; of those, what some query of this block may see
  bool valid;                  // whether the row's length is one

  __device__ Block(const CudaAttention& a, int rows) {
    if (a.offsets)
      take_packed(a, rows);
    else
      take_row(a, rows);
    end = max(int64_t{0}, min(keys, seen(a, min(first + rows, queries) - 1)));
  }
  __device__ void take_row(const CudaAttention& a, int rows) {
    const int64_t blocks = (a.queries + rows - 1) / rows;
    start = 0;
    queries = a.queries;
    first = (blocks - 1 - blockIdx.x % blocks) * rows;  // of a causal one the longest runs first
    head = blockIdx.x / blocks % a.heads;
    batch = blockIdx.x / blocks / a.heads;
    keys = a.keys;
    if (a.lengths) keys = a.lengths[batch * a.lengths_stride];
    valid = keys >= 0 && keys <= a.keys;
    if (!valid) keys = 0;
  }
  // Sequence i begins at run offsets[i] / rows + i, so that none needs to know how many runs those before it have; what
  // is behind the last one counts as one more, without keys. Runs that no query is left for have first >= queries.
  __device__ void take_packed(const CudaAttention& a, int rows) {
    const auto begin = [&](int64_t i) {
      return min(max(a.offsets[i * a.offsets_stride], int64_t{0}), a.queries);
    };
    const int64_t runs = packed_runs(a, rows), run = blockIdx.x % runs;
    int64_t low = 0, high = a.sequences;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (begin(middle) / rows + middle <= run)
        low = middle;
      else
        high = middle - 1;
    }
    batch = 0;
    head = blockIdx.x / runs;
    start = begin(low);
    queries = max(int64_t{0}, (low < a.sequences ? begin(low + 1) : a.queries) - start);
    first = (run - start / rows - low) * rows;
    if (first < 0) first = queries;
    keys = low < a.sequences ? queries : 0;
    valid = true;
  }
  // How many leading keys query i sees; less than 1: none.
  __device__ int64_t seen(const CudaAttention& a, int64_t i) const {
    return a.causal ? min(keys, i + a.keys - a.queries + 1) : keys;
  }
  template <class T>
  __device__ T* rows_of(const CudaAttention& a, const CudaGrid& grid, bool of_keys) const {
    const int64_t column = of_keys ? head / (a.heads / a.kv_heads) : head;
    return static_cast<T*>(grid.data) + batch * grid.batch_stride + start * grid.row_stride + column * a.head_size;
  }
};

// Rows [first, first + kRows) into shared memory, `kWidth` elements apart; zeros from row `end` and column head_size.
template <int kRows, int kColumns, int kWidth, class T>
__device__ void copy_rows(T* to, const T* from, int64_t stride, int64_t first, int64_t end, int64_t head_size,
                          bool is_aligned) {
  constexpr int kAcross = kColumns / kChunk<T>;
  for (int i = threadIdx.x; i < kRows * kAcross; i += kThreads) {
    const int64_t r = first + i / kAcross;
    const int c = i % kAcross * kChunk<T>;
    const bool there = r < end && c < head_size;
    copy_chunk(to + i / kAcross * kWidth + c, there ? from + r * stride + c : from, there ? head_size - c : 0,
               is_aligned);
  }
}

// Queries and keys of a block, for head sizes up to kSize.
template <int kSize>
struct Shape {
  static constexpr int kQueries = kWarps * 16, kKeys = kSize <= 128 ? 64 : 32;
  static constexpr int kWidth = kSize + 8;  // ldmatrix meets no bank twice
  static constexpr size_t kBytes = 2 * (kQueries + 2 * kKeys) * kWidth;
};

// Each warp has 16 queries: a thread holds parts of rows lane / 4 and lane / 4 + 8.
template <class T, int kSize>
__global__ void __launch_bounds__(kThreads) attend(const CudaAttention a, const bool is_aligned) {
  using S = Shape<kSize>;
  constexpr int kKeys = S::kKeys, kWidth = S::kWidth;
  extern __shared__ __align__(16) unsigned char memory[];
  T* const query = reinterpret_cast<T*>(memory);
  T* const key = query + S::kQueries * kWidth;
  T* const value = key + kKeys * kWidth;
  const Block block(a, S::kQueries);
  if (block.first >= block.queries) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const T* const keys = block.rows_of<const T>(a, a.key, true);
  const T* const values = block.rows_of<const T>(a, a.value, true);
  const auto copy_keys = [&](int64_t from) {
    copy_rows<kKeys, kSize, kWidth>(key, keys, a.key.row_stride, from, block.end, a.head_size, is_aligned);
    commit();
  };
  const auto copy_values = [&](int64_t from) {
    copy_rows<kKeys, kSize, kWidth>(value, values, a.value.row_stride, from, block.end, a.head_size, is_aligned);
    commit();
  };
  copy_rows<S::kQueries, kSize, kWidth>(query, block.rows_of<const T>(a, a.query, false), a.query.row_stride,
                                        block.first, block.queries, a.head_size, is_aligned);
  copy_keys(0);  // with the queries, one group
  copy_values(0);

  const int64_t own = block.first + warp * 16 + lane / 4;
  const int64_t seen[2] = {block.seen(a, own), block.seen(a, own + 8)};
  const int64_t seen_by_all = block.seen(a, block.first);
  const float scale = a.scale * 1.44269504f;  // of e^x = 2^(x log2 e)
  float out[kSize / 8][4] = {}, largest[2] = {-INFINITY, -INFINITY}, total[2] = {};

  for (int64_t from = 0; from < block.end; from += kKeys) {
    wait<1>();
    __syncthreads();  // the keys are there
    float score[kKeys / 8][4] = {};
#pragma unroll
    for (int k = 0; k < kSize; k += 16) {
      uint32_t left[4];
      load_matrices(left, query + (warp * 16 + lane % 16) * kWidth + k + lane / 16 * 8);
#pragma unroll
      for (int j = 0; j < kKeys / 8; j += 2) {
        uint32_t right[4];
        load_matrices(right, key + (j * 8 + lane / 16 * 8 + lane % 8) * kWidth + k + lane / 8 % 2 * 8);
        multiply_add<T>(score[j], left, right[0], right[1]);
        multiply_add<T>(score[j + 1], left, right[2], right[3]);
      }
    }
    __syncthreads();  // the keys have been used
    copy_keys(from + kKeys);

    const bool hides = from + kKeys > seen_by_all;
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        score[j][c] *= scale;
        if (hides && from + j * 8 + lane % 4 * 2 + c % 2 >= seen[c / 2]) score[j][c] = -INFINITY;
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = largest[half];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) top = fmaxf(top, fmaxf(score[j][half * 2], score[j][half * 2 + 1]));
      top = lanes_max<4>(top);
      const float base = top == -INFINITY ? 0 : top;  // nothing seen yet: every weight is 0
      const float shrink = exp2f(largest[half] - base);
      largest[half] = top;
      float added = 0;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int c = half * 2; c < half * 2 + 2; ++c) {
          score[j][c] = exp2f(score[j][c] - base);
          added += score[j][c];
        }
      total[half] = total[half] * shrink + added;
#pragma unroll
      for (int d = 0; d < kSize / 8; ++d) {
        out[d][half * 2] *= shrink;
        out[d][half * 2 + 1] *= shrink;
      }
    }

    wait<1>();
    __syncthreads();  // the values are there
#pragma unroll
    for (int k = 0; k < kKeys; k += 16) {
      const float(&low)[4] = score[k / 8], (&high)[4] = score[k / 8 + 1];
      const uint32_t left[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                                pack<T>(high[2], high[3])};
#pragma unroll
      for (int d = 0; d < kSize / 8; d += 2) {
        uint32_t right[4];
        load_transposed(right, value + (k + lane % 16) * kWidth + d * 8 + lane / 16 * 8);
        multiply_add<T>(out[d], left, right[0], right[1]);
        multiply_add<T>(out[d + 1], left, right[2], right[3]);
      }
    }
    __syncthreads();  // the values have been used
    copy_values(from + kKeys);
  }
  wait<0>();

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t i = own + half * 8;
    const float sum = lanes_sum<4>(total[half]);
    if (i >= block.queries) continue;
    const float share = !block.valid ? NAN : sum == 0 ? 0 : 1 / sum;
    T* const row = block.rows_of<T>(a, a.out, false) + i * a.out.row_stride;
    const bool paired = reinterpret_cast<uintptr_t>(row) % (2 * sizeof(T)) == 0;
#pragma unroll
    for (int d = 0; d < kSize / 8; ++d) {
      const int64_t c = d * 8 + lane % 4 * 2;
      store_pair(row + c, out[d][half * 2] * share, out[d][half * 2 + 1] * share, paired, c < a.head_size,
                 c + 1 < a.head_size);
    }
  }
}

// Float32: each warp has 8 queries; a lane has one key's scores, then every 32nd column of the output.
constexpr int kPlainRows = 8, kPlainKeys = 32;

template <int kSize>
constexpr size_t kPlainBytes = 4 * ((kWarps * kPlainRows + kPlainKeys) * (kSize + 4) + kWarps* kPlainRows* kPlainKeys);

template <int kSize>
__global__ void __launch_bounds__(kThreads) attend_plain(const CudaAttention a, const bool is_aligned) {
  constexpr int kWidth = kSize + 4, kQueries = kWarps * kPlainRows;
  extern __shared__ __align__(16) unsigned char memory[];
  float* const query = reinterpret_cast<float*>(memory);
  float* const rows = query + kQueries * kWidth;  // keys, then values
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const weights = rows + kPlainKeys * kWidth + warp * kPlainRows * kPlainKeys;
  const Block block(a, kQueries);
  if (block.first >= block.queries) return;
  const int64_t own = block.first + warp * kPlainRows;
  const auto copy = [&](const CudaGrid& grid, int64_t from) {
    copy_rows<kPlainKeys, kSize, kWidth>(rows, block.rows_of<const float>(a, grid, true), grid.row_stride, from,
                                         block.end, a.head_size, is_aligned);
    commit();
    wait<0>();
    __syncthreads();
  };
  copy_rows<kQueries, kSize, kWidth>(query, block.rows_of<const float>(a, a.query, false), a.query.row_stride,
                                     block.first, block.queries, a.head_size, is_aligned);

  float out[kPlainRows][kSize / 32] = {}, largest[kPlainRows], total[kPlainRows] = {};
#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) largest[r] = -INFINITY;
  for (int64_t from = 0; from < block.end; from += kPlainKeys) {
    copy(a.key, from);
    float score[kPlainRows] = {};
#pragma unroll 4
    for (int d = 0; d < kSize; d += 4) {
      const float4 k = *reinterpret_cast<const float4*>(rows + lane * kWidth + d);
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) {
        const float4 q = *reinterpret_cast<const float4*>(query + (warp * kPlainRows + r) * kWidth + d);
        score[r] = fmaf(q.w, k.w, fmaf(q.z, k.z, fmaf(q.y, k.y, fmaf(q.x, k.x, score[r]))));
      }
    }
#pragma unroll
    for (int r = 0; r < kPlainRows; ++r) {
      const float s = from + lane < block.seen(a, own + r) ? score[r] * a.scale : -INFINITY;
      const float top = fmaxf(largest[r], lanes_max<32>(s)), base = top == -INFINITY ? 0 : top;
      const float weight = expf(s - base), shrink = expf(largest[r] - base);
      largest[r] = top;
      total[r] = total[r] * shrink + lanes_sum<32>(weight);
      weights[r * kPlainKeys + lane] = weight;
#pragma unroll
      for (int c = 0; c < kSize / 32; ++c) out[r][c] *= shrink;
    }
    __syncthreads();  // the keys have been used, the weights are there
    copy(a.value, from);
#pragma unroll 2
    for (int j = 0; j < kPlainKeys; j += 4) {
      float4 weight[kPlainRows];
#pragma unroll
      for (int r = 0; r < kPlainRows; ++r) weight[r] = *reinterpret_cast<const float4*>(weights + r * kPlainKeys + j);
#pragma unroll
      for (int c = 0; c < kSize / 32; ++c) {
        const float* const v = rows + j * kWidth + c * 32 + lane;
        const float v0 = v[0], v1 = v[kWidth], v2 = v[2 * kWidth], v3 = v[3 * kWidth];
#pragma unroll
        for (int r = 0; r < kPlainRows; ++r)
          out[r][c] =
              fmaf(weight[r].w, v3, fmaf(weight[r].z, v2, fmaf(weight[r].y, v1, fmaf(weight[r].x, v0, out[r][c]))));
      }
    }
    __syncthreads();  // the values have been used
  }
  wait<0>();

#pragma unroll
  for (int r = 0; r < kPlainRows; ++r) {
    if (own + r >= block.queries) break;
    const float share = !block.valid ? NAN : total[r] == 0 ? 0 : 1 / total[r];
    float* const row = block.rows_of<float>(a, a.out, false) + (own + r) * a.out.row_stride;
#pragma unroll
    for (int c = 0; c < kSize / 32; ++c)
      if (c * 32 + lane < a.head_size) row[c * 32 + lane] = out[r][c] * share;
  }
}

template <class T, int kSize>
void attend_in(const CudaAttention& a, bool is_aligned, void* stream) {
  const auto blocks = [&](int64_t rows) {
    return a.batch * a.heads * (a.offsets ? packed_runs(a, rows) : (a.queries + rows - 1) / rows);
  };
  if constexpr (std::is_same_v<T, float>)
    launch(attend_plain<kSize>, blocks(kWarps * kPlainRows), kThreads, kPlainBytes<kSize>, stream, a, is_aligned);
  else
    launch(attend<T, kSize>, blocks(Shape<kSize>::kQueries), kThreads, Shape<kSize>::kBytes, stream, a, is_aligned);
}

// False, with nothing queued: cuDNN is not there or does not take the call, or the caller lends no memory, of which every
// plan of cuDNN's needs some.
bool attend_with_cudnn(const CudaAttention& a, int dtype, int device, void* stream) {
  if (!a.memory.lend) return false;
  cudaStreamCaptureStatus capturing;
  check_cuda(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &capturing));
  const CudnnAttention plan = cudnn_attention_plan(a, dtype, device, capturing == cudaStreamCaptureStatusNone);
  if (!plan.plan) return false;
  void* const memory = a.memory.take(std::max<int64_t>(plan.workspace, 1));
  if (!memory) return false;
  cudnn_attend(plan, a, memory, stream);
  return true;
}

// Up to here our kernels for compute capability 9.0 are the faster ones, and beyond cuDNN's (benchmarks/README.md).
constexpr int64_t kOwnHead = 128;

// By cuDNN or the kernels for compute capability 9.0; false: they do not take it. Of them only ours give 8-bit floats.
template <class T>
bool attend_fast(const CudaAttention& a, void* stream) {
  const Gpu gpu = current_gpu();
  const int dtype = std::is_same_v<T, bf16> ? KPDEPLOY_BF16 : KPDEPLOY_F16;
  const bool is_hopper = gpu.capability == 90;
  const Chosen chosen = chosen_for(gpu.name, a, dtype);
  const bool is_cudnns = chosen == Chosen::kCudnn || (chosen == Chosen::kUnmeasured && is_hopper && a.head_size > kOwnHead);
  if (is_cudnns && a.out_scale) return false;
  return (is_cudnns && attend_with_cudnn(a, dtype, gpu.index, stream)) ||
         (is_hopper && hopper_attention<T>(a, gpu.processors, stream));
}

// Where no kernel gives 8-bit floats itself: a result of T first, and a pass that quantizes it.
template <class T>
void attend_and_quantize(const CudaAttention& a, void* stream) {
  const int64_t width = a.heads * a.head_size, rows = a.batch * a.queries;
  void* const memory = a.memory.take(rows * width * int64_t{sizeof(T)});
  if (!memory)
    throw Refusal{KPDEPLOY_OUT_OF_MEMORY, "the caller lends no memory for the result before it is quantized"};
  CudaAttention wide = a;
  wide.out = {memory, a.queries * width, width};
  wide.out_scale = nullptr;
  attention<T>(wide, stream);
  CudaQuantize q{};
  q.x.data = static_cast<char*>(memory);
  q.out = static_cast<char*>(a.out.data);
  q.scale = a.out_scale;
  q.rows = 1;  // all is dense: a long one
  q.n = rows * width;
  quantize<T>(q, stream);
}

}  // namespace

template <class T>
void attention(const CudaAttention& a, void* stream) {
  if constexpr (!std::is_same_v<T, float>)
    if (attend_fast<T>(a, stream)) return;
  if (a.out_scale) return attend_and_quantize<T>(a, stream);
  const auto fits = [](const CudaGrid& g) {
    return aligned(g.data) && g.batch_stride * sizeof(T) % 16 == 0 && g.row_stride * sizeof(T) % 16 == 0;
  };
  const bool is_aligned = a.head_size % kChunk<T> == 0 && fits(a.query) && fits(a.key) && fits(a.value);
  if (a.head_size <= 32) return attend_in<T, 32>(a, is_aligned, stream);
  if (a.head_size <= 64) return attend_in<T, 64>(a, is_aligned, stream);
  if (a.head_size <= 128) return attend_in<T, 128>(a, is_aligned, stream);
  return attend_in<T, 256>(a, is_aligned, stream);
}

template <class T>
bool attended(const CudaAttended& a, void* stream) {
  if constexpr (std::is_same_v<T, float>)
    return false;
  else
    return current_gpu().capability == 90 && hopper_attended<T>(a, stream);
}

template bool attended<float>(const CudaAttended&, void*);
template bool attended<bf16>(const CudaAttended&, void*);
template bool attended<f16>(const CudaAttended&, void*);

template void attention<float>(const CudaAttention&, void*);
template void attention<bf16>(const CudaAttention&, void*);
template void attention<f16>(const CudaAttention&, void*);

namespace {

Gpu gpu_of_8_bits() {
  const Gpu gpu = current_gpu();
  if (gpu.capability != 90) refuse_unsupported("attention of 8-bit floats is for GPUs of compute capability 9.0");
  return gpu;
}

}  // namespace

template <class T>
void fp8_attention_operands(const CudaFp8Operands& a, void* stream) {
  gpu_of_8_bits();
  hopper_fp8_attention_operands<T>(a, stream);
}
template void fp8_attention_operands<bf16>(const CudaFp8Operands&, void*);
template void fp8_attention_operands<f16>(const CudaFp8Operands&, void*);

void fp8_attention(const CudaFp8Attention& a, void* stream) {
  hopper_fp8_attention(a, gpu_of_8_bits().processors, stream);
}

}  // namespace kpdeploy
