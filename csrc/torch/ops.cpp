// Registration of the ops in torch, over LibTorch's stable ABI (2.10 and later) and the kernels' C ABI.
//
// Not STABLE_TORCH_LIBRARY: that ends the process when the namespace or an op is there already, as when two bundles in
// one server each bring this library. Here the second one sees the first and stays quiet.

#include <dlfcn.h>
#include <link.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "kpdeploy.h"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // its name in the headers before 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

extern "C" __attribute__((visibility("default"))) int kpdeploy_torch_registered;
int kpdeploy_torch_registered = 0;

// See kpdeploy_set_gpu_providers, which this is for whoever loads the library.
extern "C" __attribute__((visibility("default"))) int kpdeploy_use_gpu_providers(const char* rows) {
  return kpdeploy_set_gpu_providers(nullptr, rows);
}

// Whether this library was built with CUDA kernels, for callers that hold it and no other of ours.
extern "C" __attribute__((visibility("default"))) int kpdeploy_torch_cuda() { return kpdeploy_cuda(); }

extern "C" __attribute__((visibility("default"))) int kpdeploy_use_constant_weights(int constant) {
  return kpdeploy_set_constant_weights(constant);
}

namespace {

using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Sizes = std::vector<int64_t>;

constexpr int64_t kFewRows = 4;  // up to here our own kernel reads the weight once, which oneDNN does not beat

// A view for the C ABI; the tensor must outlive it.
struct View {
  explicit View(const Tensor& tensor) : defined(tensor.defined()) {
    if (!defined) return;  // None came where a tensor was due
    int32_t dtype;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    view.data = tensor.data_ptr();
    view.sizes = tensor.sizes().data();
    view.strides = tensor.strides().data();
    view.rank = static_cast<int32_t>(tensor.dim());
    view.dtype = dtype == aoti_torch_dtype_float32()    ? KPDEPLOY_F32
                 : dtype == aoti_torch_dtype_bfloat16() ? KPDEPLOY_BF16
                 : dtype == aoti_torch_dtype_float16()  ? KPDEPLOY_F16
                 : dtype == aoti_torch_dtype_int64()    ? KPDEPLOY_I64
                 : dtype == aoti_torch_dtype_float8_e4m3fn() ? KPDEPLOY_F8
                                                             : KPDEPLOY_OTHER;
    view.device = tensor.is_cpu() ? KPDEPLOY_CPU : tensor.is_cuda() ? KPDEPLOY_CUDA : KPDEPLOY_OTHER_DEVICE;
    view.device_index = tensor.is_cpu() ? 0 : tensor.get_device_index();
  }
  operator const kpdeploy_tensor*() const { return defined ? &view : nullptr; }
  bool defined;
  kpdeploy_tensor view{};
};

struct OptionalView {
  explicit OptionalView(const Optional& tensor) {
    if (tensor) held.emplace(*tensor);
  }
  operator const kpdeploy_tensor*() const { return held ? &held->view : nullptr; }
  std::optional<View> held;
};

int32_t torch_threads() {
  uint32_t threads = 1;
  torch_get_num_threads(&threads);
  return static_cast<int32_t>(threads);
}

// torch's pool splits evenly beforehand; tasks differ where lengths do, so each thread takes the next one.
void on_torch_threads(void*, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  struct Work {
    std::atomic<int64_t> next{0};
    int64_t tasks;
    void (*task)(void*, int64_t);
    void* argument;
  } work;
  work.tasks = tasks;
  work.task = task;
  work.argument = argument;
  const int64_t threads = torch_threads();
  const auto loop = [](int64_t, int64_t, void* context) {
    auto* w = static_cast<Work*>(context);
    for (int64_t i; (i = w->next.fetch_add(1)) < w->tasks;) w->task(w->argument, i);
  };
  const int64_t workers = tasks < threads ? tasks : threads;
  if (workers <= 1 || torch_parallel_for(0, workers, 1, loop, &work) != AOTI_TORCH_SUCCESS) loop(0, 1, &work);
}

// torch's current stream of a GPU. The function is in libtorch_cuda.so, which a torch for CPUs lacks, and which the
// process has loaded if there is a CUDA tensor in it.
void* cuda_stream(int32_t device_index) {
  using Stream = AOTITorchError(int32_t device_index, void** stream);
  static auto* const current = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Stream*>(dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  if (!current) throw std::runtime_error("kpdeploy: this process holds no libtorch_cuda.so that tells its CUDA stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(current(device_index, &stream));
  return stream;
}

// Makes the GPU of a tensor the current one, for as long as this lives; does nothing for the CPU's.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const View& view) {
    if (view.view.device != KPDEPLOY_CUDA || !view.defined) return;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(view.view.device_index, &guard_));
    stream_ = cuda_stream(view.view.device_index);
  }
  OnDeviceOf(const OnDeviceOf&) = delete;
  ~OnDeviceOf() {
    if (guard_) aoti_torch_delete_device_guard(guard_);
  }
  void* stream() const { return stream_; }

