// attention, packed_attention: one task for each sequence, head and block of queries. Their forms that quantize the
// result (attention_fp8, packed_attention_fp8) are for GPUs alone.

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"

namespace kpdeploy {
namespace {

// Queries in a task, at most: it lays out each block of keys once for all of them. Fewer where tasks are few.
constexpr int64_t kQueries = 224, kQueriesOfFew = 112;
constexpr int64_t kHeadSize = 256;

struct Attention {
  Tensor query, key, value, out;
  const int64_t* lengths;  // null: all keys; where the tensors are
  int64_t lengths_stride;
  const int64_t* offsets;  // null: a sequence is a row of the batch; else there is one row, of `sequences`
  int64_t offsets_stride, sequences;
  int64_t heads, kv_heads, head_size;
  float scale;
  bool causal;
  const float* out_scale;  // null: out is of the dtype of query

  int64_t keys_of(int64_t batch) const { return lengths ? lengths[batch * lengths_stride] : key.size(1); }
  int64_t offset(int64_t sequence) const { return offsets[sequence * offsets_stride]; }
};

// Queries and keys that belong together, from row `start` of a row of the batch.
struct Sequence {
  int64_t batch, start, queries, keys;
};

Sequence sequence_of(const Attention& a, int64_t i) {
  if (!a.offsets) return {i, 0, a.query.size(1), a.keys_of(i)};
  const int64_t rows = a.offset(i + 1) - a.offset(i);
  return {0, a.offset(i), rows, rows};
}

void check_lengths(Attention& a, const kpdeploy_tensor* lengths) {
  if (!lengths) return;
  same_device("lengths", *lengths, a.query);
  if (lengths->dtype != KPDEPLOY_I64) refuse("lengths is not int64");
  if (lengths->rank != 1 || lengths->sizes[0] != a.query.size(0))
    refuse("lengths has not the shape [%lld] of the batch", (long long)a.query.size(0));
  a.lengths = static_cast<const int64_t*>(lengths->data);
  a.lengths_stride = lengths->strides[0];
  if (a.query.on_gpu()) return;  // the kernel looks at them
  for (int64_t b = 0; b < a.query.size(0); ++b)
    if (a.keys_of(b) < 0 || a.keys_of(b) > a.key.size(1))
      refuse("lengths[%lld] is %lld, with %lld keys", (long long)b, (long long)a.keys_of(b), (long long)a.key.size(1));
}

void check_offsets(Attention& a, const kpdeploy_tensor* offsets) {
  if (!offsets) refuse("offsets is missing");
  same_device("offsets", *offsets, a.query);
  if (offsets->dtype != KPDEPLOY_I64) refuse("offsets is not int64");
  if (offsets->rank != 1 || offsets->sizes[0] < 1) refuse("offsets has not the shape [sequences + 1]");
  if (a.query.size(0) != 1 || a.key.size(1) != a.query.size(1))
    refuse("query is %s, and key %s: packed sequences are [1, rows, heads * size], with as many rows",
           a.query.shape().c_str(), a.key.shape().c_str());
  a.offsets = static_cast<const int64_t*>(offsets->data);
  a.offsets_stride = offsets->strides[0];
  a.sequences = offsets->sizes[0] - 1;
  if (a.query.on_gpu()) return;  // the kernel looks at them
  if (a.offset(0) != 0) refuse("offsets[0] is %lld, not 0", (long long)a.offset(0));
  for (int64_t i = 1; i <= a.sequences; ++i)
    if (a.offset(i) < a.offset(i - 1) || a.offset(i) > a.query.size(1))
      refuse("offsets[%lld] is %lld, after %lld and with %lld rows", (long long)i, (long long)a.offset(i),
             (long long)a.offset(i - 1), (long long)a.query.size(1));
}

// Of an op that quantizes its result.
void check_quantizes(const kpdeploy_tensor* query, const kpdeploy_tensor* out_scale) {
  if (query && query->device == KPDEPLOY_CPU)
    refuse_unsupported("query is on the CPU, and this op has kernels for GPUs");
  if (!out_scale) refuse("out_scale is missing");
}

// `out_scale`: null where out is of the dtype of query.
Attention checked(const kpdeploy_tensor* query, const kpdeploy_tensor* key, const kpdeploy_tensor* value,
                  int64_t heads, int64_t kv_heads, double scale, int causal, const kpdeploy_tensor* out_scale,
                  const kpdeploy_tensor* out) {
  Attention a{};
  a.query = floats("query", query, 3);
  a.key = floats_like("key", key, 3, a.query);
  a.value = floats_like("value", value, 3, a.query);
  a.out = out_scale ? gpu_tensor("out", out, KPDEPLOY_F8, 3, &a.query) : floats_like("out", out, 3, a.query);
  if (out_scale) a.out_scale = gpu_scales("out_scale", out_scale, 1, a.query, nullptr);
  for (const Tensor* t : {&a.query, &a.key, &a.value})
    if (t->rank != 3) refuse("%s is %s, not [batch, length, heads * size]", t->name, t->shape().c_str());
  if (heads < 1 || kv_heads < 1 || heads % kv_heads)
    refuse("heads is %lld, not a multiple of kv_heads %lld", (long long)heads, (long long)kv_heads);
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.head_size = a.query.size(2) / heads;
  if (a.query.size(2) % heads || a.head_size < 1 || a.head_size > kHeadSize)
    refuse("query is %s: its last dim is not %lld heads of size 1 to %lld", a.query.shape().c_str(), (long long)heads,
           (long long)kHeadSize);
  if (a.key.size(2) != kv_heads * a.head_size || a.key.size(0) != a.query.size(0))
    refuse("key is %s; with query %s, %lld heads and %lld kv_heads it is [%lld, keys, %lld]", a.key.shape().c_str(),
           a.query.shape().c_str(), (long long)heads, (long long)kv_heads, (long long)a.query.size(0),
           (long long)(kv_heads * a.head_size));
  same_sizes(a.value, a.key);
  same_sizes(a.out, a.query);
  const Rows rows(a.out);
  if (out_scale && rows.count() > 1 && rows.stride() != a.out.size(2)) refuse("out is not contiguous");
  a.scale = static_cast<float>(scale);
  a.causal = causal != 0;
  a.sequences = a.query.size(0);
  return a;
}

AttentionBlock block_of(const Attention& a, const Sequence& s, int64_t head, int64_t first, int64_t queries) {
  const int64_t kv_head = head / (a.heads / a.kv_heads), bytes = a.query.item_bytes();
  const auto at = [&](const Tensor& t, int64_t row, int64_t column) {
    return t.data + (s.batch * t.stride(0) + (s.start + row) * t.stride(1) + column * a.head_size) * bytes;
  };
  AttentionBlock block{};
  block.query = at(a.query, first, head);
  block.key = at(a.key, 0, kv_head);
  block.value = at(a.value, 0, kv_head);
  block.out = at(a.out, first, head);
  block.query_stride = a.query.stride(1);
  block.key_stride = a.key.stride(1);
  block.value_stride = a.value.stride(1);
  block.out_stride = a.out.stride(1);
  block.queries = queries;
  block.keys = s.keys;
  block.head_size = a.head_size;
  block.causal = a.causal;
  block.first_visible = a.causal ? first + a.key.size(1) - a.query.size(1) + 1 : block.keys;
  block.scale = a.scale;
  return block;
}

CudaAttention cuda_attention(const kpdeploy_context* context, const Attention& a) {
  const auto grid = [](const Tensor& t) { return CudaGrid{t.data, t.stride(0), t.stride(1)}; };
  CudaAttention c{};
  c.query = grid(a.query);
  c.key = grid(a.key);
  c.value = grid(a.value);
  c.lengths = a.lengths;
  c.lengths_stride = a.lengths_stride;
  c.offsets = a.offsets;
  c.offsets_stride = a.offsets_stride;
  c.sequences = a.sequences;
  c.batch = a.query.size(0);
  c.queries = a.query.size(1);
  c.keys = a.key.size(1);
  c.heads = a.heads;
  c.kv_heads = a.kv_heads;
  c.head_size = a.head_size;
  c.scale = a.scale;
  c.causal = a.causal;
  c.out_scale = a.out_scale;
  c.memory = {context->gpu_memory, context->pool};
  return c;
}

void attend_on_gpu(const kpdeploy_context* context, const Attention& a) {
  CudaAttention c = cuda_attention(context, a);
  c.out = {a.out.data, a.out.stride(0), a.out.stride(1)};
  cuda_kernels()->attention[a.query.dtype](c, context->stream);
}

// The queries of a sequence in blocks of even size.
struct Blocks {
  int64_t each, count;
  Blocks(int64_t queries, int64_t most) {
    const int64_t wanted = std::max<int64_t>(1, (queries + most - 1) / most);
    each = (queries + wanted - 1) / wanted;
    count = each ? (queries + each - 1) / each : 0;
  }
};

void clear_rows(const Tensor& out, int64_t from) {
  for (int64_t r = from; r < out.size(1); ++r)
    std::memset(out.data + r * out.stride(1) * out.item_bytes(), 0, out.size(2) * out.item_bytes());
}

void attend(const kpdeploy_context* context, const Attention& a) {
  if (a.query.numel() == 0) return;
  if (a.query.on_gpu()) return attend_on_gpu(context, a);
  if (a.offsets) clear_rows(a.out, a.offset(a.sequences));
  const Kernels& k = kernels();
  const int64_t most = a.sequences * a.heads < 4 * context->threads ? kQueriesOfFew : kQueries;
  std::vector<int64_t> firsts{0};  // the first task of each sequence, and the end
  int64_t longest = 0;
  for (int64_t i = 0; i < a.sequences; ++i) {
    const Blocks blocks(sequence_of(a, i).queries, most);
    firsts.push_back(firsts.back() + blocks.count * a.heads);
    longest = std::max(longest, blocks.each);
  }
  const int64_t floats = k.attention_scratch(longest, a.head_size);
  parallel(context, firsts.back(), [&](int64_t task) {
    const int64_t i = std::upper_bound(firsts.begin(), firsts.end(), task) - firsts.begin() - 1;
    const Sequence sequence = sequence_of(a, i);
    const Blocks blocks(sequence.queries, most);
    const int64_t within = task - firsts[i], head = within / blocks.count, first = within % blocks.count * blocks.each;
    AttentionBlock block = block_of(a, sequence, head, first, std::min(blocks.each, sequence.queries - first));
    block.scratch = scratch(kTaskScratch, floats);
    if (!block.scratch) return false;
    k.attention_block[a.query.dtype](block);
    return true;
  });
}

}  // namespace
}  // namespace kpdeploy

