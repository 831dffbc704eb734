// An artifact in ONNX Runtime without Python, as Triton's onnxruntime backend runs it.
// onnx_run LIBRARY|- model.onnx OUT ROWS LENGTH IDS MASK: raw int64 inputs [ROWS, LENGTH], raw float32 output.
#include <onnxruntime_cxx_api.h>

#include <array>
#include <fstream>
#include <iostream>
#include <string>
#include <vector>

int main(int, char** argv) try {
  Ort::Env env(ORT_LOGGING_LEVEL_FATAL);
  Ort::SessionOptions options;
  if (std::string(argv[1]) != "-") options.RegisterCustomOpsLibrary(argv[1]);
  Ort::Session session(env, argv[2], options);
  const std::array<int64_t, 2> shape = {std::stoll(argv[4]), std::stoll(argv[5])};
  std::array<std::vector<int64_t>, 2> data;
  std::vector<Ort::Value> inputs;
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  for (int i = 0; i < 2; ++i) {
    data[i].resize(shape[0] * shape[1]);
    std::ifstream(argv[6 + i], std::ios::binary).read(reinterpret_cast<char*>(data[i].data()), data[i].size() * 8);
    inputs.push_back(Ort::Value::CreateTensor<int64_t>(memory, data[i].data(), data[i].size(), shape.data(), 2));
  }
  Ort::AllocatorWithDefaultOptions allocator;
  const auto first = session.GetInputNameAllocated(0, allocator), second = session.GetInputNameAllocated(1, allocator);
  const auto output = session.GetOutputNameAllocated(0, allocator);
  const char* names[] = {first.get(), second.get()};
  const char* outputs[] = {output.get()};
  const auto results = session.Run(Ort::RunOptions(), names, inputs.data(), 2, outputs, 1);
  const size_t bytes = results[0].GetTensorTypeAndShapeInfo().GetElementCount() * sizeof(float);
  std::ofstream(argv[3], std::ios::binary).write(results[0].GetTensorData<char>(), bytes);
} catch (const std::exception& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
