// cuBLASLt as a provider of products on a GPU: its bias, ReLU and tanh-GELU epilogues. No header and no link: the library
// is looked up when a product first asks for it, and where it is not, our own kernels run.
//
// The few functions, types and values that are used are those of cublasLt.h, the same in CUDA 12 and 13.

#include "cublaslt.h"

#include <string.h>

#include <array>
#include <map>
#include <mutex>

#include "checks.h"
#include "shared_library.h"

namespace kpdeploy {
namespace {

using Handle = void*;
using Description = void*;
using Layout = void*;
using Preference = void*;

struct Algorithm {
  uint64_t data[8];
};

struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};

enum { kF32 = 0, kF16 = 2, kBF16 = 14, kE4M3 = 28 };  // cudaDataType
enum { kCompute32F = 68, kTransposed = 1 };
enum { kTransA = 3, kEpilogue = 7, kBias = 8, kScaleA = 17, kScaleB = 18, kFastSums = 25, kBiasType = 26, kScaleModeA = 31,
       kScaleModeB = 32 };
enum { kScaleVector = 3 };  // one scale a row
enum { kEpilogueNone = 1, kEpilogueRelu = 2, kEpilogueBias = 4, kEpilogueGelu = 32 };
enum { kMostWorkspace = 1 };

struct Library {
  int (*create)(Handle*) = nullptr;
  int (*describe)(Description*, int compute, int scale) = nullptr;
  int (*forget_description)(Description) = nullptr;
  int (*set)(Description, int attribute, const void*, size_t) = nullptr;
  int (*lay_out)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t stride) = nullptr;
  int (*forget_layout)(Layout) = nullptr;
  int (*prefer)(Preference*) = nullptr;
  int (*forget_preference)(Preference) = nullptr;
  int (*set_preference)(Preference, int attribute, const void*, size_t) = nullptr;
  int (*choose)(Handle, Description, Layout, Layout, Layout, Layout, Preference, int, Heuristic*, int*) = nullptr;
  int (*multiply)(Handle, Description, const void*, const void*, Layout, const void*, Layout, const void*, const void*,
                  Layout, void*, Layout, const Algorithm*, void*, size_t, void*) = nullptr;
  bool there = false;
};

const Library& library() {
  static const Library found = [] {
    Library l;
    SharedLibrary file{"libcublasLt.so.13", "libcublasLt.so.12"};
    file.look_up(l.create, "cublasLtCreate");
    file.look_up(l.describe, "cublasLtMatmulDescCreate");
    file.look_up(l.forget_description, "cublasLtMatmulDescDestroy");
    file.look_up(l.set, "cublasLtMatmulDescSetAttribute");
    file.look_up(l.lay_out, "cublasLtMatrixLayoutCreate");
    file.look_up(l.forget_layout, "cublasLtMatrixLayoutDestroy");
    file.look_up(l.prefer, "cublasLtMatmulPreferenceCreate");
    file.look_up(l.forget_preference, "cublasLtMatmulPreferenceDestroy");
    file.look_up(l.set_preference, "cublasLtMatmulPreferenceSetAttribute");
    file.look_up(l.choose, "cublasLtMatmulAlgoGetHeuristic");
    file.look_up(l.multiply, "cublasLtMatmul");
    l.there = file.complete();
    return l;
  }();
  return found;
}

// Destroys what a C function made.
class Owned {
 public:
  explicit Owned(int (*destroy)(void*)) : destroy_(destroy) {}
  Owned(const Owned&) = delete;
  ~Owned() {
    if (made) destroy_(made);
  }
  void* made = nullptr;

 private:
  int (*destroy_)(void*);
};

Handle handle_of(int device) {
  static std::mutex mutex;
  static std::map<int, Handle> handles;  // for as long as the process lives
  const std::lock_guard<std::mutex> lock(mutex);
  Handle& handle = handles[device];
  if (!handle && library().create(&handle) != 0) handle = nullptr;
  return handle;
}

// All that the choice of an algorithm depends on.
using Key = std::array<int64_t, 12>;

struct Choice {
  bool found;
  Algorithm algorithm;
};

int type_of(int dtype) { return dtype == KPDEPLOY_F32 ? kF32 : dtype == KPDEPLOY_BF16 ? kBF16 : dtype == KPDEPLOY_F16 ? kF16 : kE4M3; }

int alignment_of(const void* p) {
  const auto low = reinterpret_cast<uintptr_t>(p) % 256;
  return low ? static_cast<int>(low & -low) : 256;
}

}  // namespace

bool cublaslt_is_there() { return library().there; }