 private:
  DeviceGuardHandle guard_ = nullptr;
  void* stream_ = nullptr;
};

// What kernels are lent: torch gives it to none but them before they have run, since its allocator goes by the stream,
// and in a captured graph it stays the graph's.
struct Lent {
  int32_t device_index;
  std::vector<Tensor> held;
};

void* lend(void* pool, size_t bytes) {
  auto* lent = static_cast<Lent*>(pool);
  const int64_t size = static_cast<int64_t>(bytes), stride = 1;
  AtenTensorHandle made;
  if (aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(),
                               lent->device_index, &made) != AOTI_TORCH_SUCCESS)
    return nullptr;
  lent->held.emplace_back(made);
  return lent->held.back().data_ptr();
}

// `first`: the op's first tensor, on whose device the others must be too.
template <class Call>
void run(const View& first, const Call& call) {
  const OnDeviceOf device(first);
  char message[512] = "";
  Lent lent{first.view.device_index, {}};
  // Large outputs come from the system each time: torch keeps none for the CPU.
  const kpdeploy_context context{on_torch_threads, &lent,   torch_threads(), device.stream(), message,
                                 sizeof message,   lend, 1};
  if (call(&context) != KPDEPLOY_OK) throw std::runtime_error(message);
}

int32_t dtype_of(const Tensor& tensor) {
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// A contiguous tensor of these sizes on the device of `like`.
Tensor empty(const Sizes& sizes, const Tensor& like, int32_t dtype) {
  Sizes strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  int32_t device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device, index, &made));
  return Tensor(made);
}

// Of its dtype, too.
Tensor empty(const Sizes& sizes, const Tensor& like) { return empty(sizes, like, dtype_of(like)); }

Tensor dense_like(const Tensor& like, int32_t dtype) {
  const auto sizes = like.sizes();
  return empty(Sizes(sizes.begin(), sizes.end()), like, dtype);
}

Tensor dense_like(const Tensor& like) {
  if (!like.defined()) throw std::runtime_error("kpdeploy: the first tensor is missing");
  return dense_like(like, dtype_of(like));
}

Tensor dense_f8_like(const Tensor& like) { return dense_like(like, aoti_torch_dtype_float8_e4m3fn()); }

// x's sizes with the last one replaced by the rows of `weight`. Wrong ranks give sizes that the kernel refuses.
Sizes linear_sizes(const Tensor& x, const Tensor& weight) {
  Sizes sizes(x.sizes().begin(), x.sizes().end());
  if (!sizes.empty() && weight.dim() > 0) sizes.back() = weight.size(0);
  return sizes;
}

// The kernels want the last dim contiguous; a graph may bring a transposed view.
template <class... Tensors>
void make_dense(Tensors&... tensors) {
  const auto one = [](Tensor& t) {
    if (!t.defined()) return;
    const int64_t last = t.dim() - 1;
    if (last >= 0 && t.size(last) > 1 && t.stride(last) != 1) t = torch::stable::contiguous(t);
  };
  (one(tensors), ...);
}

void make_dense(Optional& tensor) {
  if (tensor) make_dense(*tensor);
}

Tensor attention(Tensor query, Tensor key, Tensor value, Optional lengths, int64_t heads, int64_t kv_heads,
                 double scale, bool causal) {
  make_dense(query, key, value);
  Tensor out = dense_like(query);
  const View q(query), k(key), v(value), o(out);
  const OptionalView l(lengths);
  run(q, [&](const kpdeploy_context* c) {
    return kpdeploy_attention(c, q, k, v, l, heads, kv_heads, scale, causal, o);
  });
  return out;
}

Tensor attention_fp8(Tensor query, Tensor key, Tensor value, Optional lengths, int64_t heads, int64_t kv_heads,
                     double scale, bool causal, Tensor out_scale) {
  make_dense(query, key, value);
  Tensor out = dense_f8_like(query);
  const View q(query), k(key), v(value), os(out_scale), o(out);
  const OptionalView l(lengths);
  run(q, [&](const kpdeploy_context* c) {
    return kpdeploy_attention_fp8(c, q, k, v, l, heads, kv_heads, scale, causal, os, o);
  });
  return out;
}

