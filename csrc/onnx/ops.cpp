// Registration of the ops in ONNX Runtime, domain com.kpdeploy, over the kernels' C ABI. Exports RegisterCustomOps only.
//
// Each op is registered for the CPU in float32 and bfloat16, and where this library was built with CUDA for the CUDA
// provider, in float16 too. Weights that are constant are packed for the CPU when a session is made; kernels on a GPU
// may read them before the kernel ahead has ended.

#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "kpdeploy.h"

namespace {

using Type = ONNXTensorElementDataType;
constexpr Type kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
constexpr Type kBFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
constexpr Type kFloat16 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr Type kInt64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

int dtype_of(Type type) {
  switch (type) {
    case kFloat: return KPDEPLOY_F32;
    case kBFloat16: return KPDEPLOY_BF16;
    case kFloat16: return KPDEPLOY_F16;
    case kInt64: return KPDEPLOY_I64;
    default: return KPDEPLOY_OTHER;
  }
}

// A view for the C ABI of a tensor of ONNX Runtime, which are all contiguous.
struct View {
  View(std::vector<int64_t> shape, Type type, const void* data, kpdeploy_device device)
      : sizes(std::move(shape)), strides(sizes.size()) {
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
    view = {const_cast<void*>(data), sizes.data(), strides.data(), static_cast<int32_t>(sizes.size()),
            dtype_of(type),          device,       0};
  }
  // Columns of another one, from `begin` on.
  View(const View& whole, int64_t begin, int64_t width) : sizes(whole.sizes), strides(whole.strides), view(whole.view) {
    sizes.back() = width;
    view.data = static_cast<char*>(view.data) + begin * (view.dtype == KPDEPLOY_F32 ? 4 : 2);
    view.sizes = sizes.data();
    view.strides = strides.data();
  }
  View(const View&) = delete;
  operator const kpdeploy_tensor*() const { return &view; }

  std::vector<int64_t> sizes, strides;
  kpdeploy_tensor view;
};

template <class Value>
std::unique_ptr<View> view_of(const Value& value, kpdeploy_device device) {
  const auto info = value.GetTensorTypeAndShapeInfo();
  return std::make_unique<View>(info.GetShape(), info.GetElementType(), value.GetTensorRawData(), device);
}

// ONNX Runtime does not tell the size of its pool.
int32_t machine_threads() {
  static const auto threads = static_cast<int32_t>(std::thread::hardware_concurrency());
  return threads;
}

// Of kInputs below: T a tensor of the op's dtype, t an optional one, F float32, L int64, l optional int64.
bool is_optional(char kind) { return kind == 't' || kind == 'l'; }
bool is_int64(char kind) { return kind == 'L' || kind == 'l'; }

// What a kernel sees of one run: inputs (null where an optional one is absent), outputs, the session's threads.
class Run {
 public:
  // `kinds` as in kInputs. An empty optional tensor counts as absent: a function body of ONNX, which stands in for
  // an op where this library is not, cannot ask whether an input was left out.
  // ONNX Runtime brings all of them to the device of the provider, and makes that one current.
  Run(OrtKernelContext* context, const char* kinds, kpdeploy_device device)
      : raw_(context), context_(context), device_(device) {
    for (size_t i = 0; i < context_.GetInputCount(); ++i) {
      const Ort::ConstValue value = context_.GetInput(i);
      inputs_.push_back(value == nullptr ? nullptr : view_of(value, device));
      if (inputs_[i] && is_optional(kinds[i]) && inputs_[i]->sizes == std::vector<int64_t>{0}) inputs_[i] = nullptr;
    }
  }

  const kpdeploy_tensor* input(size_t i) const { return i < inputs_.size() && inputs_[i] ? &inputs_[i]->view : nullptr; }
  const std::vector<int64_t>& sizes(size_t i) const {
    if (!input(i)) throw Ort::Exception("input " + std::to_string(i) + " is missing", ORT_INVALID_ARGUMENT);
    return inputs_[i]->sizes;
  }

