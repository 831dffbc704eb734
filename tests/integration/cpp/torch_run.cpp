// An artifact in libtorch without Python, as Triton's pytorch backend runs it.
// torch_run LIBRARY|- model.pt|model.pt2 OUT ROWS LENGTH IDS MASK: raw int64 inputs [ROWS, LENGTH], raw float32 output.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>

static torch::Tensor read(const char* path, int64_t rows, int64_t length) {
  torch::Tensor tensor = torch::empty({rows, length}, torch::kInt64);
  std::ifstream(path, std::ios::binary).read(static_cast<char*>(tensor.data_ptr()), tensor.nbytes());
  return tensor;
}

int main(int, char** argv) try {
  if (std::string(argv[1]) != "-" && !dlopen(argv[1], RTLD_NOW | RTLD_GLOBAL)) throw std::runtime_error(dlerror());
  const std::string path = argv[2];
  const int64_t rows = std::stoll(argv[4]), length = std::stoll(argv[5]);
  const std::vector<torch::Tensor> inputs = {read(argv[6], rows, length), read(argv[7], rows, length)};
  torch::InferenceMode guard;
  torch::Tensor out;
  if (path.size() > 4 && path.substr(path.size() - 4) == ".pt2") {
    torch::inductor::AOTIModelPackageLoader loader(path);
    out = loader.run(inputs)[0];
  } else {
    torch::jit::Module module = torch::jit::load(path);
    out = module.forward({inputs[0], inputs[1]}).toTuple()->elements()[0].toTensor();
  }
  out = out.contiguous();
  std::ofstream(argv[3], std::ios::binary).write(static_cast<const char*>(out.data_ptr()), out.nbytes());
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