Tensor packed_attention(Tensor query, Tensor key, Tensor value, Tensor offsets, int64_t heads, int64_t kv_heads,
                        double scale, bool causal) {
  make_dense(query, key, value);
  Tensor out = dense_like(query);
  const View q(query), k(key), v(value), f(offsets), o(out);
  run(q, [&](const kpdeploy_context* c) {
    return kpdeploy_packed_attention(c, q, k, v, f, heads, kv_heads, scale, causal, o);
  });
  return out;
}

Tensor packed_attention_fp8(Tensor query, Tensor key, Tensor value, Tensor offsets, int64_t heads, int64_t kv_heads,
                            double scale, bool causal, Tensor out_scale) {
  make_dense(query, key, value);
  Tensor out = dense_f8_like(query);
  const View q(query), k(key), v(value), f(offsets), os(out_scale), o(out);
  run(q, [&](const kpdeploy_context* c) {
    return kpdeploy_packed_attention_fp8(c, q, k, v, f, heads, kv_heads, scale, causal, os, o);
  });
  return out;
}

int64_t size_of(const Tensor& tensor, int dim) { return dim < tensor.dim() ? tensor.size(dim) : 0; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> fp8_attention_operands(Tensor query, Tensor key, Tensor value,
                                                                          Optional lengths, int64_t heads,
                                                                          int64_t kv_heads) {
  make_dense(query, key, value);
  constexpr int64_t kKeys = 128;
  const int32_t f8 = aoti_torch_dtype_float8_e4m3fn(), f32 = aoti_torch_dtype_float32();
  // Wrong ranks give sizes that the kernel refuses.
  const int64_t batch = size_of(query, 0), queries = size_of(query, 1), keys = size_of(key, 1),
                size = heads > 0 ? size_of(query, 2) / heads : 0, blocks = (keys + kKeys - 1) / kKeys,
                of_queries = heads > 0 ? heads : 0, of_keys = kv_heads > 0 ? kv_heads : 0;
  Tensor query8 = empty({batch, of_queries, queries, size}, query, f8),
         key8 = empty({batch, of_keys, keys, size}, query, f8),
         value8 = empty({batch, of_keys, size, blocks * kKeys}, query, f8),
         query_scale = empty({batch, of_queries, queries}, query, f32),
         block_scale = empty({batch, of_keys, blocks, 4}, query, f32);
  const View q(query), k(key), v(value), q8(query8), k8(key8), v8(value8), qs(query_scale), bs(block_scale);
  const OptionalView l(lengths);
  run(q, [&](const kpdeploy_context* c) {
    return kpdeploy_fp8_attention_operands(c, q, k, v, l, heads, kv_heads, q8, k8, v8, qs, bs);
  });
  return {query8, key8, value8, query_scale, block_scale};
}

Tensor fp8_attention(Tensor query8, Tensor key8, Tensor value8, Tensor query_scale, Tensor block_scale,
                     Optional lengths, Optional out_scale, double scale, bool causal) {
  const int32_t dtype = out_scale ? aoti_torch_dtype_float8_e4m3fn() : aoti_torch_dtype_bfloat16();
  Tensor out = empty({size_of(query8, 0), size_of(query8, 2), size_of(query8, 1) * size_of(query8, 3)}, query8, dtype);
  const View q(query8), k(key8), v(value8), qs(query_scale), bs(block_scale), o(out);
  const OptionalView l(lengths), os(out_scale);
  run(q, [&](const kpdeploy_context* c) {
    return kpdeploy_fp8_attention(c, q, k, v, qs, bs, l, os, scale, causal, o);
  });
  return out;
}

// oneDNN, as torch carries it: the C function that AOTInductor's artifacts call, declared here because its header is
// not among the stable ones. Looked up when first used; a torch without oneDNN lacks it, and our own kernel runs.
using OneDnnLinear = AOTITorchError(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias,
                                    const char* attribute, const double** scalars, int64_t scalars_count,
                                    const char** algorithm, AtenTensorHandle* out);

OneDnnLinear* onednn() {
  static auto* const linear = reinterpret_cast<OneDnnLinear*>(dlsym(RTLD_DEFAULT, "aoti_torch_cpu__linear_pointwise"));
  return linear;
}

bool many_rows(const Tensor& x) {
  const int64_t k = x.size(-1);
  return k > 0 && x.numel() / k > kFewRows;
}

// Whether oneDNN takes bfloat16 on this CPU, as torch has it: not without AVX-512.
bool onednn_has_bfloat16() {
  static const bool has = [] {
    StableIValue result = 0;
    return aoti_torch_call_dispatcher("mkldnn::_is_mkldnn_bf16_supported", "", &result) == AOTI_TORCH_SUCCESS &&
           torch::stable::detail::to<bool>(result);
  }();
  return has;
}

// `view`: of x. The weights have elements.
bool onednn_multiplies(const Tensor& x, const View& view) {
  return view.view.device == KPDEPLOY_CPU && onednn() && many_rows(x) &&
         (view.view.dtype != KPDEPLOY_BF16 || onednn_has_bfloat16());
}

Tensor onednn_linear(const Tensor& x, const Tensor& weight, const Optional& bias, int activation) {
  static const char* const kNames[] = {"none", "relu", "gelu", "gelu", "swish"};
  const char* algorithm = activation == KPDEPLOY_GELU_TANH ? "tanh" : "none";
  AtenTensorHandle bias_handle = bias ? bias->get() : nullptr, out;
  STABLE_TORCH_ERROR_CODE_CHECK(onednn()(x.get(), weight.get(), bias ? &bias_handle : nullptr, kNames[activation],
                                         nullptr, 0, &algorithm, &out));
  return Tensor(out);
}

int activation_of(StringHandle activation) {
  const char* name = "";
  torch_string_c_str(activation, &name);
  const int kind = kpdeploy_activation_of(name);
  torch_delete_string(activation);
  return kind;
}

Tensor linear(Tensor x, Tensor weight, Optional bias, int kind) {
  make_dense(x, weight);
  make_dense(bias);
  const View a(x), w(weight);
  const OptionalView b(bias);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_check_linear_activation(c, a, w, b, kind); });
  if (weight.numel() > 0 && onednn_multiplies(x, a)) return onednn_linear(x, weight, bias, kind);
  Tensor out = empty(linear_sizes(x, weight), x);
  const View o(out);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_linear_activation(c, a, w, b, kind, o); });
  return out;
}

