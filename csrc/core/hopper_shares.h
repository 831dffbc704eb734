// Products of few rows, or of few tiles, on compute capability 9.0.
#pragma once

#include "gpu.h"

namespace kpdeploy {

// Queues the product of tensors that the copy engine can read; T and Out as in hopper_linear.h. False, with nothing
// queued: whole tiles are as fast, or it is gated.
template <class T, class Out>
bool hopper_shares(const CudaLinear& a, int processors, void* stream);

}  // namespace kpdeploy