int kpdeploy_attention(const kpdeploy_context* context, const kpdeploy_tensor* query, const kpdeploy_tensor* key,
                       const kpdeploy_tensor* value, const kpdeploy_tensor* lengths, int64_t heads, int64_t kv_heads,
                       double scale, int causal, const kpdeploy_tensor* out) {
  return kpdeploy::guarded(context, "attention", [&] {
    kpdeploy::Attention a = kpdeploy::checked(query, key, value, heads, kv_heads, scale, causal, nullptr, out);
    kpdeploy::check_lengths(a, lengths);
    kpdeploy::attend(context, a);
  });
}

int kpdeploy_attention_fp8(const kpdeploy_context* context, const kpdeploy_tensor* query, const kpdeploy_tensor* key,
                           const kpdeploy_tensor* value, const kpdeploy_tensor* lengths, int64_t heads,
                           int64_t kv_heads, double scale, int causal, const kpdeploy_tensor* out_scale,
                           const kpdeploy_tensor* out) {
  return kpdeploy::guarded(context, "attention_fp8", [&] {
    kpdeploy::check_quantizes(query, out_scale);
    kpdeploy::Attention a = kpdeploy::checked(query, key, value, heads, kv_heads, scale, causal, out_scale, out);
    kpdeploy::check_lengths(a, lengths);
    kpdeploy::attend(context, a);
  });
}