Tensor linear_activation(Tensor x, Tensor weight, Optional bias, StringHandle activation) {
  return linear(x, weight, bias, activation_of(activation));
}

Tensor fp8_linear_activation(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Optional bias,
                             Optional out_scale, StringHandle activation) {
  const int kind = activation_of(activation);
  make_dense(x, weight);
  make_dense(bias);
  const View a(x), w(weight), xs(x_scale), ws(weight_scale);
  const OptionalView b(bias), os(out_scale);
  const int32_t dtype = out_scale ? aoti_torch_dtype_float8_e4m3fn() : aoti_torch_dtype_bfloat16();
  Tensor out = empty(linear_sizes(x, weight), x, dtype);
  const View o(out);
  run(a, [&](const kpdeploy_context* c) {
    return kpdeploy_fp8_linear_activation(c, a, w, xs, ws, b, os, kind, o);
  });
  return out;
}

Tensor fp8_linear_add(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Optional bias, Tensor residual) {
  make_dense(x, weight, residual);
  make_dense(bias);
  const View a(x), w(weight), xs(x_scale), ws(weight_scale), r(residual);
  const OptionalView b(bias);
  Tensor out = empty(linear_sizes(x, weight), x, aoti_torch_dtype_bfloat16());
  const View o(out);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_linear_add(c, a, w, xs, ws, b, r, o); });
  return out;
}

Tensor fp8_gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor x_scale, Tensor gate_scale,
                        Tensor up_scale, Optional out_scale) {
  make_dense(x, gate_weight, up_weight);
  const View a(x), g(gate_weight), u(up_weight), xs(x_scale), gs(gate_scale), us(up_scale);
  const OptionalView os(out_scale);
  const int32_t dtype = out_scale ? aoti_torch_dtype_float8_e4m3fn() : aoti_torch_dtype_bfloat16();
  Tensor out = empty(linear_sizes(x, up_weight), x, dtype);
  const View o(out);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_gated_linear(c, a, g, u, xs, gs, us, os, o); });
  return out;
}

Tensor gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight) {
  make_dense(x, gate_weight, up_weight);
  const View a(x), g(gate_weight), u(up_weight);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_check_gated_linear(c, a, g, u); });
  if (up_weight.numel() > 0 && onednn_multiplies(x, a)) {
    const Tensor gate = onednn_linear(x, gate_weight, std::nullopt, KPDEPLOY_NONE);
    const Tensor up = onednn_linear(x, up_weight, std::nullopt, KPDEPLOY_NONE);
    const View gv(gate), uv(up);
    run(gv, [&](const kpdeploy_context* c) { return kpdeploy_gate(c, gv, uv, uv); });
    return up;
  }
  Tensor out = empty(linear_sizes(x, up_weight), x);
  const View o(out);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_gated_linear(c, a, g, u, o); });
  return out;
}

