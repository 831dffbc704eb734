// Which library multiplies on a GPU, by what was measured there.
#pragma once

#include "gpu.h"

namespace kpdeploy {

enum class Chosen { kUnmeasured, kOwn, kCublasLt };

// Measured with as many rows, or the nearest number up to twice or half as many. `device`: its name, such as "NVIDIA H100 80GB HBM3".
Chosen chosen_for(const char* device, const CudaLinear& a, int dtype);

}  // namespace kpdeploy
