// In place of hopper_*.cu, where no code for compute capability 9.0 is built: the general kernels run there, too.

#include "device.cuh"
#include "hopper_attended.h"
#include "hopper_attention.h"
#include "hopper_fp8_attention.h"
#include "hopper_linear.h"

namespace kpdeploy {

template <class T>
bool hopper_attention(const CudaAttention&, int, void*) {
  return false;
}
template bool hopper_attention<bf16>(const CudaAttention&, int, void*);
template bool hopper_attention<f16>(const CudaAttention&, int, void*);

template <class T>
void hopper_fp8_attention_operands(const CudaFp8Operands&, void*) {
  refuse_unsupported("this library was built without code for compute capability 9.0 (KPDEPLOY_CUDA_CODE)");
}
template void hopper_fp8_attention_operands<bf16>(const CudaFp8Operands&, void*);
template void hopper_fp8_attention_operands<f16>(const CudaFp8Operands&, void*);

void hopper_fp8_attention(const CudaFp8Attention&, int, void*) {
  refuse_unsupported("this library was built without code for compute capability 9.0 (KPDEPLOY_CUDA_CODE)");
}

template <class T>
bool hopper_attended(const CudaAttended&, void*) {
  return false;
}
template bool hopper_attended<bf16>(const CudaAttended&, void*);
template bool hopper_attended<f16>(const CudaAttended&, void*);

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
