// Refusals, checks and the walk over rows that all ops share.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "gpu.h"
#include "isa.h"
#include "kpdeploy.h"

namespace kpdeploy {

// Thrown inside an entry point, turned into a status and a message at its border.
struct Refusal {
  kpdeploy_status status;
  std::string message;
};

[[noreturn]] void refuse(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void refuse_unsupported(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs `body`, which may throw a Refusal or std::bad_alloc; writes "op: message" to the context.
int report(const kpdeploy_context* context, const char* op, const Refusal& refusal);

template <class Body>
int guarded(const kpdeploy_context* context, const char* op, const Body& body) {
  try {
    body();
    return KPDEPLOY_OK;
  } catch (const Refusal& refusal) {
    return report(context, op, refusal);
  } catch (...) {
    return report(context, op, {KPDEPLOY_OUT_OF_MEMORY, "not enough memory"});
  }
}

// A checked view of a kpdeploy_tensor.
struct Tensor {
  const char* name;
  char* data;
  const int64_t* sizes;
  const int64_t* strides;
  int rank;
  int dtype;
  int device, device_index;

  bool on_gpu() const { return device == KPDEPLOY_CUDA; }
  int64_t size(int dim) const { return sizes[dim < 0 ? rank + dim : dim]; }
  int64_t stride(int dim) const { return strides[dim < 0 ? rank + dim : dim]; }
  int64_t numel() const;
  int64_t item_bytes() const;
  std::string shape() const;  // such as "[2, 3]"
};

// A tensor of at least `least_rank`, its last dim contiguous, on a device and of a dtype that this build has kernels
// for.
Tensor floats(const char* name, const kpdeploy_tensor* tensor, int least_rank);
// A tensor on a GPU of this dtype, for kernels that are only there; its last dim contiguous. `like`: on whose device.
Tensor gpu_tensor(const char* name, const kpdeploy_tensor* tensor, int dtype, int least_rank,
                  const Tensor* like = nullptr);
// Scales on the GPU of `like`: float32, of one element, or where `each` can say so of `count`, side by side.
const float* gpu_scales(const char* name, const kpdeploy_tensor* tensor, int64_t count, const Tensor& like, bool* each);
// As `floats`, with the dtype and on the device of `like`.
Tensor floats_like(const char* name, const kpdeploy_tensor* tensor, int least_rank, const Tensor& like);
// A vector [n] of the dtype of `like`; null where the pointer is.
const void* vector_of(const char* name, const kpdeploy_tensor* tensor, int64_t n, const Tensor& like);
void same_sizes(const Tensor& a, const Tensor& b);
void same_device(const char* name, const kpdeploy_tensor& tensor, const Tensor& like);

// The leading dims of a tensor as rows: row(r) is where row r starts.
class Rows {
 public:
  explicit Rows(const Tensor& tensor);
  int64_t count() const { return count_; }
  char* row(int64_t r) const;
  // Elements between two rows, where that is one number for all; -1 else.
  int64_t stride() const { return walk_.dims <= 1 ? walk_.strides[0] : -1; }
  const Walk& walk() const { return walk_; }

 private:
  Walk walk_{};
  int64_t item_bytes_, count_ = 1;
};

// Tasks [0, tasks) on the injected pool. A task returns false where it found no memory.
template <class Task>
void parallel(const kpdeploy_context* context, int64_t tasks, const Task& task) {
  struct Shared {
    const Task* task;
    std::atomic<bool> failed{false};
  } shared;
  shared.task = &task;
  const auto call = [](void* argument, int64_t index) {
    auto* s = static_cast<Shared*>(argument);
    if (!(*s->task)(index)) s->failed = true;
  };
  if (tasks > 1 && context->parallel_for) {
    context->parallel_for(context->pool, tasks, call, &shared);
  } else {
    for (int64_t i = 0; i < tasks; ++i) call(&shared, i);
  }
  if (shared.failed) throw Refusal{KPDEPLOY_OUT_OF_MEMORY, "not enough memory for scratch space"};
}

// Scratch of this thread that lives until it ends: at least n floats, aligned to 64 bytes; null without memory.
// `slot`: which of two independent areas.
float* scratch(int slot, int64_t n);
enum { kSharedScratch = 0, kTaskScratch = 1, kShared2Scratch = 2 };

}  // namespace kpdeploy