  // Columns of an input of the op's dtype that is there.
  const kpdeploy_tensor* columns(size_t i, int64_t begin, int64_t width) {
    parts_.push_back(std::make_unique<View>(*inputs_[i], begin, width));
    return *parts_.back();
  }

  const kpdeploy_tensor* output(size_t i, const std::vector<int64_t>& sizes) {
    Ort::UnownedValue value = context_.GetOutput(i, sizes);
    outputs_.push_back(view_of(value, device_));
    return *outputs_.back();
  }

  // x's sizes with the last one replaced; a scalar stays one, for the kernel to refuse.
  std::vector<int64_t> sizes_with_last(size_t i, int64_t last) const {
    std::vector<int64_t> result = sizes(i);
    if (!result.empty()) result.back() = last;
    return result;
  }

  template <class Call>
  void call(const Call& body) const {
    char message[512] = "";
    void* const stream = device_ == KPDEPLOY_CUDA ? context_.GetGPUComputeStream() : nullptr;
    const kpdeploy_context context{parallel_for, raw_, machine_threads(), stream, message, sizeof message, nullptr, 0};
    if (body(&context) != KPDEPLOY_OK) throw Ort::Exception(message, ORT_INVALID_ARGUMENT);
  }

 private:
  // ONNX Runtime splits evenly beforehand; tasks differ where lengths do, so each thread takes the next one.
  static void parallel_for(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
    struct Work {
      std::atomic<int64_t> next{0};
      int64_t tasks;
      void (*task)(void*, int64_t);
      void* argument;
    } work;
    work.tasks = tasks;
    work.task = task;
    work.argument = argument;
    const auto loop = [](void* context, size_t) {
      auto* w = static_cast<Work*>(context);
      for (int64_t i; (i = w->next.fetch_add(1)) < w->tasks;) w->task(w->argument, i);
    };
    const size_t workers = std::min<int64_t>(tasks, machine_threads());
    Ort::KernelContext(static_cast<OrtKernelContext*>(pool)).ParallelFor(loop, workers, workers, &work);
  }

  OrtKernelContext* raw_;
  Ort::KernelContext context_;
  kpdeploy_device device_;
  std::vector<std::unique_ptr<View>> inputs_, parts_, outputs_;
};

// A constant weight, packed; empty where the graph computes it, and on a GPU.
class Packed {
 public:
  Packed(const Ort::ConstKernelInfo& info, size_t input, kpdeploy_device device) {
    if (device != KPDEPLOY_CPU) return;
    int constant = 0;
    const Ort::ConstValue value = info.GetTensorConstantInput(input, &constant);
    if (!constant) return;
    char message[512] = "";
    const kpdeploy_context context{nullptr, nullptr, 1, nullptr, message, sizeof message, nullptr, 0};
    kpdeploy_packed_weight* packed = nullptr;
    if (kpdeploy_pack_weight(&context, *view_of(value, device), &packed) != KPDEPLOY_OK)
      throw Ort::Exception(message, ORT_INVALID_ARGUMENT);
    packed_.reset(packed);
    rows_ = view_of(value, device)->sizes[0];
  }
  explicit operator bool() const { return packed_ != nullptr; }
  const kpdeploy_packed_weight* get() const { return packed_.get(); }
  int64_t rows() const { return rows_; }

 private:
  struct Free {
    void operator()(kpdeploy_packed_weight* packed) const { kpdeploy_free_packed_weight(packed); }
  };
  std::unique_ptr<kpdeploy_packed_weight, Free> packed_;
  int64_t rows_ = 0;
};

// Of a product on a GPU: are its weights, the inputs from 1 on, initializers of the graph, which nobody writes?
bool held_by_the_graph(const Ort::ConstKernelInfo& info, kpdeploy_device device) {
  if (device == KPDEPLOY_CPU) return false;
  int constant = 1;
  for (size_t i = 1; i < info.GetInputCount() && constant; ++i) info.GetTensorConstantInput(i, &constant);
  return constant;
}

// While it lives, weights of this thread's calls are constant, or not.
class ConstantWeights {
 public:
  explicit ConstantWeights(bool constant) : before_(kpdeploy_set_constant_weights(constant)) {}
  ConstantWeights(const ConstantWeights&) = delete;
  ~ConstantWeights() { kpdeploy_set_constant_weights(before_); }

