/* The kernels' C ABI: pointers, sizes, strides, an injected thread pool or stream; a status and a message out.
 *
 * Every function checks ranks, sizes, dtypes and strides itself before it touches memory, and may be called from any
 * thread. Nothing is kept between calls but scratch memory. Outputs are allocated by the caller and must not overlap
 * any other tensor. Nothing here throws.
 *
 * All tensors of a call are on one device: the CPU (float32, bfloat16) or one GPU (float32, bfloat16, float16). On a
 * GPU a call returns when its kernel is queued on the stream, takes memory of the context's gpu_memory alone, and can be
 * captured in a CUDA graph. */
#ifndef KPDEPLOY_H
#define KPDEPLOY_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  KPDEPLOY_OK = 0,
  KPDEPLOY_BAD_ARGUMENT = 1,  /* a rank, size, dtype, stride or value that the op does not take */
  KPDEPLOY_UNSUPPORTED = 2,   /* a device or dtype for which this library was built without a kernel */
  KPDEPLOY_OUT_OF_MEMORY = 3,
  KPDEPLOY_DEVICE_ERROR = 4,  /* CUDA refused a launch, or reported an earlier failure */
} kpdeploy_status;

typedef enum {
  KPDEPLOY_OTHER = -1,
  KPDEPLOY_F32 = 0,
  KPDEPLOY_BF16 = 1,
  KPDEPLOY_F16 = 2,
  KPDEPLOY_I64 = 3,
  KPDEPLOY_F8 = 4, /* float8_e4m3fn */
} kpdeploy_dtype;

typedef enum { KPDEPLOY_CPU = 0, KPDEPLOY_CUDA = 1, KPDEPLOY_OTHER_DEVICE = -1 } kpdeploy_device;

typedef enum {
  KPDEPLOY_NONE = 0,
  KPDEPLOY_RELU = 1,
  KPDEPLOY_GELU = 2,      /* x * Phi(x), by erf */
  KPDEPLOY_GELU_TANH = 3, /* its tanh formula */
  KPDEPLOY_SILU = 4,
} kpdeploy_activation;

/* A tensor that somebody else owns. Strides are in elements. */
typedef struct {
  void* data;
  const int64_t* sizes;
  const int64_t* strides;
  int32_t rank;
  int32_t dtype;  /* kpdeploy_dtype */
  int32_t device; /* kpdeploy_device */
  int32_t device_index; /* which GPU; 0 on the CPU */
} kpdeploy_tensor;

typedef struct {
  /* Run task(argument, i) for i in [0, tasks), on any threads, and return when all are done. NULL: in this thread. */
  void (*parallel_for)(void* pool, int64_t tasks, void (*task)(void* argument, int64_t index), void* argument);
  void* pool;
  int32_t threads; /* how many threads the pool has, about */
  void* stream;   /* cudaStream_t, where the tensors are on a GPU; their device is then the current one */
  char* message;  /* receives why a call was refused */
  size_t message_bytes;
  /* At least `bytes` on the GPU, aligned to 16, of any content: the callee's until all that it has queued on the stream
   * has run, in a graph that captures the stream too. NULL, or a NULL that it returns: kernels that need none run. */
  void* (*gpu_memory)(void* pool, size_t bytes);
  /* 1: large outputs are memory that was never touched. Its pages come zeroed, in the caches, and results are written
   * there; 0: past the caches, where they would leave them before they are read. */
  int32_t outputs_are_new;
} kpdeploy_context;

/* Softmax(scale * Q K^T) V for each head.
 *
 * query [B, Sq, heads*D], key and value [B, Sk, kv_heads*D], out [B, Sq, heads*D]; D is 1 to 256. lengths (NULL: all
 * keys): int64 [B], 0 <= lengths[b] <= Sk, the number of leading keys of row b that count. It bounds the keys only:
 * every query row is computed, since Sq = Sk does not tell a self-attention from a cross-attention. causal: query i
 * sees keys j <= i + Sk - Sq. A query that sees no key gives 0. On a GPU the host does not see the lengths: one that is
 * out of range gives NaN in its row. */
int kpdeploy_attention(const kpdeploy_context* context, const kpdeploy_tensor* query, const kpdeploy_tensor* key,
                       const kpdeploy_tensor* value, const kpdeploy_tensor* lengths, int64_t heads, int64_t kv_heads,
                       double scale, int causal, const kpdeploy_tensor* out);

