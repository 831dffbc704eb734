// Which library multiplies or attends on a GPU, by what was measured there.
#pragma once

#include "gpu.h"

namespace kpdeploy {

enum class Chosen { kUnmeasured, kOwn, kCublasLt, kCudnn };

// Measured with as many rows, or the nearest number up to twice or half as many. `device`: its name, such as "NVIDIA H100 80GB HBM3".
Chosen chosen_for(const char* device, const CudaLinear& a, int dtype);
// Measured with as many rows of the batch, queries and keys, or the nearest numbers up to twice or half of each, by whether
// the call has lengths, whatever they are. Packed sequences are not measured.
Chosen chosen_for(const char* device, const CudaAttention& a, int dtype);

}  // namespace kpdeploy