Tensor layer_norm(Tensor x, Tensor weight, Optional bias, double eps) {
  make_dense(x, weight);
  make_dense(bias);
  Tensor out = dense_like(x);
  const View a(x), w(weight), o(out);
  const OptionalView b(bias);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_layer_norm(c, a, w, b, eps, o); });
  return out;
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  make_dense(x, weight);
  Tensor out = dense_like(x);
  const View a(x), w(weight), o(out);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_rms_norm(c, a, w, eps, o); });
  return out;
}

std::tuple<Tensor, Tensor> add_layer_norm(Tensor x, Tensor residual, Tensor weight, Optional bias, double eps) {
  make_dense(x, residual, weight);
  make_dense(bias);
  Tensor normalized = dense_like(x), sum = dense_like(x);
  const View a(x), r(residual), w(weight), n(normalized), s(sum);
  const OptionalView b(bias);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_add_layer_norm(c, a, r, w, b, eps, n, s); });
  return {normalized, sum};
}

std::tuple<Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
  make_dense(x, residual, weight);
  Tensor normalized = dense_like(x), sum = dense_like(x);
  const View a(x), r(residual), w(weight), n(normalized), s(sum);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_add_rms_norm(c, a, r, w, eps, n, s); });
  return {normalized, sum};
}

// On the CPU the sum is what add_rms_norm gives beside a norm, whose weight does not count.
Tensor linear_add(Tensor x, Tensor weight, Optional bias, Tensor residual) {
  if (!x.is_cuda()) {
    const Tensor product = linear(x, weight, bias, KPDEPLOY_NONE);
    return std::get<1>(add_rms_norm(product, residual, empty({size_of(weight, 0)}, product), 1));
  }
  make_dense(x, weight, residual);
  make_dense(bias);
  const View a(x), w(weight), r(residual);
  const OptionalView b(bias);
  Tensor out = empty(linear_sizes(x, weight), x);
  const View o(out);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_linear_add(c, a, w, b, r, o); });
  return out;
}

Tensor fp8_quantize(Tensor x, Tensor scale) {
  make_dense(x);
  Tensor out = dense_f8_like(x);
  const View a(x), s(scale), o(out);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_quantize(c, a, s, o); });
  return out;
}

std::tuple<Tensor, Tensor> fp8_layer_norm(Tensor x, Tensor weight, Optional bias, double eps, Tensor out_scale) {
  make_dense(x, weight);
  make_dense(bias);
  Tensor normalized = dense_like(x), quantized = dense_f8_like(x);
  const View a(x), w(weight), os(out_scale), n(normalized), q(quantized);
  const OptionalView b(bias);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_layer_norm(c, a, w, b, eps, os, n, q); });
  return {normalized, quantized};
}

std::tuple<Tensor, Tensor> fp8_rms_norm(Tensor x, Tensor weight, double eps, Tensor out_scale) {
  make_dense(x, weight);
  Tensor normalized = dense_like(x), quantized = dense_f8_like(x);
  const View a(x), w(weight), os(out_scale), n(normalized), q(quantized);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_rms_norm(c, a, w, eps, os, n, q); });
  return {normalized, quantized};
}

std::tuple<Tensor, Tensor, Tensor> fp8_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Optional bias, double eps,
                                                      Tensor out_scale) {
  make_dense(x, residual, weight);
  make_dense(bias);
  Tensor normalized = dense_like(x), sum = dense_like(x), quantized = dense_f8_like(x);
  const View a(x), r(residual), w(weight), os(out_scale), n(normalized), s(sum), q(quantized);
  const OptionalView b(bias);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_add_layer_norm(c, a, r, w, b, eps, os, n, s, q); });
  return {normalized, sum, quantized};
}

std::tuple<Tensor, Tensor, Tensor> fp8_add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps,
                                                    Tensor out_scale) {
  make_dense(x, residual, weight);
  Tensor normalized = dense_like(x), sum = dense_like(x), quantized = dense_f8_like(x);
  const View a(x), r(residual), w(weight), os(out_scale), n(normalized), s(sum), q(quantized);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_add_rms_norm(c, a, r, w, eps, os, n, s, q); });
  return {normalized, sum, quantized};
}

Tensor layer_norm_fp8(Tensor x, Tensor weight, Optional bias, double eps, Tensor out_scale) {
  make_dense(x, weight);
  make_dense(bias);
  Tensor quantized = dense_f8_like(x);
  const View a(x), w(weight), os(out_scale), q(quantized);
  const OptionalView b(bias);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_layer_norm(c, a, w, b, eps, os, nullptr, q); });
  return quantized;
}