/* The same of sequences that lie one after the other, with nothing between them.
 *
 * query and out [1, T, heads*D], key and value [1, T, kv_heads*D]; offsets: int64 [B + 1], 0 = offsets[0] <= offsets[1]
 * <= ... <= offsets[B] <= T. Sequence b is rows offsets[b] to offsets[b + 1] of all of them: its queries see its own keys
 * alone, with causal up to themselves. Rows from offsets[B] on give 0. On a GPU the host does not see the offsets: one
 * that is out of range counts as the nearest that is in it, and where they do not rise from 0 the rows of what is wrong
 * may hold anything. */
int kpdeploy_packed_attention(const kpdeploy_context* context, const kpdeploy_tensor* query, const kpdeploy_tensor* key,
                              const kpdeploy_tensor* value, const kpdeploy_tensor* offsets, int64_t heads,
                              int64_t kv_heads, double scale, int causal, const kpdeploy_tensor* out);

/* The same, of GPUs alone, with a result in 8 bits: out is float8_e4m3fn and dense, of the result over out_scale (float32,
 * one element), saturated. Kernels for compute capability 9.0 and heads of a multiple of 8 up to 128 do not round it
 * before. For other calls it is rounded to the dtype of query, in memory of the context's gpu_memory, without which they
 * end with KPDEPLOY_OUT_OF_MEMORY. */
int kpdeploy_attention_fp8(const kpdeploy_context* context, const kpdeploy_tensor* query, const kpdeploy_tensor* key,
                           const kpdeploy_tensor* value, const kpdeploy_tensor* lengths, int64_t heads,
                           int64_t kv_heads, double scale, int causal, const kpdeploy_tensor* out_scale,
                           const kpdeploy_tensor* out);
int kpdeploy_packed_attention_fp8(const kpdeploy_context* context, const kpdeploy_tensor* query,
                                  const kpdeploy_tensor* key, const kpdeploy_tensor* value,
                                  const kpdeploy_tensor* offsets, int64_t heads, int64_t kv_heads, double scale,
                                  int causal, const kpdeploy_tensor* out_scale, const kpdeploy_tensor* out);

/* What kpdeploy_fp8_attention takes, of query [B, Sq, heads*D], key and value [B, Sk, kv_heads*D], all bfloat16 or
 * float16, D 64 or 128; lengths as above. On a GPU of compute capability 9.0 only. All outputs are dense.
 *
 * Queries and keys of each head are turned by one rotation times sqrt(D): signs, then the Hadamard transform. query8
 * [B, heads, Sq, D] and key8 [B, kv_heads, Sk, D] are float8_e4m3fn; query_scale float32 [B, heads, Sq] is what 1 stands
 * for in each row of query8. Keys come in N = ceil(Sk / 128) blocks of 128: block_scale float32 [B, kv_heads, N, 4] is
 * what 1 stands for in its rows of key8, log2 of the same of its values, the inverse of that, and 0. value8
 * [B, kv_heads, D, N * 128] is float8_e4m3fn, of values by columns; where the keys of each 16 lie in the order 0 1 8 9
 * 2 3 10 11 4 5 12 13 6 7 14 15. Keys beyond the length are zeros. */
int kpdeploy_fp8_attention_operands(const kpdeploy_context* context, const kpdeploy_tensor* query,
                                    const kpdeploy_tensor* key, const kpdeploy_tensor* value,
                                    const kpdeploy_tensor* lengths, int64_t heads, int64_t kv_heads,
                                    const kpdeploy_tensor* query8, const kpdeploy_tensor* key8,
                                    const kpdeploy_tensor* value8, const kpdeploy_tensor* query_scale,
                                    const kpdeploy_tensor* block_scale);

/* kpdeploy_attention of these operands, with weights in 8 bits too: out [B, Sq, heads*D] is dense, bfloat16; or
 * float8_e4m3fn, of the result over out_scale (float32, one element; NULL for bfloat16), saturated. scale is above 0. */
int kpdeploy_fp8_attention(const kpdeploy_context* context, const kpdeploy_tensor* query8, const kpdeploy_tensor* key8,
                           const kpdeploy_tensor* value8, const kpdeploy_tensor* query_scale,
                           const kpdeploy_tensor* block_scale, const kpdeploy_tensor* lengths,
                           const kpdeploy_tensor* out_scale, double scale, int causal, const kpdeploy_tensor* out);

/* activation(x W^T + bias): x [..., K], weight [N, K], bias [N] or NULL, out [..., N]. */
int kpdeploy_linear_activation(const kpdeploy_context* context, const kpdeploy_tensor* x,
                               const kpdeploy_tensor* weight, const kpdeploy_tensor* bias, int activation,
                               const kpdeploy_tensor* out);