int kpdeploy_packed_attention(const kpdeploy_context* context, const kpdeploy_tensor* query, const kpdeploy_tensor* key,
                              const kpdeploy_tensor* value, const kpdeploy_tensor* offsets, int64_t heads,
                              int64_t kv_heads, double scale, int causal, const kpdeploy_tensor* out) {
  return kpdeploy::guarded(context, "packed_attention", [&] {
    kpdeploy::Attention a = kpdeploy::checked(query, key, value, heads, kv_heads, scale, causal, nullptr, out);
    kpdeploy::check_offsets(a, offsets);
    kpdeploy::attend(context, a);
  });
}

int kpdeploy_packed_attention_fp8(const kpdeploy_context* context, const kpdeploy_tensor* query,
                                  const kpdeploy_tensor* key, const kpdeploy_tensor* value,
                                  const kpdeploy_tensor* offsets, int64_t heads, int64_t kv_heads, double scale,
                                  int causal, const kpdeploy_tensor* out_scale, const kpdeploy_tensor* out) {
  return kpdeploy::guarded(context, "packed_attention_fp8", [&] {
    kpdeploy::check_quantizes(query, out_scale);
    kpdeploy::Attention a = kpdeploy::checked(query, key, value, heads, kv_heads, scale, causal, out_scale, out);
    kpdeploy::check_offsets(a, offsets);
    kpdeploy::attend(context, a);
  });
}