Tensor rms_norm_fp8(Tensor x, Tensor weight, double eps, Tensor out_scale) {
  make_dense(x, weight);
  Tensor quantized = dense_f8_like(x);
  const View a(x), w(weight), os(out_scale), q(quantized);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_rms_norm(c, a, w, eps, os, nullptr, q); });
  return quantized;
}

std::tuple<Tensor, Tensor> add_layer_norm_fp8(Tensor x, Tensor residual, Tensor weight, Optional bias, double eps,
                                              Tensor out_scale) {
  make_dense(x, residual, weight);
  make_dense(bias);
  Tensor sum = dense_like(x), quantized = dense_f8_like(x);
  const View a(x), r(residual), w(weight), os(out_scale), s(sum), q(quantized);
  const OptionalView b(bias);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_add_layer_norm(c, a, r, w, b, eps, os, nullptr, s, q); });
  return {sum, quantized};
}

std::tuple<Tensor, Tensor> add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, double eps, Tensor out_scale) {
  make_dense(x, residual, weight);
  Tensor sum = dense_like(x), quantized = dense_f8_like(x);
  const View a(x), r(residual), w(weight), os(out_scale), s(sum), q(quantized);
  run(a, [&](const kpdeploy_context* c) { return kpdeploy_fp8_add_rms_norm(c, a, r, w, eps, os, nullptr, s, q); });
  return {sum, quantized};
}

Tensor rotary_embedding(Tensor x, Tensor cos, Tensor sin, int64_t heads) {
  make_dense(x, cos, sin);
  Tensor out = dense_like(x);
  const View a(x), c(cos), s(sin), o(out);
  run(a, [&](const kpdeploy_context* context) { return kpdeploy_rotary_embedding(context, a, c, s, heads, o); });
  return out;
}

// The three results of attention, a product, the residual sum and its norm, where the kernels for few rows make them.
struct Attended {
  Tensor query, key, value;
  Optional lengths, offsets;
  int64_t heads;
  double scale;
  bool causal;
  Tensor weight;
  Optional x_scale, weight_scale, bias;
  Tensor residual, norm_weight;
  Optional norm_bias;
  double eps;
  Optional out_scale{};
  Tensor normalized{}, sum{};
  Optional quantized{};

  bool queue() {
    make_dense(query, key, value, weight, residual, norm_weight);
    make_dense(bias);
    make_dense(norm_bias);
    if (query.dim() != 3 || weight.dim() != 2 || weight.size(0) != query.size(2)) return false;
    normalized = dense_like(query);
    sum = dense_like(query);
    if (out_scale) quantized = dense_f8_like(query);
    const View q(query), k(key), v(value), w(weight), r(residual), nw(norm_weight), n(normalized), s(sum);
    const OptionalView l(lengths), f(offsets), xs(x_scale), ws(weight_scale), b(bias), nb(norm_bias), os(out_scale),
        e(quantized);
    int queued = 0;
    run(q, [&](const kpdeploy_context* c) {
      return kpdeploy_attention_add_layer_norm(c, q, k, v, l, f, heads, scale, causal, w, xs, ws, b, r, nw, nb, eps, os, n,
                                               s, e, &queued);
    });
    return queued != 0;
  }
};

std::tuple<Tensor, Tensor> attention_add_layer_norm(Tensor query, Tensor key, Tensor value, Optional lengths,
                                                    Optional offsets, int64_t heads, double scale, bool causal,
                                                    Tensor weight, Optional bias, Tensor residual, Tensor norm_weight,
                                                    Optional norm_bias, double eps) {
  Attended a{query, key,  value,    lengths,     offsets,   heads, scale, causal, weight, {},
             {},    bias, residual, norm_weight, norm_bias, eps};
  if (query.is_cuda() && a.queue()) return {a.normalized, a.sum};
  const Tensor x = offsets ? packed_attention(query, key, value, *offsets, heads, heads, scale, causal)
                           : attention(query, key, value, lengths, heads, heads, scale, causal);
  const Tensor sum = linear_add(x, weight, bias, residual);
  return {layer_norm(sum, norm_weight, norm_bias, eps), sum};
}

