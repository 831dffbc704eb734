// fp8_attention_operands, fp8_attention: the checks. Kernels are there for GPUs of compute capability 9.0 alone.

#include <cmath>

#include "checks.h"

namespace kpdeploy {
namespace {

constexpr int64_t kMost = 1 << 30;  // that 32 bits count, with room

int64_t blocks_of(int64_t keys) { return (keys + kFp8Keys - 1) / kFp8Keys; }

bool is_dense(const Tensor& t) {
  if (t.numel() == 0) return true;
  int64_t stride = 1;
  for (int i = t.rank - 1; i >= 0; stride *= t.size(i--))
    if (t.size(i) > 1 && t.stride(i) != stride) return false;
  return true;
}

// A dense tensor of these sizes, aligned for the copy engine.
template <class... Sizes>
Tensor dense(const char* name, const kpdeploy_tensor* tensor, int dtype, const Tensor* like, Sizes... sizes) {
  const Tensor t = gpu_tensor(name, tensor, dtype, sizeof...(sizes), like);
  const int64_t wanted[] = {sizes...};
  std::string text;
  bool fits = t.rank == sizeof...(sizes);
  for (int64_t size : wanted) text += (text.empty() ? "[" : ", ") + std::to_string(size);
  for (int i = 0; fits && i < t.rank; ++i) fits = t.size(i) == wanted[i];
  if (!fits) refuse("%s is %s, not %s]", name, t.shape().c_str(), text.c_str());
  if (!is_dense(t) || reinterpret_cast<uintptr_t>(t.data) % 16) refuse("%s is not dense, in units of 16 bytes", name);
  return t;
}

struct Lengths {
  const int64_t* data = nullptr;
  int64_t stride = 0;
  Lengths(const kpdeploy_tensor* lengths, const Tensor& like, int64_t batch) {
    if (!lengths) return;
    same_device("lengths", *lengths, like);
    if (lengths->dtype != KPDEPLOY_I64) refuse("lengths is not int64");
    if (lengths->rank != 1 || lengths->sizes[0] != batch)
      refuse("lengths has not the shape [%lld] of the batch", (long long)batch);
    data = static_cast<const int64_t*>(lengths->data);
    stride = lengths->strides[0];
  }
};

void check_sizes(int64_t batch, int64_t queries, int64_t keys, int64_t heads, int64_t kv_heads, int64_t head_size) {
  if (head_size != 64 && head_size != 128)
    refuse_unsupported("heads of %lld: 8-bit floats are for heads of 64 and 128", (long long)head_size);
  if (heads < 1 || kv_heads < 1 || heads % kv_heads)
    refuse("heads is %lld, not a multiple of kv_heads %lld", (long long)heads, (long long)kv_heads);
  if (batch >= kMost || queries >= kMost || keys >= kMost ||
      heads * (blocks_of(queries) + blocks_of(keys)) >= kMost / (batch ? batch : 1) / 2)
    refuse_unsupported("the tensors are too large for one launch");
}

CudaGrid rows_of(const Tensor& t) {
  const auto takes = [](int64_t stride, int64_t count) { return count <= 1 || stride % 8 == 0; };
  if (reinterpret_cast<uintptr_t>(t.data) % 16 || !takes(t.stride(0), t.size(0)) || !takes(t.stride(1), t.size(1)))
    refuse("%s does not start, or has rows that do not lie, at a multiple of 16 bytes", t.name);
  return {t.data, t.stride(0), t.stride(1)};
}

}  // namespace
}  // namespace kpdeploy

using namespace kpdeploy;

