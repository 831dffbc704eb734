// What the CUDA kernels are asked for, in plain values: checked by the .cpp files, which need no CUDA header.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kpdeploy {

// Rows of a tensor, outermost dim first: with one dim or none, row r starts r * strides[0] elements after data.
struct Walk {
  static constexpr int kDims = 8;
  char* data;
  int32_t dims;
  int64_t sizes[kDims], strides[kDims];
};

struct CudaNorm {
  Walk x, residual, sum;  // residual and sum: only where it adds
  Walk normalized;        // without data: the result is given in 8 bits alone
  Walk quantized;         // of 8-bit floats: only with out_scale
  const void* weight;
  const void* bias;        // null: none
  const float* out_scale;  // null: nothing is quantized
  int64_t rows, n;
  float eps;
  bool rms, adds;
};

struct CudaQuantize {
  Walk x;
  char* out;  // dense
  const float* scale;
  int64_t rows, n;
};

// heads of `size` in each of the rows, their first `turned` columns turned. Row r goes with row r % tables of cos and sin.
struct CudaRotary {
  Walk x, cos, sin, out;
  int64_t rows, tables, heads, size, turned;
};

// [n][k], rows `stride` elements apart.
struct CudaMatrix {
  const void* data;
  int64_t stride;
};

struct CudaLinear {
  Walk x, out;
  CudaMatrix weight, gate;
  const void* bias;  // null: none
  Walk residual;     // of the result's dtype, added to it where there is no activation; data null: none
  int64_t rows, n, k;
  int activation;
  bool gated;
  bool constant;  // no kernel that is under way writes weights, bias or their scales
  // Only where x and weights are of 8 bits: the scale of each, one or one a row; null out_scale: out is bfloat16.
  const float *x_scale, *weight_scale, *gate_scale, *out_scale;
  bool x_scale_rows, weight_scale_rows, gate_scale_rows;
};

// Memory on the GPU that the caller lends until the queued kernels have run; null: it lends none, or has none left.
struct GpuMemory {
  void* (*lend)(void* pool, size_t bytes);
  void* pool;
  void* take(int64_t bytes) const { return lend ? lend(pool, static_cast<size_t>(bytes)) : nullptr; }
};

// [batch][row][heads * head_size], strides in elements.
struct CudaGrid {
  void* data;
  int64_t batch_stride, row_stride;
};

struct CudaAttention {
  CudaGrid query, key, value, out;
  const int64_t* lengths;  // null: all keys
  int64_t lengths_stride;
  const int64_t* offsets;  // where the sequences of the one row of the batch begin, and the end; null: there are none
  int64_t offsets_stride, sequences;
  int64_t batch, queries, keys, heads, kv_heads, head_size;
  float scale;
  bool causal;
  const float* out_scale;  // null: out is of the dtype of query; else dense, of 8-bit floats
  GpuMemory memory;
};

constexpr int kFp8Keys = 128;  // of a block that shares its scales

// What fp8_attention takes, of 16-bit query, key and value: see kpdeploy.h. Dense.
struct CudaFp8Operands {
  CudaGrid query, key, value;
  void *query8, *key8, *value8;
  float *query_scale, *block_scale;
  const int64_t* lengths;  // null: all keys
  int64_t lengths_stride;
  int64_t batch, queries, keys, heads, kv_heads, head_size;
};

struct CudaFp8Attention {
  void *query, *key, *value;
  const float *query_scale, *block_scale;
  CudaGrid out;
  const float* out_scale;  // null: out is bfloat16
  const int64_t* lengths;  // null: all keys
  int64_t lengths_stride;
  int64_t batch, queries, keys, heads, kv_heads, head_size;
  float scale;
  bool causal;
};

// Attention, the product of its result (the width of all heads to as many columns), the residual sum and its layer norm.
struct CudaAttended {
  CudaAttention attention;  // its out stays null
  CudaMatrix weight;
  const void *bias, *norm_weight, *norm_bias;  // bias, norm_bias: null for none
  Walk residual, sum, normalized;
  Walk quantized;  // of 8-bit floats: only with out_scale
  float eps;
  bool constant;  // as in CudaLinear
  // Where the weight is of 8 bits, the scale of attention's result and the weight's, one or one a row; else null.
  const float *x_scale, *weight_scale, *out_scale;
  bool weight_scale_rows;
};

// Indexed by kpdeploy_dtype: F32, BF16, F16. Each queues one kernel on the stream, or throws a Refusal.
struct CudaKernels {
  void (*norm[3])(const CudaNorm&, void* stream);
  void (*quantize[3])(const CudaQuantize&, void* stream);
  void (*linear[3])(const CudaLinear&, void* stream);
  void (*fp8_linear)(const CudaLinear&, void* stream);
  void (*attention[3])(const CudaAttention&, void* stream);
  void (*fp8_attention_operands[3])(const CudaFp8Operands&, void* stream);  // none of F32
  void (*fp8_attention)(const CudaFp8Attention&, void* stream);
  void (*rotary[3])(const CudaRotary&, void* stream);
  bool (*attended[3])(const CudaAttended&, void* stream);  // false, with nothing queued: it is for separate kernels
};

// What kpdeploy_set_constant_weights was last told in this thread.
bool weights_are_constant();

// Null where this library was built without CUDA.
const CudaKernels* cuda_kernels();

}  // namespace kpdeploy