std::tuple<Tensor, Tensor, Tensor> fp8_attention_add_layer_norm(
    Tensor query, Tensor key, Tensor value, Optional lengths, Optional offsets, int64_t heads, double scale, bool causal,
    Tensor weight, Tensor x_scale, Tensor weight_scale, Optional bias, Tensor residual, Tensor norm_weight,
    Optional norm_bias, double eps, Tensor out_scale) {
  Attended a{query,   key,          value, lengths,  offsets,     heads,     scale, causal,   weight,
             x_scale, weight_scale, bias,  residual, norm_weight, norm_bias, eps,   out_scale};
  if (query.is_cuda() && a.queue()) return {a.normalized, a.sum, *a.quantized};
  const Tensor x = offsets ? packed_attention_fp8(query, key, value, *offsets, heads, heads, scale, causal, x_scale)
                           : attention_fp8(query, key, value, lengths, heads, heads, scale, causal, x_scale);
  const Tensor sum = fp8_linear_add(x, weight, x_scale, weight_scale, bias, residual);
  const auto [normalized, quantized] = fp8_layer_norm(sum, norm_weight, norm_bias, eps, out_scale);
  return {normalized, sum, quantized};
}

struct Op {
  const char* name;
  const char* schema;
  void (*boxed)(StableIValue*, uint64_t, uint64_t);
};

// The schemas are those of kpdeploy/ops/*.py; a test compares them.
const Op kOps[] = {
    {"attention",
     "attention(Tensor query, Tensor key, Tensor value, Tensor? lengths, int heads, int kv_heads, float scale, "
     "bool causal) -> Tensor",
     TORCH_BOX(&attention)},
    {"packed_attention",
     "packed_attention(Tensor query, Tensor key, Tensor value, Tensor offsets, int heads, int kv_heads, float scale, "
     "bool causal) -> Tensor",
     TORCH_BOX(&packed_attention)},
    {"attention_fp8",
     "attention_fp8(Tensor query, Tensor key, Tensor value, Tensor? lengths, int heads, int kv_heads, float scale, "
     "bool causal, Tensor out_scale) -> Tensor",
     TORCH_BOX(&attention_fp8)},
    {"packed_attention_fp8",
     "packed_attention_fp8(Tensor query, Tensor key, Tensor value, Tensor offsets, int heads, int kv_heads, "
     "float scale, bool causal, Tensor out_scale) -> Tensor",
     TORCH_BOX(&packed_attention_fp8)},
    {"fp8_attention_operands",
     "fp8_attention_operands(Tensor query, Tensor key, Tensor value, Tensor? lengths, int heads, int kv_heads) -> "
     "(Tensor query8, Tensor key8, Tensor value8, Tensor query_scale, Tensor block_scale)",
     TORCH_BOX(&fp8_attention_operands)},
    {"fp8_attention",
     "fp8_attention(Tensor query8, Tensor key8, Tensor value8, Tensor query_scale, Tensor block_scale, "
     "Tensor? lengths, Tensor? out_scale, float scale, bool causal) -> Tensor",
     TORCH_BOX(&fp8_attention)},
    {"linear_activation", "linear_activation(Tensor x, Tensor weight, Tensor? bias, str activation) -> Tensor",
     TORCH_BOX(&linear_activation)},
    {"fp8_linear_activation",
     "fp8_linear_activation(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, "
     "Tensor? out_scale, str activation) -> Tensor",
     TORCH_BOX(&fp8_linear_activation)},
    {"linear_add", "linear_add(Tensor x, Tensor weight, Tensor? bias, Tensor residual) -> Tensor",
     TORCH_BOX(&linear_add)},
    {"fp8_linear_add",
     "fp8_linear_add(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, Tensor residual) -> "
     "Tensor",
     TORCH_BOX(&fp8_linear_add)},
    {"gated_linear", "gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight) -> Tensor",
     TORCH_BOX(&gated_linear)},
    {"layer_norm", "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor", TORCH_BOX(&layer_norm)},
    {"rms_norm", "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", TORCH_BOX(&rms_norm)},
    {"add_layer_norm",
     "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> "
     "(Tensor normalized, Tensor sum)",
     TORCH_BOX(&add_layer_norm)},
    {"add_rms_norm",
     "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor normalized, Tensor sum)",
     TORCH_BOX(&add_rms_norm)},
    {"rotary_embedding", "rotary_embedding(Tensor x, Tensor cos, Tensor sin, int heads) -> Tensor",
     TORCH_BOX(&rotary_embedding)},
    {"fp8_quantize", "fp8_quantize(Tensor x, Tensor scale) -> Tensor", TORCH_BOX(&fp8_quantize)},
    {"fp8_gated_linear",
     "fp8_gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor x_scale, Tensor gate_scale, "
     "Tensor up_scale, Tensor? out_scale) -> Tensor",
     TORCH_BOX(&fp8_gated_linear)},
    {"fp8_layer_norm",
     "fp8_layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor out_scale) -> "
     "(Tensor normalized, Tensor quantized)",
     TORCH_BOX(&fp8_layer_norm)},
    {"fp8_rms_norm",
     "fp8_rms_norm(Tensor x, Tensor weight, float eps, Tensor out_scale) -> (Tensor normalized, Tensor quantized)",
     TORCH_BOX(&fp8_rms_norm)},
    {"fp8_add_layer_norm",
     "fp8_add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor out_scale) -> "
     "(Tensor normalized, Tensor sum, Tensor quantized)",
     TORCH_BOX(&fp8_add_layer_norm)},
    {"fp8_add_rms_norm",
     "fp8_add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps, Tensor out_scale) -> "
     "(Tensor normalized, Tensor sum, Tensor quantized)",
     TORCH_BOX(&fp8_add_rms_norm)},
    {"layer_norm_fp8", "layer_norm_fp8(Tensor x, Tensor weight, Tensor? bias, float eps, Tensor out_scale) -> Tensor",
     TORCH_BOX(&layer_norm_fp8)},
    {"rms_norm_fp8", "rms_norm_fp8(Tensor x, Tensor weight, float eps, Tensor out_scale) -> Tensor",
     TORCH_BOX(&rms_norm_fp8)},
    {"add_layer_norm_fp8",
     "add_layer_norm_fp8(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps, Tensor out_scale) -> "
     "(Tensor sum, Tensor quantized)",
     TORCH_BOX(&add_layer_norm_fp8)},
    {"add_rms_norm_fp8",
     "add_rms_norm_fp8(Tensor x, Tensor residual, Tensor weight, float eps, Tensor out_scale) -> "
     "(Tensor sum, Tensor quantized)",
     TORCH_BOX(&add_rms_norm_fp8)},
    {"attention_add_layer_norm",
     "attention_add_layer_norm(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? offsets, int heads, "
     "float scale, bool causal, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, Tensor? norm_bias, "
     "float eps) -> (Tensor normalized, Tensor sum)",
     TORCH_BOX(&attention_add_layer_norm)},
    {"fp8_attention_add_layer_norm",
     "fp8_attention_add_layer_norm(Tensor query, Tensor key, Tensor value, Tensor? lengths, Tensor? offsets, "
     "int heads, float scale, bool causal, Tensor weight, Tensor x_scale, Tensor weight_scale, Tensor? bias, "
     "Tensor residual, Tensor norm_weight, Tensor? norm_bias, float eps, Tensor out_scale) -> "
     "(Tensor normalized, Tensor sum, Tensor quantized)",
     TORCH_BOX(&fp8_attention_add_layer_norm)},
};