 private:
  int before_;
};

int64_t rows_of(const Packed& packed, const Run& run, size_t input) {
  if (packed) return packed.rows();
  return run.sizes(input).empty() ? 0 : run.sizes(input)[0];
}

// `attend`: kpdeploy_attention or kpdeploy_packed_attention, which differ in what their fourth tensor is.
template <auto attend>
struct AttentionOf {
  static constexpr int kOutputs = 1;
  AttentionOf(const Ort::ConstKernelInfo& info, kpdeploy_device)
      : heads(info.GetAttribute<int64_t>("heads")),
        kv_heads(info.GetAttribute<int64_t>("kv_heads")),
        causal(info.GetAttribute<int64_t>("causal")),
        scale(info.GetAttribute<float>("scale")) {}
  void compute(Run& run) const {
    const kpdeploy_tensor* out = run.output(0, run.sizes(0));
    run.call([&](const kpdeploy_context* c) {
      return attend(c, run.input(0), run.input(1), run.input(2), run.input(3), heads, kv_heads, scale, causal != 0,
                    out);
    });
  }
  int64_t heads, kv_heads, causal;
  float scale;
};

struct Attention : AttentionOf<kpdeploy_attention> {
  static constexpr const char* kName = "Attention";
  static constexpr const char* kInputs = "TTTl";
  using AttentionOf::AttentionOf;
};

struct PackedAttention : AttentionOf<kpdeploy_packed_attention> {
  static constexpr const char* kName = "PackedAttention";
  static constexpr const char* kInputs = "TTTL";
  using AttentionOf::AttentionOf;
};

// Attention to itself of what one product gave: queries, keys and values side by side, which Split would copy.
struct JoinedAttention {
  static constexpr const char* kName = "JoinedAttention";
  static constexpr const char* kInputs = "Tl";
  static constexpr int kOutputs = 1;
  JoinedAttention(const Ort::ConstKernelInfo& info, kpdeploy_device)
      : heads(info.GetAttribute<int64_t>("heads")),
        kv_heads(info.GetAttribute<int64_t>("kv_heads")),
        causal(info.GetAttribute<int64_t>("causal")),
        scale(info.GetAttribute<float>("scale")) {}
  void compute(Run& run) const {
    const std::vector<int64_t>& sizes = run.sizes(0);
    const int64_t parts = heads + 2 * kv_heads;
    if (sizes.size() != 3 || heads < 1 || kv_heads < 1 || sizes[2] % parts != 0)
      throw Ort::Exception("com.kpdeploy:JoinedAttention: joined is not [B, S, (heads + 2 kv_heads) * D]",
                           ORT_INVALID_ARGUMENT);
    const int64_t own = sizes[2] / parts * heads, other = sizes[2] / parts * kv_heads;
    const kpdeploy_tensor* out = run.output(0, run.sizes_with_last(0, own));
    const kpdeploy_tensor* query = run.columns(0, 0, own);
    const kpdeploy_tensor* key = run.columns(0, own, other);
    const kpdeploy_tensor* value = run.columns(0, own + other, other);
    run.call([&](const kpdeploy_context* c) {
      return kpdeploy_attention(c, query, key, value, run.input(1), heads, kv_heads, scale, causal != 0, out);
    });
  }
  int64_t heads, kv_heads, causal;
  float scale;
};

struct LinearActivation {
  static constexpr const char* kName = "LinearActivation";
  static constexpr const char* kInputs = "TTt";
  static constexpr int kOutputs = 1;
  LinearActivation(const Ort::ConstKernelInfo& info, kpdeploy_device device)
      : activation(kpdeploy_activation_of(info.GetAttribute<std::string>("activation").c_str())),
        packed(info, 1, device),
        constant(held_by_the_graph(info, device)) {
    if (activation < 0)
      throw Ort::Exception("com.kpdeploy:LinearActivation: activation is none of none, relu, gelu, gelu_tanh, silu",
                           ORT_INVALID_ARGUMENT);
  }
  void compute(Run& run) const {
    const kpdeploy_tensor* out = run.output(0, run.sizes_with_last(0, rows_of(packed, run, 1)));
    const ConstantWeights weights(constant);
    run.call([&](const kpdeploy_context* c) {
      return packed ? kpdeploy_linear_activation_packed(c, run.input(0), packed.get(), run.input(2), activation, out)
                    : kpdeploy_linear_activation(c, run.input(0), run.input(1), run.input(2), activation, out);
    });
  }
  int activation;
  Packed packed;
  bool constant;
};

struct GatedLinear {
  static constexpr const char* kName = "GatedLinear";
  static constexpr const char* kInputs = "TTT";
  static constexpr int kOutputs = 1;
  GatedLinear(const Ort::ConstKernelInfo& info, kpdeploy_device device)
      : gate(info, 1, device), up(info, 2, device), constant(held_by_the_graph(info, device)) {}
  void compute(Run& run) const {
    const kpdeploy_tensor* out = run.output(0, run.sizes_with_last(0, rows_of(up, run, 2)));
    const ConstantWeights weights(constant);
    run.call([&](const kpdeploy_context* c) {
      return gate && up ? kpdeploy_gated_linear_packed(c, run.input(0), gate.get(), up.get(), out)
                        : kpdeploy_gated_linear(c, run.input(0), run.input(1), run.input(2), out);
    });
  }
  Packed gate, up;
  bool constant;
};

struct LayerNorm {
  static constexpr const char* kName = "LayerNorm";
  static constexpr const char* kInputs = "TTt";
  static constexpr int kOutputs = 1;
  LayerNorm(const Ort::ConstKernelInfo& info, kpdeploy_device) : eps(info.GetAttribute<float>("eps")) {}
  void compute(Run& run) const {
    const kpdeploy_tensor* out = run.output(0, run.sizes(0));
    run.call([&](const kpdeploy_context* c) {
      return kpdeploy_layer_norm(c, run.input(0), run.input(1), run.input(2), eps, out);
    });
  }
  float eps;
};

struct RmsNorm {
  static constexpr const char* kName = "RmsNorm";
  static constexpr const char* kInputs = "TT";
  static constexpr int kOutputs = 1;
  RmsNorm(const Ort::ConstKernelInfo& info, kpdeploy_device) : eps(info.GetAttribute<float>("eps")) {}
  void compute(Run& run) const {
    const kpdeploy_tensor* out = run.output(0, run.sizes(0));
    run.call([&](const kpdeploy_context* c) { return kpdeploy_rms_norm(c, run.input(0), run.input(1), eps, out); });
  }
  float eps;
};

struct AddLayerNorm {
  static constexpr const char* kName = "AddLayerNorm";
  static constexpr const char* kInputs = "TTTt";
  static constexpr int kOutputs = 2;
  AddLayerNorm(const Ort::ConstKernelInfo& info, kpdeploy_device) : eps(info.GetAttribute<float>("eps")) {}
  void compute(Run& run) const {
    const kpdeploy_tensor* normalized = run.output(0, run.sizes(0));
    const kpdeploy_tensor* sum = run.output(1, run.sizes(0));
    run.call([&](const kpdeploy_context* c) {
      return kpdeploy_add_layer_norm(c, run.input(0), run.input(1), run.input(2), run.input(3), eps, normalized, sum);
    });
  }
  float eps;
};

struct AddRmsNorm {
  static constexpr const char* kName = "AddRmsNorm";
  static constexpr const char* kInputs = "TTT";
  static constexpr int kOutputs = 2;
  AddRmsNorm(const Ort::ConstKernelInfo& info, kpdeploy_device) : eps(info.GetAttribute<float>("eps")) {}
  void compute(Run& run) const {
    const kpdeploy_tensor* normalized = run.output(0, run.sizes(0));
    const kpdeploy_tensor* sum = run.output(1, run.sizes(0));
    run.call([&](const kpdeploy_context* c) {
      return kpdeploy_add_rms_norm(c, run.input(0), run.input(1), run.input(2), eps, normalized, sum);
    });
  }
  float eps;
};

struct RotaryEmbedding {
  static constexpr const char* kName = "RotaryEmbedding";
  static constexpr const char* kInputs = "TFF";
  static constexpr int kOutputs = 1;
  RotaryEmbedding(const Ort::ConstKernelInfo& info, kpdeploy_device) : heads(info.GetAttribute<int64_t>("heads")) {}
  void compute(Run& run) const {
    const kpdeploy_tensor* out = run.output(0, run.sizes(0));
    run.call([&](const kpdeploy_context* c) {
      return kpdeploy_rotary_embedding(c, run.input(0), run.input(1), run.input(2), heads, out);
    });
  }
  int64_t heads;
};

template <class Body>
OrtStatusPtr status_of(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const Ort::Exception& error) {
    return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
  } catch (const std::exception& error) {
    return Ort::GetApi().CreateStatus(ORT_RUNTIME_EXCEPTION, error.what());
  }
}

