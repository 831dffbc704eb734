#include "checks.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace kpdeploy {
namespace {

std::string formatted(const char* format, va_list arguments) {
  char text[512];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

const char* dtype_name(int dtype) {
  switch (dtype) {
    case KPDEPLOY_F32: return "float32";
    case KPDEPLOY_BF16: return "bfloat16";
    case KPDEPLOY_F16: return "float16";
    case KPDEPLOY_I64: return "int64";
    case KPDEPLOY_F8: return "float8_e4m3fn";
    default: return "another dtype";
  }
}

struct Area {
  float* data = nullptr;
  int64_t floats = 0;
  ~Area() { std::free(data); }
};

}  // namespace

void refuse(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  Refusal refusal{KPDEPLOY_BAD_ARGUMENT, formatted(format, arguments)};
  va_end(arguments);
  throw refusal;
}

void refuse_unsupported(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  Refusal refusal{KPDEPLOY_UNSUPPORTED, formatted(format, arguments)};
  va_end(arguments);
  throw refusal;
}

int report(const kpdeploy_context* context, const char* op, const Refusal& refusal) {
  if (context && context->message && context->message_bytes)
    snprintf(context->message, context->message_bytes, "kpdeploy::%s: %s", op, refusal.message.c_str());
  return refusal.status;
}

int64_t Tensor::numel() const {
  int64_t n = 1;
  for (int i = 0; i < rank; ++i) n *= sizes[i];
  return n;
}

int64_t Tensor::item_bytes() const { return dtype == KPDEPLOY_F32 ? 4 : dtype == KPDEPLOY_F8 ? 1 : 2; }

std::string Tensor::shape() const {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

namespace {

void check_device(const char* name, const kpdeploy_tensor* tensor) {
  if (!tensor) refuse("%s is missing", name);
  const bool gpu = tensor->device == KPDEPLOY_CUDA;
  if (tensor->device != KPDEPLOY_CPU && !gpu)
    refuse_unsupported("%s is neither on the CPU nor on an NVIDIA GPU", name);
  if (gpu && !cuda_kernels())
    refuse_unsupported("%s is on a GPU, and this library was built without CUDA (csrc/BUILD.md)", name);
}

Tensor checked(const char* name, const kpdeploy_tensor* tensor, int least_rank) {
  if (tensor->rank < least_rank) refuse("%s has %d dims, not at least %d", name, tensor->rank, least_rank);
  Tensor t{name,          static_cast<char*>(tensor->data), tensor->sizes, tensor->strides, tensor->rank, tensor->dtype,
           tensor->device, tensor->device_index};
  for (int i = 0; i < t.rank; ++i)
    if (t.sizes[i] < 0) refuse("%s has a negative size: %s", name, t.shape().c_str());
  if (t.numel() > 0 && !t.data) refuse("%s has no data", name);
  if (t.rank > 0 && t.numel() > 0 && t.size(-1) > 1 && t.stride(-1) != 1)
    refuse("the last dim of %s is not contiguous", name);
  return t;
}

}  // namespace

Tensor floats(const char* name, const kpdeploy_tensor* tensor, int least_rank) {
  check_device(name, tensor);
  const bool gpu = tensor->device == KPDEPLOY_CUDA, half = gpu && tensor->dtype == KPDEPLOY_F16;
  if (tensor->rank < least_rank) refuse("%s has %d dims, not at least %d", name, tensor->rank, least_rank);
  if (tensor->dtype != KPDEPLOY_F32 && tensor->dtype != KPDEPLOY_BF16 && !half)
    refuse_unsupported("%s is %s; the %s", name, dtype_name(tensor->dtype),
                       gpu ? "CUDA kernels take float32, bfloat16 and float16"
                           : "CPU kernels take float32 and bfloat16");
  return checked(name, tensor, least_rank);
}

Tensor gpu_tensor(const char* name, const kpdeploy_tensor* tensor, int dtype, int least_rank, const Tensor* like) {
  check_device(name, tensor);
  if (tensor->device != KPDEPLOY_CUDA) refuse_unsupported("%s is on the CPU, and this op has kernels for GPUs", name);
  if (like) same_device(name, *tensor, *like);
  if (tensor->dtype != dtype) refuse("%s is %s, not %s", name, dtype_name(tensor->dtype), dtype_name(dtype));
  return checked(name, tensor, least_rank);
}

const float* gpu_scales(const char* name, const kpdeploy_tensor* tensor, int64_t count, const Tensor& like, bool* each) {
  const Tensor t = gpu_tensor(name, tensor, KPDEPLOY_F32, 0, &like);
  int64_t dense = 1;
  for (int i = t.rank - 1; i >= 0; dense *= t.size(i--))
    if (t.size(i) > 1 && t.stride(i) != dense) refuse("%s is not contiguous", name);
  const bool one = t.numel() == 1;
  if (each) *each = !one;
  if (one || (each && t.numel() == count)) return reinterpret_cast<const float*>(t.data);
  if (!each) refuse("%s is %s: one element fits", name, t.shape().c_str());
  refuse("%s is %s: one element, or %lld, fit", name, t.shape().c_str(), (long long)count);
}

Tensor floats_like(const char* name, const kpdeploy_tensor* tensor, int least_rank, const Tensor& like) {
  if (tensor) same_device(name, *tensor, like);
  const Tensor t = floats(name, tensor, least_rank);
  if (t.dtype != like.dtype)
    refuse("%s is %s, and %s is %s", name, dtype_name(t.dtype), like.name, dtype_name(like.dtype));
  return t;
}

const void* vector_of(const char* name, const kpdeploy_tensor* tensor, int64_t n, const Tensor& like) {
  if (!tensor) return nullptr;
  const Tensor t = floats_like(name, tensor, 1, like);
  if (t.rank != 1 || t.size(0) != n)
    refuse("%s is %s; [%lld] fits %s", name, t.shape().c_str(), (long long)n, like.name);
  return t.data;
}

void same_sizes(const Tensor& a, const Tensor& b) {
  bool same = a.rank == b.rank;
  for (int i = 0; same && i < a.rank; ++i) same = a.sizes[i] == b.sizes[i];
  if (!same) refuse("%s is %s, and %s is %s", a.name, a.shape().c_str(), b.name, b.shape().c_str());
}

void same_device(const char* name, const kpdeploy_tensor& tensor, const Tensor& like) {
  const auto text = [](int device, int index) -> std::string {
    if (device == KPDEPLOY_CPU) return "the CPU";
    return device == KPDEPLOY_CUDA ? "GPU " + std::to_string(index) : "another device";
  };
  if (tensor.device != like.device || tensor.device_index != like.device_index)
    refuse("%s is on %s, and %s on %s", name, text(tensor.device, tensor.device_index).c_str(), like.name,
           text(like.device, like.device_index).c_str());
}

Rows::Rows(const Tensor& tensor) : item_bytes_(tensor.item_bytes()) {
  walk_.data = tensor.data;
  walk_.sizes[0] = 1;
  // From the outermost in; a dim joins the one before it where the two are one walk.
  for (int i = 0; i < tensor.rank - 1; ++i) {
    count_ *= tensor.sizes[i];
    if (tensor.sizes[i] == 1) continue;
    if (walk_.dims > 0 && walk_.strides[walk_.dims - 1] == tensor.strides[i] * tensor.sizes[i]) {
      walk_.sizes[walk_.dims - 1] *= tensor.sizes[i];
      walk_.strides[walk_.dims - 1] = tensor.strides[i];
      continue;
    }
    if (walk_.dims == Walk::kDims) refuse("%s has more than %d dims that are not one walk", tensor.name, Walk::kDims);
    walk_.sizes[walk_.dims] = tensor.sizes[i];
    walk_.strides[walk_.dims] = tensor.strides[i];
    ++walk_.dims;
  }
}

char* Rows::row(int64_t r) const {
  if (walk_.dims <= 1) return walk_.data + r * walk_.strides[0] * item_bytes_;
  int64_t offset = 0;
  for (int i = walk_.dims - 1; i >= 0; --i) {
    offset += r % walk_.sizes[i] * walk_.strides[i];
    r /= walk_.sizes[i];
  }
  return walk_.data + offset * item_bytes_;
}

float* scratch(int slot, int64_t n) {
  static thread_local Area areas[3];
  Area& area = areas[slot];
  if (area.floats < n) {
    std::free(area.data);
    const size_t bytes = (n * sizeof(float) + 63) / 64 * 64;
    area.data = static_cast<float*>(std::aligned_alloc(64, bytes));
    area.floats = area.data ? n : 0;
  }
  return area.data;
}

}  // namespace kpdeploy
