// cuDNN as a provider of attention on a GPU: see cudnn_attention.cpp.
#pragma once

#include "gpu.h"

namespace kpdeploy {

// What it takes to run a call.
struct CudnnAttention {
  const void* plan;   // null: cuDNN is not there or has none
  int64_t workspace;  // bytes
};

// `may_build`: a plan that no call before has made may be made, which takes some tenths of a second, and is not to be done
// while a stream is captured.
CudnnAttention cudnn_attention_plan(const CudaAttention& a, int dtype, int device, bool may_build);

// Queues the kernels of a plan of this call.
void cudnn_attend(const CudnnAttention& plan, const CudaAttention& a, void* workspace, void* stream);

}  // namespace kpdeploy
