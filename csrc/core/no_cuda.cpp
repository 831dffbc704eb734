// In place of the .cu files, where there is no nvcc.

#include "gpu.h"
#include "kpdeploy.h"

const kpdeploy::CudaKernels* kpdeploy::cuda_kernels() { return nullptr; }

int kpdeploy_cuda(void) { return 0; }

int kpdeploy_set_gpu_providers(const kpdeploy_context*, const char*) { return KPDEPLOY_UNSUPPORTED; }