template <class Kernel, kpdeploy_device device>
struct Computing : Kernel {
  explicit Computing(const Ort::ConstKernelInfo& info) : Kernel(info, device) {}
  OrtStatusPtr ComputeV2(OrtKernelContext* context) const {
    return status_of([&] {
      Run run(context, Kernel::kInputs, device);
      Kernel::compute(run);
    });
  }
};

template <class Kernel, Type type, kpdeploy_device device>
struct Op : Ort::CustomOpBase<Op<Kernel, type, device>, Computing<Kernel, device>, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
    return status_of([&] { *kernel = new Computing<Kernel, device>(Ort::ConstKernelInfo(info)); });
  }
  const char* GetName() const { return Kernel::kName; }
  const char* GetExecutionProviderType() const {
    return device == KPDEPLOY_CUDA ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  }
  size_t GetInputTypeCount() const { return std::char_traits<char>::length(Kernel::kInputs); }
  Type GetInputType(size_t i) const {
    const char kind = Kernel::kInputs[i];
    return is_int64(kind) ? kInt64 : kind == 'F' ? kFloat : type;
  }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t i) const {
    return is_optional(Kernel::kInputs[i]) ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
  }
  size_t GetOutputTypeCount() const { return Kernel::kOutputs; }
  Type GetOutputType(size_t) const { return type; }
};

