// kpdeploy._core: what this CPU has, and direct calls of the kernels on NumPy arrays, for tests and benchmarks.
// bfloat16 arrays are uint16 arrays of the same bits.

#include <pybind11/pybind11.h>
#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "kpdeploy.h"

namespace py = pybind11;

namespace {

struct Array {
  explicit Array(const py::array& array) {
    const py::ssize_t item = array.itemsize();
    for (py::ssize_t i = 0; i < array.ndim(); ++i) {
      if (item == 0 || array.strides(i) % item) throw py::value_error("a stride is not a whole number of elements");
      sizes.push_back(array.shape(i));
      strides.push_back(array.strides(i) / item);
    }
    view.data = const_cast<void*>(array.data());
    view.sizes = sizes.data();
    view.strides = strides.data();
    view.rank = static_cast<int32_t>(sizes.size());
    view.device = KPDEPLOY_CPU;
    const char kind = array.dtype().kind();
    view.dtype = kind == 'f' && item == 4   ? KPDEPLOY_F32
                 : kind == 'u' && item == 2 ? KPDEPLOY_BF16
                 : kind == 'f' && item == 2 ? KPDEPLOY_F16
                 : kind == 'i' && item == 8 ? KPDEPLOY_I64
                                            : KPDEPLOY_OTHER;
  }
  Array(const Array&) = delete;

  std::vector<int64_t> sizes, strides;
  kpdeploy_tensor view{};
};

struct OptionalArray {
  explicit OptionalArray(const std::optional<py::array>& array) {
    if (array) held.emplace(*array);
  }
  const kpdeploy_tensor* view() const { return held ? &held->view : nullptr; }
  std::optional<Array> held;
};

struct OutArray : Array {
  explicit OutArray(const py::array& array) : Array(array) {
    if (!array.writeable()) throw py::value_error("an output is read-only");
  }
};

void on_threads(void* pool, int64_t tasks, void (*task)(void*, int64_t), void* argument) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < tasks;) task(argument, i);
  };
  const int64_t extra = std::min<int64_t>(*static_cast<int*>(pool), tasks) - 1;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < extra; ++i) threads.emplace_back(work);
  work();
  for (std::thread& thread : threads) thread.join();
}

template <class Call>
void run(int threads, const Call& call) {
  char message[512] = "";
  kpdeploy_context context{threads > 1 ? on_threads : nullptr, &threads, threads, nullptr, message, sizeof message,
                           nullptr, 0};
  int status;
  {
    py::gil_scoped_release release;
    status = call(&context);
  }
  if (status == KPDEPLOY_OUT_OF_MEMORY) throw std::bad_alloc();
  if (status != KPDEPLOY_OK) throw py::value_error(message);
}

int activation_of(const std::string& name) {
  const int activation = kpdeploy_activation_of(name.c_str());
  if (activation < 0) throw py::value_error("activation is none of none, relu, gelu, gelu_tanh, silu");
  return activation;
}

using Maybe = std::optional<py::array>;

void attention(const py::array& query, const py::array& key, const py::array& value, const Maybe& lengths, int heads,
               int kv_heads, double scale, bool causal, const py::array& out, int threads) {
  const Array q(query), k(key), v(value);
  const OptionalArray l(lengths);
  const OutArray o(out);
  run(threads, [&](const kpdeploy_context* c) {
    return kpdeploy_attention(c, &q.view, &k.view, &v.view, l.view(), heads, kv_heads, scale, causal, &o.view);
  });
}

void packed_attention(const py::array& query, const py::array& key, const py::array& value, const py::array& offsets,
                      int heads, int kv_heads, double scale, bool causal, const py::array& out, int threads) {
  const Array q(query), k(key), v(value), f(offsets);
  const OutArray o(out);
  run(threads, [&](const kpdeploy_context* c) {
    return kpdeploy_packed_attention(c, &q.view, &k.view, &v.view, &f.view, heads, kv_heads, scale, causal, &o.view);
  });
}

void linear_activation(const py::array& x, const py::array& weight, const Maybe& bias, const std::string& activation,
                       const py::array& out, int threads, bool packed) {
  const Array a(x), w(weight);
  const OptionalArray b(bias);
  const OutArray o(out);
  const int act = activation_of(activation);
  run(threads, [&](const kpdeploy_context* c) {
    if (!packed) return kpdeploy_linear_activation(c, &a.view, &w.view, b.view(), act, &o.view);
    kpdeploy_packed_weight* p = nullptr;
    int status = kpdeploy_pack_weight(c, &w.view, &p);
    if (status == KPDEPLOY_OK) status = kpdeploy_linear_activation_packed(c, &a.view, p, b.view(), act, &o.view);
    kpdeploy_free_packed_weight(p);
    return status;
  });
}

void bias_activation(const py::array& x, const Maybe& bias, const std::string& activation, const py::array& out,
                     int threads) {
  const Array a(x);
  const OptionalArray b(bias);
  const OutArray o(out);
  const int act = activation_of(activation);
  run(threads,
      [&](const kpdeploy_context* c) { return kpdeploy_bias_activation(c, &a.view, b.view(), act, &o.view); });
}