int kpdeploy_attention_add_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* query,
                                      const kpdeploy_tensor* key, const kpdeploy_tensor* value,
                                      const kpdeploy_tensor* lengths, const kpdeploy_tensor* offsets, int64_t heads,
                                      double scale, int causal, const kpdeploy_tensor* weight,
                                      const kpdeploy_tensor* x_scale, const kpdeploy_tensor* weight_scale,
                                      const kpdeploy_tensor* bias, const kpdeploy_tensor* residual,
                                      const kpdeploy_tensor* norm_weight, const kpdeploy_tensor* norm_bias, double eps,
                                      const kpdeploy_tensor* out_scale, const kpdeploy_tensor* normalized,
                                      const kpdeploy_tensor* sum, const kpdeploy_tensor* quantized, int* queued) {
  using namespace kpdeploy;
  *queued = 0;
  return guarded(context, "attention_add_layer_norm", [&] {
    Attention a = checked(query, key, value, heads, heads, scale, causal, nullptr, normalized);
    if (lengths && offsets) refuse("lengths are for rows of a batch, and offsets for sequences in one row");
    offsets ? check_offsets(a, offsets) : check_lengths(a, lengths);
    if (!a.query.on_gpu() || a.query.numel() == 0) return;
    const int64_t width = a.query.size(2);
    const Tensor w = x_scale ? gpu_tensor("weight", weight, KPDEPLOY_F8, 2, &a.query)
                             : floats_like("weight", weight, 2, a.query);
    if (w.rank != 2 || w.size(0) != width || w.size(1) != width)
      refuse("weight is %s, not [%lld, %lld]", w.shape().c_str(), (long long)width, (long long)width);
    if (!norm_weight) refuse("norm_weight is missing");
    const Tensor added = floats_like("residual", residual, 3, a.query), total = floats_like("sum", sum, 3, a.query);
    same_sizes(added, a.query);
    same_sizes(total, a.query);
    CudaAttended c{};
    c.attention = cuda_attention(context, a);
    c.weight = {w.data, w.stride(0)};
    c.bias = vector_of("bias", bias, width, a.query);
    c.norm_weight = vector_of("norm_weight", norm_weight, width, a.query);
    c.norm_bias = vector_of("norm_bias", norm_bias, width, a.query);
    c.residual = Rows(added).walk();
    c.sum = Rows(total).walk();
    c.normalized = Rows(a.out).walk();
    if (x_scale) {
      c.x_scale = gpu_scales("x_scale", x_scale, 1, a.query, nullptr);
      c.weight_scale = gpu_scales("weight_scale", weight_scale, width, a.query, &c.weight_scale_rows);
    }
    if (quantized) {
      const Tensor eight = gpu_tensor("quantized", quantized, KPDEPLOY_F8, 3, &a.query);
      same_sizes(eight, a.query);
      c.quantized = Rows(eight).walk();
      c.out_scale = gpu_scales("out_scale", out_scale, 1, a.query, nullptr);
    }
    c.eps = static_cast<float>(eps);
    c.constant = weights_are_constant();
    *queued = cuda_kernels()->attended[a.query.dtype](c, context->stream);
  });
}