// Whether another copy of this library, from another path, has registered the ops in this process.
int is_other_copy(dl_phdr_info* info, size_t, void*) {
  const char* base = std::strrchr(info->dlpi_name, '/');
  if (!base || std::strncmp(base + 1, "libkpdeploy_torch", 17)) return 0;
  void* handle = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
  if (!handle) return 0;
  const auto* flag = static_cast<const int*>(dlsym(handle, "kpdeploy_torch_registered"));
  const int found = flag && flag != &kpdeploy_torch_registered && *flag;
  dlclose(handle);
  return found;
}

// A failed call leaves a line of torch's on stderr; what is here says what it means.
bool registered() {
  TorchLibraryHandle definitions;
  if (aoti_torch_library_init_fragment("kpdeploy", "kpdeploy", __LINE__, &definitions) != AOTI_TORCH_SUCCESS)
    return false;
  for (const Op& op : kOps)
    if (aoti_torch_library_def(definitions, op.schema) != AOTI_TORCH_SUCCESS) return false;
  for (const char* key : {"CPU", "CUDA"}) {
    TorchLibraryHandle kernels;
    if (aoti_torch_library_init_impl("kpdeploy", key, "kpdeploy", __LINE__, &kernels) != AOTI_TORCH_SUCCESS)
      return false;
    for (const Op& op : kOps)
      if (torch_library_impl(kernels, op.name, op.boxed, TORCH_ABI_VERSION) != AOTI_TORCH_SUCCESS) return false;
  }
  return true;  // the handles live as long as the process
}

__attribute__((constructor)) void register_ops() {
  if (dl_iterate_phdr(is_other_copy, nullptr)) return;
  if (registered())
    kpdeploy_torch_registered = 1;
  else
    std::fputs("kpdeploy: this process already holds ops named kpdeploy::*; libkpdeploy_torch.so adds none\n", stderr);
}

}  // namespace
