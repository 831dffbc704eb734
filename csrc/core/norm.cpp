// layer_norm, rms_norm, add_layer_norm, add_rms_norm: one walk over rows.

#include <algorithm>

#include "checks.h"

namespace kpdeploy {
namespace {

constexpr int64_t kTaskBytes = 64 << 10;  // read and written by one task: enough to pay for its dispatch

struct Norm {
  const kpdeploy_tensor *x, *residual, *weight, *bias, *normalized, *sum;
  double eps;
  bool rms;
};

void normalize(const kpdeploy_context* context, const Norm& norm) {
  const Tensor x = floats("x", norm.x, 1);
  const int64_t n = x.size(-1);
  if (!norm.weight) refuse("weight is missing");
  const void* weight = vector_of("weight", norm.weight, n, x);
  const void* bias = vector_of("bias", norm.bias, n, x);
  const Tensor out = floats_like("normalized", norm.normalized, 1, x);
  same_sizes(out, x);
  const Tensor residual = norm.residual ? floats_like("residual", norm.residual, 1, x) : x;
  const Tensor sum = norm.sum ? floats_like("sum", norm.sum, 1, x) : out;
  same_sizes(residual, x);
  same_sizes(sum, x);
  if (x.numel() == 0) return;

  const Rows x_rows(x), residual_rows(residual), out_rows(out), sum_rows(sum);
  if (x.on_gpu()) {
    CudaNorm c{};
    c.x = x_rows.walk();
    c.residual = residual_rows.walk();
    c.normalized = out_rows.walk();
    c.sum = sum_rows.walk();
    c.weight = weight;
    c.bias = bias;
    c.rows = x_rows.count();
    c.n = n;
    c.eps = static_cast<float>(norm.eps);
    c.rms = norm.rms;
    c.adds = norm.residual != nullptr;
    return cuda_kernels()->norm[x.dtype](c, context->stream);
  }
  const bool f32 = x.dtype == KPDEPLOY_F32;
  const auto norm_row = kernels().norm_row[x.dtype];
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / (n * x.item_bytes() * (norm.sum ? 4 : 2)));
  const int64_t tasks = (x_rows.count() + per_task - 1) / per_task;
  parallel(context, tasks, [&](int64_t task) {
    float* work = f32 ? nullptr : scratch(kTaskScratch, n);
    if (!f32 && !work) return false;
    const int64_t end = std::min(x_rows.count(), (task + 1) * per_task);
    for (int64_t r = task * per_task; r < end; ++r) {
      NormRow row{};
      row.x = x_rows.row(r);
      row.residual = norm.residual ? residual_rows.row(r) : nullptr;
      row.weight = weight;
      row.bias = bias;
      row.normalized = out_rows.row(r);
      row.sum = norm.sum ? sum_rows.row(r) : nullptr;
      row.work = f32 ? static_cast<float*>(norm.sum ? row.sum : const_cast<void*>(row.x)) : work;
      row.n = n;
      row.eps = static_cast<float>(norm.eps);
      row.rms = norm.rms;
      norm_row(row);
    }
    return true;
  });
}

}  // namespace
}  // namespace kpdeploy

using kpdeploy::guarded;
using kpdeploy::normalize;

int kpdeploy_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                        const kpdeploy_tensor* bias, double eps, const kpdeploy_tensor* out) {
  return guarded(context, "layer_norm",
                 [&] { normalize(context, {x, nullptr, weight, bias, out, nullptr, eps, false}); });
}

int kpdeploy_rms_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                      double eps, const kpdeploy_tensor* out) {
  return guarded(context, "rms_norm",
                 [&] { normalize(context, {x, nullptr, weight, nullptr, out, nullptr, eps, true}); });
}

int kpdeploy_add_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* x,
                            const kpdeploy_tensor* residual, const kpdeploy_tensor* weight,
                            const kpdeploy_tensor* bias, double eps, const kpdeploy_tensor* normalized,
                            const kpdeploy_tensor* sum) {
  return guarded(context, "add_layer_norm", [&] {
    if (!residual || !sum) kpdeploy::refuse("%s is missing", residual ? "sum" : "residual");
    normalize(context, {x, residual, weight, bias, normalized, sum, eps, false});
  });
}

int kpdeploy_add_rms_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* residual,
                          const kpdeploy_tensor* weight, double eps, const kpdeploy_tensor* normalized,
                          const kpdeploy_tensor* sum) {
  return guarded(context, "add_rms_norm", [&] {
    if (!residual || !sum) kpdeploy::refuse("%s is missing", residual ? "sum" : "residual");
    normalize(context, {x, residual, weight, nullptr, normalized, sum, eps, true});
  });
}
