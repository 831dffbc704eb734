// layer_norm, rms_norm, add_layer_norm, add_rms_norm: one walk over rows.

#include <algorithm>

#include "checks.h"

namespace kpdeploy {
namespace {

constexpr int64_t kTaskBytes = 64 << 10;  // read and written by one task: enough to pay for its dispatch

// Results larger than this are no longer in a cache when the next op reads them.
constexpr int64_t kStreamBytes = 32 << 20;
constexpr int64_t kVectorBytes = 64;

// Whether all rows start at, and are of, whole vectors.
bool whole_vectors(const Tensor& t, const Rows& rows) {
  const auto divides = [](int64_t bytes) { return bytes % kVectorBytes == 0; };
  return divides(t.size(-1) * t.item_bytes()) && rows.stride() >= 0 && divides(rows.stride() * t.item_bytes()) &&
         divides(reinterpret_cast<intptr_t>(t.data));
}

struct Norm {
  const kpdeploy_tensor *x, *residual, *weight, *bias, *normalized, *sum;
  double eps;
  bool rms;
  const kpdeploy_tensor *quantized = nullptr, *out_scale = nullptr;  // both or none; normalized may be null with both
};

void normalize(const kpdeploy_context* context, const Norm& norm) {
  const Tensor x = floats("x", norm.x, 1);
  const int64_t n = x.size(-1);
  if (!norm.weight) refuse("weight is missing");
  const void* weight = vector_of("weight", norm.weight, n, x);
  const void* bias = vector_of("bias", norm.bias, n, x);
  const bool in_8_bits_alone = norm.quantized && !norm.normalized;
  const Tensor out = in_8_bits_alone ? x : floats_like("normalized", norm.normalized, 1, x);
  same_sizes(out, x);
  const Tensor residual = norm.residual ? floats_like("residual", norm.residual, 1, x) : x;
  const Tensor sum = norm.sum ? floats_like("sum", norm.sum, 1, x) : out;
  same_sizes(residual, x);
  same_sizes(sum, x);
  CudaNorm c{};
  if (norm.quantized) {
    const Tensor quantized = gpu_tensor("quantized", norm.quantized, KPDEPLOY_F8, 1, &x);
    same_sizes(quantized, x);
    c.quantized = Rows(quantized).walk();
    c.out_scale = gpu_scales("out_scale", norm.out_scale, 1, x, nullptr);
  }
  if (x.numel() == 0) return;

  const Rows x_rows(x), residual_rows(residual), out_rows(out), sum_rows(sum);
  if (x.on_gpu()) {
    c.x = x_rows.walk();
    c.residual = residual_rows.walk();
    if (!in_8_bits_alone) c.normalized = out_rows.walk();
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
  const int64_t out_bytes = x.numel() * x.item_bytes() * (norm.sum ? 2 : 1);
  const bool streams = f32 && !context->outputs_are_new && out_bytes > kStreamBytes && whole_vectors(out, out_rows) &&
                       whole_vectors(sum, sum_rows);
  const int64_t per_task = std::max<int64_t>(1, kTaskBytes / (n * x.item_bytes() * (norm.sum ? 4 : 2)));
  const int64_t tasks = (x_rows.count() + per_task - 1) / per_task;
  parallel(context, tasks, [&](int64_t task) {
    float* work = f32 && !streams ? nullptr : scratch(kTaskScratch, n);
    if ((!f32 || streams) && !work) return false;
    const int64_t end = std::min(x_rows.count(), (task + 1) * per_task);
    for (int64_t r = task * per_task; r < end; ++r) {
      NormRow row{};
      row.x = x_rows.row(r);
      row.residual = norm.residual ? residual_rows.row(r) : nullptr;
      row.weight = weight;
      row.bias = bias;
      row.normalized = out_rows.row(r);
      row.sum = norm.sum ? sum_rows.row(r) : nullptr;
      row.work = work ? work : static_cast<float*>(norm.sum ? row.sum : const_cast<void*>(row.x));
      row.streams = streams;
      row.last = r + 1 == end;
      row.n = n;
      row.eps = static_cast<float>(norm.eps);
      row.rms = norm.rms;
      norm_row(row);
    }
    return true;
  });
}

void normalize_and_quantize(const kpdeploy_context* context, const Norm& norm) {
  if (norm.x && norm.x->device == KPDEPLOY_CPU)
    refuse_unsupported("x is on the CPU, and this op has kernels for GPUs");
  if (!norm.quantized) refuse("quantized is missing");
  normalize(context, norm);
}

}  // namespace
}  // namespace kpdeploy

using kpdeploy::guarded;
using kpdeploy::normalize;
using kpdeploy::normalize_and_quantize;

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

int kpdeploy_fp8_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                            const kpdeploy_tensor* bias, double eps, const kpdeploy_tensor* out_scale,
                            const kpdeploy_tensor* normalized, const kpdeploy_tensor* quantized) {
  return guarded(context, normalized ? "fp8_layer_norm" : "layer_norm_fp8", [&] {
    normalize_and_quantize(context, {x, nullptr, weight, bias, normalized, nullptr, eps, false, quantized, out_scale});
  });
}

