// The table of CUDA kernels.

#include "device.cuh"

const kpdeploy::CudaKernels* kpdeploy::cuda_kernels() {
  static const CudaKernels table = {
      {norm<float>, norm<bf16>, norm<f16>},
      {linear<float>, linear<bf16>, linear<f16>},
      fp8_linear,
      {attention<float>, attention<bf16>, attention<f16>},
  };
  return &table;
}

int kpdeploy_cuda(void) { return 1; }
