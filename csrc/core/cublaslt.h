// cuBLASLt, where the process can load it.
#pragma once

#include "gpu.h"

namespace kpdeploy {

bool cublaslt_is_there();

// Queues the product on the stream of the current GPU, which is `device`. False, with nothing queued: the library is not
// there, or does not take the call (it has no erf GELU, no SiLU, no gate, and no rows in several strides).
bool cublaslt_linear(const CudaLinear& a, int dtype, int device, void* stream);

}  // namespace kpdeploy
