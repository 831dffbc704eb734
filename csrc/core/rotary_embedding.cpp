// rotary_embedding: one walk over rows, each of which has its row of cosines and sines.

#include <algorithm>

#include "checks.h"

namespace kpdeploy {
namespace {

constexpr int64_t kTaskBytes = 64 << 10;  // read and written by one task: enough to pay for its dispatch

// cos or sin: float32 [1 or B, S, R] beside x [B, S, heads * D].
Tensor table_of(const char* name, const kpdeploy_tensor* tensor, const Tensor& x, int64_t size) {
  if (tensor) same_device(name, *tensor, x);
  const Tensor t = floats(name, tensor, 3);
  if (t.dtype != KPDEPLOY_F32) refuse("%s is not float32", name);
  const bool fits = t.rank == 3 && (t.size(0) == 1 || t.size(0) == x.size(0)) && t.size(1) == x.size(1);
  if (!fits || t.size(2) % 2 || t.size(2) > size)
    refuse("%s is %s; x is %s in heads of %lld, which [1 or %lld, %lld, an even number up to %lld] fits", name,
           t.shape().c_str(), x.shape().c_str(), (long long)size, (long long)x.size(0), (long long)x.size(1),
           (long long)size);
  return t;
}

}  // namespace
}  // namespace kpdeploy

using namespace kpdeploy;

int kpdeploy_rotary_embedding(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* cos,
                              const kpdeploy_tensor* sin, int64_t heads, const kpdeploy_tensor* out) {
  return guarded(context, "rotary_embedding", [&] {
    const Tensor in = floats("x", x, 3);
    if (in.rank != 3) refuse("x is %s, not [batch, rows, heads * size]", in.shape().c_str());
    if (heads < 1 || in.size(2) % heads)
      refuse("x is %s: its last dim is not %lld heads", in.shape().c_str(), (long long)heads);
    const int64_t size = in.size(2) / heads;
    const Tensor cosines = table_of("cos", cos, in, size), sines = table_of("sin", sin, in, size);
    same_sizes(sines, cosines);
    const Tensor to = floats_like("out", out, 3, in);
    same_sizes(to, in);
    if (in.numel() == 0) return;
    const Rows from_rows(in), cos_rows(cosines), sin_rows(sines), to_rows(to);
    const int64_t rows = from_rows.count(), tables = cos_rows.count(), turned = cosines.size(2);
    if (in.on_gpu())
      return cuda_kernels()->rotary[in.dtype](
          {from_rows.walk(), cos_rows.walk(), sin_rows.walk(), to_rows.walk(), rows, tables, heads, size, turned},
          context->stream);
    const int64_t row_bytes = in.size(2) * in.item_bytes() * 2, per_task = std::max<int64_t>(1, kTaskBytes / row_bytes);
    parallel(context, (rows + per_task - 1) / per_task, [&](int64_t task) {
      for (int64_t r = task * per_task; r < std::min(rows, (task + 1) * per_task); ++r)
        kernels().rotary_row[in.dtype](from_rows.row(r), reinterpret_cast<const float*>(cos_rows.row(r % tables)),
                                       reinterpret_cast<const float*>(sin_rows.row(r % tables)), to_rows.row(r), heads,
                                       size, turned);
      return true;
    });
  });
}
