// attention of 8-bit floats on compute capability 9.0.
#pragma once

#include "gpu.h"

namespace kpdeploy {

// Each queues one kernel, of heads of 64 or 128 that the copy engine can take.
template <class T>
void hopper_fp8_attention_operands(const CudaFp8Operands& a, void* stream);
void hopper_fp8_attention(const CudaFp8Attention& a, int processors, void* stream);

}  // namespace kpdeploy
