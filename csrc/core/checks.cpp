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

int64_t Tensor::item_bytes() const { return dtype == KPDEPLOY_F32 ? 4 : 2; }

std::string Tensor::shape() const {
  std::string text = "[";
  for (int i = 0; i < rank; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + "]";
}

Tensor floats(const char* name, const kpdeploy_tensor* tensor, int least_rank) {
  if (!tensor) refuse("%s is missing", name);
  if (tensor->device != KPDEPLOY_CPU) refuse_unsupported("%s is not on the CPU, and this build has CPU kernels", name);
  if (tensor->rank < least_rank) refuse("%s has %d dims, not at least %d", name, tensor->rank, least_rank);
  if (tensor->dtype != KPDEPLOY_F32 && tensor->dtype != KPDEPLOY_BF16)
    refuse_unsupported("%s is %s; the CPU kernels take float32 and bfloat16", name, dtype_name(tensor->dtype));
  Tensor t{name, static_cast<char*>(tensor->data), tensor->sizes, tensor->strides, tensor->rank, tensor->dtype};
  for (int i = 0; i < t.rank; ++i)
    if (t.sizes[i] < 0) refuse("%s has a negative size: %s", name, t.shape().c_str());
  if (t.numel() > 0 && !t.data) refuse("%s has no data", name);
  if (t.numel() > 0 && t.size(-1) > 1 && t.stride(-1) != 1) refuse("the last dim of %s is not contiguous", name);
  return t;
}

Tensor floats_like(const char* name, const kpdeploy_tensor* tensor, int least_rank, const Tensor& like) {
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

Rows::Rows(const Tensor& tensor) : data_(tensor.data), item_bytes_(tensor.item_bytes()) {
  // From the outermost in; a dim joins the one before it where the two are one walk.
  for (int i = 0; i < tensor.rank - 1; ++i) {
    count_ *= tensor.sizes[i];
    if (tensor.sizes[i] == 1) continue;
    if (dims_ > 0 && strides_[dims_ - 1] == tensor.strides[i] * tensor.sizes[i]) {
      sizes_[dims_ - 1] *= tensor.sizes[i];
      strides_[dims_ - 1] = tensor.strides[i];
      continue;
    }
    if (dims_ == kDims) refuse("%s has more than %d dims that are not one walk", tensor.name, kDims);
    sizes_[dims_] = tensor.sizes[i];
    strides_[dims_] = tensor.strides[i];
    ++dims_;
  }
}

char* Rows::row(int64_t r) const {
  if (dims_ <= 1) return data_ + r * strides_[0] * item_bytes_;
  int64_t offset = 0;
  for (int i = dims_ - 1; i >= 0; --i) {
    offset += r % sizes_[i] * strides_[i];
    r /= sizes_[i];
  }
  return data_ + offset * item_bytes_;
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
