// The table of CUDA kernels, and what is known of the GPU that runs them.

#include <mutex>
#include <vector>

#include "device.cuh"

kpdeploy::Gpu kpdeploy::current_gpu() {
  static std::mutex mutex;
  static std::vector<Gpu> known;  // names live as long as the process
  Gpu gpu{};
  check_cuda(cudaGetDevice(&gpu.index));
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Gpu& one : known)
    if (one.index == gpu.index) return one;
  auto* const properties = new cudaDeviceProp;
  check_cuda(cudaGetDeviceProperties(properties, gpu.index));
  gpu.capability = properties->major * 10 + properties->minor;
  gpu.processors = properties->multiProcessorCount;
  gpu.name = properties->name;
  known.push_back(gpu);
  return gpu;
}

const kpdeploy::CudaKernels* kpdeploy::cuda_kernels() {
  static const CudaKernels table = {
      {norm<float>, norm<bf16>, norm<f16>},
      {quantize<float>, quantize<bf16>, quantize<f16>},
      {linear<float>, linear<bf16>, linear<f16>},
      fp8_linear,
      {attention<float>, attention<bf16>, attention<f16>},
      {nullptr, fp8_attention_operands<bf16>, fp8_attention_operands<f16>},
      fp8_attention,
      {rotary<float>, rotary<bf16>, rotary<f16>},
      {attended<float>, attended<bf16>, attended<f16>},
  };
  return &table;
}

int kpdeploy_cuda(void) { return 1; }
