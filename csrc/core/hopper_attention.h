// attention on compute capability 9.0.
#pragma once

#include "gpu.h"

namespace kpdeploy {

// Queues the kernel, of T = bfloat16 or float16. False, with nothing queued: it is for another one (heads above 128 or of
// no multiple of 8, tensors that the copy engine cannot take, a scale that is not above 0), or the build has no such code.
template <class T>
bool hopper_attention(const CudaAttention& a, int processors, void* stream);

}  // namespace kpdeploy