/* The same of 8-bit x and weight (float8_e4m3fn), each times its scale: x_scale and weight_scale are float32, of one
 * element, or one a row of x ([..., 1] beside x [..., K]) and of the weight ([N]). bias: bfloat16 [N] or NULL. out is
 * bfloat16; or float8_e4m3fn, of the result over out_scale (float32, one element; NULL for bfloat16), saturated. On a GPU
 * of compute capability 9.0 only. */
int kpdeploy_fp8_linear_activation(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                   const kpdeploy_tensor* weight, const kpdeploy_tensor* x_scale,
                                   const kpdeploy_tensor* weight_scale, const kpdeploy_tensor* bias,
                                   const kpdeploy_tensor* out_scale, int activation, const kpdeploy_tensor* out);

/* x W^T + bias + residual, the last of out's sizes and dtype, added before the rounding; on a GPU only. */
int kpdeploy_linear_add(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                        const kpdeploy_tensor* bias, const kpdeploy_tensor* residual, const kpdeploy_tensor* out);

/* The same of 8-bit x and weight, each times its scale, as in fp8_linear_activation; residual and out are bfloat16. */
int kpdeploy_fp8_linear_add(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                            const kpdeploy_tensor* x_scale, const kpdeploy_tensor* weight_scale,
                            const kpdeploy_tensor* bias, const kpdeploy_tensor* residual, const kpdeploy_tensor* out);

/* SiLU(x Wg^T) * (x Wu^T) of 8-bit x and weights, with the scales of each and what out may be as above. */
int kpdeploy_fp8_gated_linear(const kpdeploy_context* context, const kpdeploy_tensor* x,
                              const kpdeploy_tensor* gate_weight, const kpdeploy_tensor* up_weight,
                              const kpdeploy_tensor* x_scale, const kpdeploy_tensor* gate_scale,
                              const kpdeploy_tensor* up_scale, const kpdeploy_tensor* out_scale,
                              const kpdeploy_tensor* out);

/* Only the checks, for callers that have a library multiply. */
int kpdeploy_check_linear_activation(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                     const kpdeploy_tensor* weight, const kpdeploy_tensor* bias, int activation);
int kpdeploy_check_gated_linear(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                const kpdeploy_tensor* gate_weight, const kpdeploy_tensor* up_weight);

/* activation(x + bias): x [..., N], bias [N] or NULL, out [..., N]. For callers whose library multiplies faster; on
 * the CPU only. */
int kpdeploy_bias_activation(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* bias,
                             int activation, const kpdeploy_tensor* out);

/* SiLU(x Wg^T) * (x Wu^T): x [..., K], both weights [N, K], out [..., N]. */
int kpdeploy_gated_linear(const kpdeploy_context* context, const kpdeploy_tensor* x,
                          const kpdeploy_tensor* gate_weight, const kpdeploy_tensor* up_weight,
                          const kpdeploy_tensor* out);

/* SiLU(gate) * up, all of one shape; out may be one of them. For callers whose library multiplies faster; on the CPU
 * only. */
int kpdeploy_gate(const kpdeploy_context* context, const kpdeploy_tensor* gate, const kpdeploy_tensor* up,
                  const kpdeploy_tensor* out);

/* A weight [N, K] laid out for this CPU's kernels, once; for callers that know it is constant. */
typedef struct kpdeploy_packed_weight kpdeploy_packed_weight;
int kpdeploy_pack_weight(const kpdeploy_context* context, const kpdeploy_tensor* weight,
                         kpdeploy_packed_weight** packed);
void kpdeploy_free_packed_weight(kpdeploy_packed_weight* packed);
int kpdeploy_linear_activation_packed(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                      const kpdeploy_packed_weight* weight, const kpdeploy_tensor* bias,
                                      int activation, const kpdeploy_tensor* out);
int kpdeploy_gated_linear_packed(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                 const kpdeploy_packed_weight* gate_weight, const kpdeploy_packed_weight* up_weight,
                                 const kpdeploy_tensor* out);

/* Over the last dim N of x [..., N]; weight and bias (layer norm's may be NULL) [N]; statistics in f32.
 * The add_ forms normalize sum = x + residual before it is rounded to its dtype. */
int kpdeploy_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                        const kpdeploy_tensor* bias, double eps, const kpdeploy_tensor* out);
int kpdeploy_rms_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                      double eps, const kpdeploy_tensor* out);
int kpdeploy_add_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* x,
                            const kpdeploy_tensor* residual, const kpdeploy_tensor* weight,
                            const kpdeploy_tensor* bias, double eps, const kpdeploy_tensor* normalized,
                            const kpdeploy_tensor* sum);
int kpdeploy_add_rms_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* residual,
                          const kpdeploy_tensor* weight, double eps, const kpdeploy_tensor* normalized,
                          const kpdeploy_tensor* sum);

