// Products on compute capability 9.0.
#pragma once

#include "gpu.h"

namespace kpdeploy {

// Queues the product, of T = bfloat16 or float16. False, with nothing queued: the copy engine cannot read or write these
// tensors (rows and addresses in multiples of 16 bytes, one stride for all rows), or the build has no such code.
template <class T>
bool hopper_linear(const CudaLinear& a, int processors, void* stream);
bool hopper_fp8_linear(const CudaLinear& a, int processors, void* stream);

}  // namespace kpdeploy