int kpdeploy_fp8_attention_operands(const kpdeploy_context* context, const kpdeploy_tensor* query,
                                    const kpdeploy_tensor* key, const kpdeploy_tensor* value,
                                    const kpdeploy_tensor* lengths, int64_t heads, int64_t kv_heads,
                                    const kpdeploy_tensor* query8, const kpdeploy_tensor* key8,
                                    const kpdeploy_tensor* value8, const kpdeploy_tensor* query_scale,
                                    const kpdeploy_tensor* block_scale) {
  return guarded(context, "fp8_attention_operands", [&] {
    const int dtype = query && query->dtype == KPDEPLOY_F16 ? KPDEPLOY_F16 : KPDEPLOY_BF16;
    const Tensor q = gpu_tensor("query", query, dtype, 3), k = gpu_tensor("key", key, dtype, 3, &q),
                 v = gpu_tensor("value", value, dtype, 3, &q);
    for (const Tensor* t : {&q, &k})
      if (t->rank != 3) refuse("%s is %s, not [batch, length, heads * size]", t->name, t->shape().c_str());
    const int64_t batch = q.size(0), queries = q.size(1), keys = k.size(1), size = heads > 0 ? q.size(2) / heads : 0;
    check_sizes(batch, queries, keys, heads, kv_heads, size);
    if (q.size(2) != heads * size || k.size(2) != kv_heads * size || k.size(0) != batch)
      refuse("query is %s and key %s, which do not fit %lld and %lld heads", q.shape().c_str(), k.shape().c_str(),
             (long long)heads, (long long)kv_heads);
    same_sizes(v, k);
    const Lengths l(lengths, q, batch);
    const int64_t blocks = blocks_of(keys);
    CudaFp8Operands c{};
    c.query8 = dense("query8", query8, KPDEPLOY_F8, &q, batch, heads, queries, size).data;
    c.key8 = dense("key8", key8, KPDEPLOY_F8, &q, batch, kv_heads, keys, size).data;
    c.value8 = dense("value8", value8, KPDEPLOY_F8, &q, batch, kv_heads, size, blocks * kFp8Keys).data;
    c.query_scale =
        reinterpret_cast<float*>(dense("query_scale", query_scale, KPDEPLOY_F32, &q, batch, heads, queries).data);
    c.block_scale = reinterpret_cast<float*>(
        dense("block_scale", block_scale, KPDEPLOY_F32, &q, batch, kv_heads, blocks, int64_t{4}).data);
    if (batch == 0 || (queries == 0 && keys == 0)) return;
    c.query = rows_of(q);
    c.key = rows_of(k);
    c.value = rows_of(v);
    c.lengths = l.data;
    c.lengths_stride = l.stride;
    c.batch = batch;
    c.queries = queries;
    c.keys = keys;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.head_size = size;
    cuda_kernels()->fp8_attention_operands[dtype](c, context->stream);
  });
}

int kpdeploy_fp8_attention(const kpdeploy_context* context, const kpdeploy_tensor* query8, const kpdeploy_tensor* key8,
                           const kpdeploy_tensor* value8, const kpdeploy_tensor* query_scale,
                           const kpdeploy_tensor* block_scale, const kpdeploy_tensor* lengths,
                           const kpdeploy_tensor* out_scale, double scale, int causal, const kpdeploy_tensor* out) {
  return guarded(context, "fp8_attention", [&] {
    const Tensor q = gpu_tensor("query8", query8, KPDEPLOY_F8, 4), k = gpu_tensor("key8", key8, KPDEPLOY_F8, 4, &q);
    const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), size = q.size(3), kv_heads = k.size(1),
                  keys = k.size(2), blocks = blocks_of(keys);
    check_sizes(batch, queries, keys, heads, kv_heads, size);
    CudaFp8Attention c{};
    c.query = dense("query8", query8, KPDEPLOY_F8, nullptr, batch, heads, queries, size).data;
    c.key = dense("key8", key8, KPDEPLOY_F8, &q, batch, kv_heads, keys, size).data;
    c.value = dense("value8", value8, KPDEPLOY_F8, &q, batch, kv_heads, size, blocks * kFp8Keys).data;
    c.query_scale =
        reinterpret_cast<float*>(dense("query_scale", query_scale, KPDEPLOY_F32, &q, batch, heads, queries).data);
    c.block_scale = reinterpret_cast<float*>(
        dense("block_scale", block_scale, KPDEPLOY_F32, &q, batch, kv_heads, blocks, int64_t{4}).data);
    const Lengths l(lengths, q, batch);
    if (out_scale) c.out_scale = gpu_scales("out_scale", out_scale, 1, q, nullptr);
    const Tensor o = dense("out", out, out_scale ? KPDEPLOY_F8 : KPDEPLOY_BF16, &q, batch, queries, heads * size);
    if (!(scale > 0 && scale < INFINITY)) refuse("scale is %g, not above 0", scale);
    if (o.numel() == 0) return;
    if (keys == 0) refuse("key8 is %s: there are no keys", k.shape().c_str());
    c.out = {o.data, o.stride(0), o.stride(1)};
    c.lengths = l.data;
    c.lengths_stride = l.stride;
    c.batch = batch;
    c.queries = queries;
    c.keys = keys;
    c.heads = heads;
    c.kv_heads = kv_heads;
    c.head_size = size;
    c.scale = static_cast<float>(scale);
    c.causal = causal != 0;
    cuda_kernels()->fp8_attention(c, context->stream);
  });
}