/* x [..., N] of any float dtype over scale (float32, one element), saturated, as float8_e4m3fn; out is dense. On a GPU
 * only. */
int kpdeploy_fp8_quantize(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* scale,
                          const kpdeploy_tensor* out);

/* The norms, with the result quantized too: as float8_e4m3fn of the unrounded norm over out_scale; and that alone where
 * normalized is NULL. On a GPU only. */
int kpdeploy_fp8_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                            const kpdeploy_tensor* bias, double eps, const kpdeploy_tensor* out_scale,
                            const kpdeploy_tensor* normalized, const kpdeploy_tensor* quantized);
int kpdeploy_fp8_rms_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                          double eps, const kpdeploy_tensor* out_scale, const kpdeploy_tensor* normalized,
                          const kpdeploy_tensor* quantized);
int kpdeploy_fp8_add_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                const kpdeploy_tensor* residual, const kpdeploy_tensor* weight,
                                const kpdeploy_tensor* bias, double eps, const kpdeploy_tensor* out_scale,
                                const kpdeploy_tensor* normalized, const kpdeploy_tensor* sum,
                                const kpdeploy_tensor* quantized);
int kpdeploy_fp8_add_rms_norm(const kpdeploy_context* context, const kpdeploy_tensor* x,
                              const kpdeploy_tensor* residual, const kpdeploy_tensor* weight, double eps,
                              const kpdeploy_tensor* out_scale, const kpdeploy_tensor* normalized,
                              const kpdeploy_tensor* sum, const kpdeploy_tensor* quantized);

/* Heads turned by their positions: x and out [B, S, heads*D]; cos and sin float32 [1 or B, S, R], R even, at most D. Of the
 * first R columns h of each head h * cos + (-second half of h, first half of h) * sin, in float32; the others stay. */
int kpdeploy_rotary_embedding(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* cos,
                              const kpdeploy_tensor* sin, int64_t heads, const kpdeploy_tensor* out);

/* attention (with as many heads of keys; or packed_attention, where there are offsets), the product of its result [B, S, N] with weight [N, N] and bias, and
 * add_layer_norm of that, by the kernels for few rows: *queued is 1 then, else 0 and nothing was done. A float8_e4m3fn
 * weight has x_scale and weight_scale, as in fp8_linear_activation (x_scale of one element), else both are NULL; quantized
 * and out_scale as in fp8_add_layer_norm, or both NULL. */
int kpdeploy_attention_add_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* query,
                                      const kpdeploy_tensor* key, const kpdeploy_tensor* value,
                                      const kpdeploy_tensor* lengths, const kpdeploy_tensor* offsets, int64_t heads,
                                      double scale, int causal, const kpdeploy_tensor* weight,
                                      const kpdeploy_tensor* x_scale, const kpdeploy_tensor* weight_scale,
                                      const kpdeploy_tensor* bias, const kpdeploy_tensor* residual,
                                      const kpdeploy_tensor* norm_weight, const kpdeploy_tensor* norm_bias, double eps,
                                      const kpdeploy_tensor* out_scale, const kpdeploy_tensor* normalized,
                                      const kpdeploy_tensor* sum, const kpdeploy_tensor* quantized, int* queued);

/* The activation of a name (none, relu, gelu, gelu_tanh, silu), or -1. */
int kpdeploy_activation_of(const char* name);

/* Which library multiplies on a GPU (ours or cuBLASLt) or attends (ours or cuDNN), for calls that were measured there:
 * rows in the text of kpdeploy/ops/gpu_measured.tsv and attention_measured.tsv in place of all that were built in; NULL:
 * those again. For the whole process.
 * The libraries show it as kpdeploy_use_gpu_providers(rows). */
int kpdeploy_set_gpu_providers(const kpdeploy_context* context, const char* rows);

/* Whether weights, biases and weights' scales are constants in calls of this thread (1), as those of a model are, or may
 * be written by a kernel that is still under way (0, at first). On a GPU of compute capability 9.0 constant ones are read
 * while the kernel ahead is still running; one that was written last by a kernel must be waited for before its first such
 * use. Returns what held before. The torch library shows it as kpdeploy_use_constant_weights(constant). */
int kpdeploy_set_constant_weights(int constant);

/* Whether this library was built with CUDA kernels: 1 or 0. It says nothing of GPUs. */
int kpdeploy_cuda(void);

/* The instruction set whose kernels run: "avx512", "avx2" or "baseline"; the best that this CPU has. */
const char* kpdeploy_isa(void);
/* Choose another one, for tests and benchmarks. Not while a kernel runs, nor with packed weights alive. */
int kpdeploy_use_isa(const char* name);

#ifdef __cplusplus
}
#endif

#endif