bool cublaslt_linear(const CudaLinear& a, int dtype, int device, void* stream) {
  const bool scaled = dtype == KPDEPLOY_F8;
  const bool takes = a.activation == KPDEPLOY_NONE || a.activation == KPDEPLOY_RELU || a.activation == KPDEPLOY_GELU_TANH;
  if (a.gated || !takes || a.out_scale || a.k == 0 || a.x.dims > 1 || a.out.dims > 1 || !library().there) return false;
  const Library& lt = library();
  const Handle handle = handle_of(device);
  if (!handle) return false;

  const int type = type_of(dtype), out_type = scaled ? static_cast<int>(kBF16) : type;
  const auto stride_of = [](const Walk& walk, int64_t columns) { return walk.dims ? walk.strides[0] : columns; };
  // What is added is the residual, or nothing: the product itself, times 0.
  const bool adds = a.residual.data != nullptr;
  const Walk& with = adds ? a.residual : a.out;
  const int64_t x_stride = stride_of(a.x, a.k), out_stride = stride_of(a.out, a.n), with_stride = stride_of(with, a.n);
  // Rows that share memory.
  if (with.dims > 1 || x_stride < a.k || out_stride < a.n || with_stride < a.n || a.weight.stride < a.k) return false;
  const int epilogue = (a.activation == KPDEPLOY_RELU        ? kEpilogueRelu
                        : a.activation == KPDEPLOY_GELU_TANH ? kEpilogueGelu
                                                             : 0) |
                       (a.bias ? kEpilogueBias : 0);
  // In its terms, columns first: out [n][rows] = weight^T [k][n] times x [k][rows].
  Owned description(lt.forget_description), weight(lt.forget_layout), x(lt.forget_layout), out(lt.forget_layout),
      added(lt.forget_layout);
  const auto set = [&](int attribute, auto value) {
    return lt.set(description.made, attribute, &value, sizeof value) == 0;
  };
  const int32_t transposed = kTransposed, chosen = epilogue ? epilogue : static_cast<int>(kEpilogueNone);
  bool fits = lt.describe(&description.made, kCompute32F, kF32) == 0 &&
              lt.lay_out(&weight.made, type, a.k, a.n, a.weight.stride) == 0 &&
              lt.lay_out(&x.made, type, a.k, a.rows, x_stride) == 0 &&
              lt.lay_out(&out.made, out_type, a.n, a.rows, out_stride) == 0 &&
              lt.lay_out(&added.made, out_type, a.n, a.rows, with_stride) == 0 && set(kTransA, transposed) &&
              set(kEpilogue, chosen);
  if (a.bias) fits = fits && set(kBias, a.bias) && set(kBiasType, int32_t{out_type});
  if (scaled) {
    fits = fits && set(kScaleA, a.weight_scale) && set(kScaleB, a.x_scale) && set(kFastSums, int8_t{1});
    if (a.x_scale_rows != a.weight_scale_rows) return false;
    if (a.x_scale_rows)
      fits = fits && set(kScaleModeA, int32_t{kScaleVector}) && set(kScaleModeB, int32_t{kScaleVector});
  }
  if (!fits) return false;

  const Key key = {device, dtype | chosen << 8 | (a.bias ? 1 << 20 : 0) | (scaled && a.x_scale_rows ? 1 << 21 : 0),
                   a.rows, a.n, a.k, x_stride, a.weight.stride, out_stride,
                   alignment_of(a.x.data) << 10 | alignment_of(a.weight.data), alignment_of(a.out.data),
                   adds ? with_stride : -1, alignment_of(with.data)};
  static std::mutex mutex;
  static std::map<Key, Choice> choices;
  Choice choice{};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = choices.find(key);
    if (known != choices.end()) {
      choice = known->second;
    } else {
      // No workspace: a call allocates nothing, and two streams share none.
      Owned preference(lt.forget_preference);
      const uint64_t none = 0;
      Heuristic best{};
      int count = 0;
      const bool asked =
          lt.prefer(&preference.made) == 0 &&
          lt.set_preference(preference.made, kMostWorkspace, &none, sizeof none) == 0 &&
          lt.choose(handle, description.made, weight.made, x.made, added.made, out.made, preference.made, 1, &best, &count) == 0;
      choice = {asked && count > 0 && best.state == 0, best.algorithm};
      choices.emplace(key, choice);
    }
  }
  if (!choice.found) return false;
  const float one = 1, times = adds ? 1 : 0;
  const int status = lt.multiply(handle, description.made, &one, a.weight.data, weight.made, a.x.data, x.made, &times,
                                 with.data, added.made, a.out.data, out.made, &choice.algorithm, nullptr, 0, stream);
  if (status != 0)
    throw Refusal{KPDEPLOY_DEVICE_ERROR, "cuBLASLt: status " + std::to_string(status) + " for a product"};
  return true;
}

}  // namespace kpdeploy
