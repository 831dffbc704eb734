// attention_add_layer_norm on compute capability 9.0.
#pragma once

#include "gpu.h"

namespace kpdeploy {

// Queues all of it as two kernels, of T = bfloat16 or float16; with x_scale the weight is of 8 bits. False, with nothing
// queued: it is for separate kernels (more than 256 rows or keys, heads of another size than 64, an odd number of them or
// more than 16, packed sequences, a weight that shared memory does not hold, a caller that lends no memory), or the build
// has no such code.
template <class T>
bool hopper_attended(const CudaAttended& a, void* stream);

}  // namespace kpdeploy