void gated_linear(const py::array& x, const py::array& gate_weight, const py::array& up_weight, const py::array& out,
                  int threads, bool packed) {
  const Array a(x), g(gate_weight), u(up_weight);
  const OutArray o(out);
  run(threads, [&](const kpdeploy_context* c) {
    if (!packed) return kpdeploy_gated_linear(c, &a.view, &g.view, &u.view, &o.view);
    kpdeploy_packed_weight *pg = nullptr, *pu = nullptr;
    int status = kpdeploy_pack_weight(c, &g.view, &pg);
    if (status == KPDEPLOY_OK) status = kpdeploy_pack_weight(c, &u.view, &pu);
    if (status == KPDEPLOY_OK) status = kpdeploy_gated_linear_packed(c, &a.view, pg, pu, &o.view);
    kpdeploy_free_packed_weight(pg);
    kpdeploy_free_packed_weight(pu);
    return status;
  });
}

void layer_norm(const py::array& x, const py::array& weight, const Maybe& bias, double eps, const py::array& out,
                int threads) {
  const Array a(x), w(weight);
  const OptionalArray b(bias);
  const OutArray o(out);
  run(threads,
      [&](const kpdeploy_context* c) { return kpdeploy_layer_norm(c, &a.view, &w.view, b.view(), eps, &o.view); });
}

void rms_norm(const py::array& x, const py::array& weight, double eps, const py::array& out, int threads) {
  const Array a(x), w(weight);
  const OutArray o(out);
  run(threads, [&](const kpdeploy_context* c) { return kpdeploy_rms_norm(c, &a.view, &w.view, eps, &o.view); });
}

void add_layer_norm(const py::array& x, const py::array& residual, const py::array& weight, const Maybe& bias,
                    double eps, const py::array& normalized, const py::array& sum, int threads) {
  const Array a(x), r(residual), w(weight);
  const OptionalArray b(bias);
  const OutArray o(normalized), s(sum);
  run(threads, [&](const kpdeploy_context* c) {
    return kpdeploy_add_layer_norm(c, &a.view, &r.view, &w.view, b.view(), eps, &o.view, &s.view);
  });
}

void add_rms_norm(const py::array& x, const py::array& residual, const py::array& weight, double eps,
                  const py::array& normalized, const py::array& sum, int threads) {
  const Array a(x), r(residual), w(weight);
  const OutArray o(normalized), s(sum);
  run(threads, [&](const kpdeploy_context* c) {
    return kpdeploy_add_rms_norm(c, &a.view, &r.view, &w.view, eps, &o.view, &s.view);
  });
}

void rotary_embedding(const py::array& x, const py::array& cos, const py::array& sin, int heads, const py::array& out,
                      int threads) {
  const Array a(x), c(cos), s(sin);
  const OutArray o(out);
  run(threads, [&](const kpdeploy_context* context) {
    return kpdeploy_rotary_embedding(context, &a.view, &c.view, &s.view, heads, &o.view);
  });
}

void use_isa(const std::string& name) {
  if (kpdeploy_use_isa(name.c_str()) != KPDEPLOY_OK) throw py::value_error("this CPU has no " + name);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "CPU features, and the kernels on NumPy arrays (bfloat16 as uint16). Outputs are the caller's.";
  module.def("isa", [] { return std::string(kpdeploy_isa()); }, "The instruction set whose kernels run.");
  module.def("use_isa", use_isa, py::arg("name"), "Run the kernels of another: avx512, avx2 or baseline.");
  module.def("cuda", [] { return kpdeploy_cuda() != 0; }, "Whether this build holds CUDA kernels.");
  module.def("attention", attention, py::arg("query"), py::arg("key"), py::arg("value"), py::arg("lengths"),
             py::arg("heads"), py::arg("kv_heads"), py::arg("scale"), py::arg("causal"), py::arg("out"),
             py::arg("threads") = 1);
  module.def("packed_attention", packed_attention, py::arg("query"), py::arg("key"), py::arg("value"),
             py::arg("offsets"), py::arg("heads"), py::arg("kv_heads"), py::arg("scale"), py::arg("causal"),
             py::arg("out"), py::arg("threads") = 1);
  module.def("linear_activation", linear_activation, py::arg("x"), py::arg("weight"), py::arg("bias"),
             py::arg("activation"), py::arg("out"), py::arg("threads") = 1, py::arg("packed") = false);
  module.def("bias_activation", bias_activation, py::arg("x"), py::arg("bias"), py::arg("activation"),
             py::arg("out"), py::arg("threads") = 1);
  module.def("gated_linear", gated_linear, py::arg("x"), py::arg("gate_weight"), py::arg("up_weight"),
             py::arg("out"), py::arg("threads") = 1, py::arg("packed") = false);
  module.def("layer_norm", layer_norm, py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("eps"),
             py::arg("out"), py::arg("threads") = 1);
  module.def("rms_norm", rms_norm, py::arg("x"), py::arg("weight"), py::arg("eps"), py::arg("out"),
             py::arg("threads") = 1);
  module.def("add_layer_norm", add_layer_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("bias"),
             py::arg("eps"), py::arg("normalized"), py::arg("sum"), py::arg("threads") = 1);
  module.def("rotary_embedding", rotary_embedding, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("heads"),
             py::arg("out"), py::arg("threads") = 1);
  module.def("add_rms_norm", add_rms_norm, py::arg("x"), py::arg("residual"), py::arg("weight"), py::arg("eps"),
             py::arg("normalized"), py::arg("sum"), py::arg("threads") = 1);
}