template <class Kernel, kpdeploy_device device, Type... types>
void add_for(Ort::CustomOpDomain& domain) {
  static const std::tuple<Op<Kernel, types, device>...> ops;
  std::apply([&](const auto&... op) { (domain.Add(&op), ...); }, ops);
}

template <class Kernel>
void add(Ort::CustomOpDomain& domain) {
  add_for<Kernel, KPDEPLOY_CPU, kFloat, kBFloat16>(domain);
  if (kpdeploy_cuda()) add_for<Kernel, KPDEPLOY_CUDA, kFloat, kBFloat16, kFloat16>(domain);
}

// One domain for all sessions of the process.
Ort::CustomOpDomain& domain() {
  static Ort::CustomOpDomain made = [] {
    Ort::CustomOpDomain d("com.kpdeploy");
    add<Attention>(d);
    add<PackedAttention>(d);
    add<JoinedAttention>(d);
    add<LinearActivation>(d);
    add<GatedLinear>(d);
    add<LayerNorm>(d);
    add<RmsNorm>(d);
    add<AddLayerNorm>(d);
    add<AddRmsNorm>(d);
    add<RotaryEmbedding>(d);
    return d;
  }();
  return made;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                                const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api)
    return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, "libkpdeploy_onnx.so needs ONNX Runtime 1.21 or later");
  Ort::InitApi(api);
  return status_of([&] { Ort::ThrowOnError(api->AddCustomOpDomain(options, domain())); });
}
