// In place of hopper_linear.cu, where no code for compute capability 9.0 is built: the general kernels run there, too.

#include "device.cuh"
#include "hopper_linear.h"

namespace kpdeploy {

template <class T>
bool hopper_linear(const CudaLinear&, int, void*) {
  return false;
}
template bool hopper_linear<bf16>(const CudaLinear&, int, void*);
template bool hopper_linear<f16>(const CudaLinear&, int, void*);

bool hopper_fp8_linear(const CudaLinear&, int, void*) {
  refuse_unsupported("this library was built without code for compute capability 9.0 (KPDEPLOY_CUDA_CODE)");
}

}  // namespace kpdeploy