int kpdeploy_fp8_rms_norm(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* weight,
                          double eps, const kpdeploy_tensor* out_scale, const kpdeploy_tensor* normalized,
                          const kpdeploy_tensor* quantized) {
  return guarded(context, normalized ? "fp8_rms_norm" : "rms_norm_fp8", [&] {
    normalize_and_quantize(context, {x, nullptr, weight, nullptr, normalized, nullptr, eps, true, quantized, out_scale});
  });
}

int kpdeploy_fp8_add_layer_norm(const kpdeploy_context* context, const kpdeploy_tensor* x,
                                const kpdeploy_tensor* residual, const kpdeploy_tensor* weight,
                                const kpdeploy_tensor* bias, double eps, const kpdeploy_tensor* out_scale,
                                const kpdeploy_tensor* normalized, const kpdeploy_tensor* sum,
                                const kpdeploy_tensor* quantized) {
  return guarded(context, normalized ? "fp8_add_layer_norm" : "add_layer_norm_fp8", [&] {
    if (!residual || !sum) kpdeploy::refuse("%s is missing", residual ? "sum" : "residual");
    normalize_and_quantize(context, {x, residual, weight, bias, normalized, sum, eps, false, quantized, out_scale});
  });
}

int kpdeploy_fp8_add_rms_norm(const kpdeploy_context* context, const kpdeploy_tensor* x,
                              const kpdeploy_tensor* residual, const kpdeploy_tensor* weight, double eps,
                              const kpdeploy_tensor* out_scale, const kpdeploy_tensor* normalized,
                              const kpdeploy_tensor* sum, const kpdeploy_tensor* quantized) {
  return guarded(context, normalized ? "fp8_add_rms_norm" : "add_rms_norm_fp8", [&] {
    if (!residual || !sum) kpdeploy::refuse("%s is missing", residual ? "sum" : "residual");
    normalize_and_quantize(context, {x, residual, weight, nullptr, normalized, sum, eps, true, quantized, out_scale});
  });
}

int kpdeploy_fp8_quantize(const kpdeploy_context* context, const kpdeploy_tensor* x, const kpdeploy_tensor* scale,
                          const kpdeploy_tensor* out) {
  using namespace kpdeploy;
  return guarded(context, "fp8_quantize", [&] {
    const Tensor in = floats("x", x, 1);
    if (!in.on_gpu()) refuse_unsupported("x is on the CPU, and this op has kernels for GPUs");
    const Tensor to = gpu_tensor("out", out, KPDEPLOY_F8, 1, &in);
    same_sizes(to, in);
    CudaQuantize c{};
    c.scale = gpu_scales("scale", scale, 1, in, nullptr);
    if (in.numel() == 0) return;
    const Rows rows(in), outs(to);
    c.x = rows.walk();
    c.out = to.data;
    c.rows = rows.count();
    c.n = in.size(-1);
    if (c.rows > 1 && outs.stride() != c.n) refuse("out is not contiguous");
    if (c.rows > 1 && rows.stride() == c.n) {  // dense: one long row
      c.n *= c.rows;
      c.rows = 1;
    }
    cuda_kernels()->quantize[in.dtype](c, context->stream);
  });
}
