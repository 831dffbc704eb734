// cuDNN's attention as a provider on a GPU. No header and no link: the library is looked up when a call first asks for it,
// and where it is not, or has no plan for a call, our own kernels run.
//
// The functions and values are those of cudnn_graph.h, the same in all of cuDNN 9. cuDNN takes attention as a graph of
// products, a mask and a softmax, and runs it as one kernel where it knows the pattern: this one is that of NVIDIA's
// cudnn-frontend (MIT; scaled_dot_product_flash_attention.h, softmax.h, attn_score_modifiers.h), operation by operation.

#include "cudnn_attention.h"

#include <array>
#include <cmath>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "checks.h"
#include "shared_library.h"

namespace kpdeploy {
namespace {

using Handle = void*;

enum DataType { kFloat = 0, kHalf = 2, kInt32 = 4, kBFloat16 = 9, kBoolean = 11 };
// Types of attributes.
enum { kOfHandle = 0, kOfDataType = 1, kOfBoolean = 2, kOfInt64 = 3, kOfFloat = 4, kOfPointer = 6, kOfHeuristic = 8,
       kOfPointwise = 14, kOfDescriptor = 15, kOfReduction = 18 };
// Descriptors.
enum { kPointwise = 0, kEngineConfig = 3, kHeuristic = 4, kPlan = 5, kPointwiseOperation = 13, kOperationGraph = 15,
       kVariantPack = 16, kTensor = 17, kMatmul = 18, kMatmulOperation = 19, kReduction = 21, kReductionOperation = 22 };
// Pointwise modes, and those of a reduction.
enum { kAdd = 0, kMul = 1, kDiv = 6, kSub = 9, kExp = 13, kLog = 15, kGreaterEqual = 303, kIndex = 501, kSelect = 601 };
enum { kReduceAdd = 0, kReduceMax = 3 };
enum { kModeA = 3 };
// Attributes.
enum { kPointwiseMode = 0, kPointwisePrecision = 1, kPointwiseAxis = 9, kHeuristicMode = 200, kHeuristicGraph = 201,
       kHeuristicResults = 202, kPlanHandle = 400, kPlanConfig = 401, kPlanWorkspace = 402, kPointwiseDescriptor = 750,
       kPointwiseX = 751, kPointwiseB = 752, kPointwiseY = 753, kPointwiseAlpha1 = 754, kPointwiseAlpha2 = 755,
       kPointwiseT = 758, kGraphHandle = 800, kGraphOperations = 801, kTensorAlignment = 900, kTensorType = 901,
       kTensorSizes = 902, kTensorStrides = 903, kTensorId = 906, kTensorVirtual = 907, kTensorByValue = 908,
       kPackIds = 1000, kPackPointers = 1001, kPackWorkspace = 1003, kMatmulType = 1500, kMatmulA = 1520,
       kMatmulB = 1521, kMatmulC = 1522, kMatmulDescriptor = 1523, kReductionMode = 1600, kReductionType = 1601,
       kReductionX = 1610, kReductionY = 1611, kReductionDescriptor = 1612 };

struct Library {
  size_t (*version)() = nullptr;
  int (*create)(Handle*) = nullptr;
  int (*set_stream)(Handle, void*) = nullptr;
  int (*make)(int type, void** descriptor) = nullptr;
  int (*forget)(void* descriptor) = nullptr;
  int (*set)(void* descriptor, int attribute, int type, int64_t count, const void* values) = nullptr;
  int (*get)(void* descriptor, int attribute, int type, int64_t most, int64_t* count, void* values) = nullptr;
  int (*finalize)(void* descriptor) = nullptr;
  int (*execute)(Handle, void* plan, void* variant_pack) = nullptr;
  bool there = false;
};

const Library& library() {
  static const Library found = [] {
    Library l;
    SharedLibrary file{"libcudnn.so.9"};
    file.look_up(l.version, "cudnnGetVersion");
    file.look_up(l.create, "cudnnCreate");
    file.look_up(l.set_stream, "cudnnSetStream");
    file.look_up(l.make, "cudnnBackendCreateDescriptor");
    file.look_up(l.forget, "cudnnBackendDestroyDescriptor");
    file.look_up(l.set, "cudnnBackendSetAttribute");
    file.look_up(l.get, "cudnnBackendGetAttribute");
    file.look_up(l.finalize, "cudnnBackendFinalize");
    file.look_up(l.execute, "cudnnBackendExecute");
    // Attention in 9.10.0 and 9.10.1 has bugs that cudnn-frontend refuses them for.
    l.there = file.complete() && l.version() != 91000 && l.version() != 91001;
    return l;
  }();
  return found;
}

// What cuDNN answers to a step that it does not take.
struct Refused {
  int status;
};

void check(int status) {
  if (status != 0) throw Refused{status};
}

class Descriptor {
 public:
  explicit Descriptor(int type) { check(library().make(type, &made_)); }
  Descriptor(Descriptor&& other) noexcept : made_(std::exchange(other.made_, nullptr)) {}
  ~Descriptor() {
    if (made_) library().forget(made_);
  }
  void set(int attribute, int type, int64_t count, const void* values) {
    check(library().set(made_, attribute, type, count, values));
  }
  template <class Value>
  void set(int attribute, int type, Value value) {
    set(attribute, type, 1, &value);
  }
  void finalize() { check(library().finalize(made_)); }
  void* get() const { return made_; }

 private:
  void* made_ = nullptr;
};

using Sizes = std::array<int64_t, 4>;  // batch, heads, and of a matrix rows and columns

// Ids of what a call brings: the others are the graph's own.
enum Id : int64_t { kQuery = 1, kKey, kValue, kOut, kScale, kNothing, kKeysMore, kOwn };

// Operations, and the tensors between them.
class Graph {
 public:
  Graph(Sizes scores, DataType type) : scores_(scores), type_(type) {}

  void* given(Id id, DataType type, const Sizes& sizes, const Sizes& strides) {
    return tensor(id, type, sizes, strides, false, false);
  }
  void* number(Id id, DataType type) { return tensor(id, type, {1, 1, 1, 1}, {1, 1, 1, 1}, false, true); }
  // Numbers for every query and key, or with `is_row` one a query.
  void* between(DataType type, bool is_row = false) {
    const auto [batch, heads, queries, all] = scores_;
    const int64_t keys = is_row ? 1 : all;
    return tensor(Id(next_++), type, {batch, heads, queries, keys}, {heads * queries * keys, queries * keys, keys, 1},
                  true, false);
  }

  void multiply(void* a, void* b, void* c) {
    Descriptor& how = held_.emplace_back(kMatmul);
    how.set(kMatmulType, kOfDataType, kFloat);
    how.finalize();
    Descriptor& made = operation(kMatmulOperation, kMatmulDescriptor, how);
    for (const auto& [attribute, what] : {std::pair(kMatmulA, a), {kMatmulB, b}, {kMatmulC, c}})
      made.set(attribute, kOfDescriptor, what);
    made.finalize();
  }

  void* pointwise(int mode, DataType precision, void* y, void* x, void* b = nullptr, void* t = nullptr,
                  int64_t axis = -1) {
    Descriptor& how = held_.emplace_back(kPointwise);
    how.set(kPointwiseMode, kOfPointwise, mode);
    how.set(kPointwisePrecision, kOfDataType, precision);
    if (mode == kIndex) how.set(kPointwiseAxis, kOfInt64, axis);
    how.finalize();
    Descriptor& made = operation(kPointwiseOperation, kPointwiseDescriptor, how);
    for (const auto& [attribute, what] : {std::pair(kPointwiseX, x), {kPointwiseY, y}, {kPointwiseB, b}, {kPointwiseT, t}})
      if (what) made.set(attribute, kOfDescriptor, what);
    made.set(kPointwiseAlpha1, kOfFloat, 1.0f);
    made.set(kPointwiseAlpha2, kOfFloat, 1.0f);
    made.finalize();
    return y;
  }

  void* reduce(int mode, void* x) {
    Descriptor& how = held_.emplace_back(kReduction);
    how.set(kReductionType, kOfDataType, kFloat);
    how.set(kReductionMode, kOfReduction, mode);
    how.finalize();
    void* const y = between(kFloat, true);
    Descriptor& made = operation(kReductionOperation, kReductionDescriptor, how);
    made.set(kReductionX, kOfDescriptor, x);
    made.set(kReductionY, kOfDescriptor, y);
    made.finalize();
    return y;
  }

  // Scores of keys that a query does not see become -infinity. `more`: keys than queries; null: none.
  void* keep_causal(void* scores, void* more, void* nothing) {
    void* row = pointwise(kIndex, kFloat, between(kInt32), scores, nullptr, nullptr, 2);
    void* const column = pointwise(kIndex, kFloat, between(kInt32), scores, nullptr, nullptr, 3);
    if (more) row = pointwise(kAdd, kInt32, between(kInt32), row, more);
    void* const counts = pointwise(kGreaterEqual, kBoolean, between(kBoolean), row, column);
    return pointwise(kSelect, kFloat, between(kFloat), scores, nothing, counts);
  }
  void* softmax(void* scores) {
    void* const largest = reduce(kReduceMax, scores);
    void* const less = pointwise(kSub, kFloat, between(kFloat), scores, largest);
    void* const weights = pointwise(kExp, kFloat, between(kFloat), less);
    void* const sum = reduce(kReduceAdd, weights);
    // The logarithm of the sum is for training, and part of the pattern that cuDNN knows.
    void* const logarithm = pointwise(kLog, kFloat, between(kFloat, true), sum);
    pointwise(kAdd, kFloat, between(kFloat, true), largest, logarithm);
    return pointwise(kDiv, kFloat, between(type_), weights, sum);
  }

  Descriptor finished(Handle handle) {
    Descriptor made(kOperationGraph);
    made.set(kGraphOperations, kOfDescriptor, static_cast<int64_t>(operations_.size()), operations_.data());
    if (handle) made.set(kGraphHandle, kOfHandle, handle);
    made.finalize();
    return made;
  }

 private:
  void* tensor(Id id, DataType type, const Sizes& sizes, const Sizes& strides, bool is_virtual, bool by_value) {
    Descriptor& made = held_.emplace_back(kTensor);
    made.set(kTensorType, kOfDataType, type);
    made.set(kTensorSizes, kOfInt64, 4, sizes.data());
    made.set(kTensorStrides, kOfInt64, 4, strides.data());
    made.set(kTensorId, kOfInt64, int64_t{id});
    made.set(kTensorAlignment, kOfInt64, int64_t{16});
    if (is_virtual) made.set(kTensorVirtual, kOfBoolean, true);
    if (by_value) made.set(kTensorByValue, kOfBoolean, true);
    made.finalize();
    return made.get();
  }
  Descriptor& operation(int type, int attribute, const Descriptor& how) {
    Descriptor& made = held_.emplace_back(type);
    made.set(attribute, kOfDescriptor, how.get());
    operations_.push_back(made.get());
    return made;
  }

  Sizes scores_;
  DataType type_;
  int64_t next_ = kOwn;
  std::deque<Descriptor> held_;  // references to them stay good
  std::vector<void*> operations_;
};

// The call's queries that see all keys need no mask: a single one does.
bool masks_causally(const CudaAttention& a) { return a.causal && a.queries > 1; }

// softmax(scale Q K^T) V.
Graph graph_of(const CudaAttention& a, DataType type) {
  Graph g({a.batch, a.heads, a.queries, a.keys}, type);
  const auto rows = [&](Id id, const CudaGrid& t, int64_t heads, int64_t length) {
    return g.given(id, type, {a.batch, heads, length, a.head_size}, {t.batch_stride, a.head_size, t.row_stride, 1});
  };
  void* const key = g.given(kKey, type, {a.batch, a.kv_heads, a.head_size, a.keys},  // transposed
                            {a.key.batch_stride, a.head_size, 1, a.key.row_stride});
  void* scores = g.between(kFloat);
  g.multiply(rows(kQuery, a.query, a.heads, a.queries), key, scores);
  scores = g.pointwise(kMul, kFloat, g.between(kFloat), scores, g.number(kScale, kFloat));
  if (masks_causally(a)) {
    void* const more = a.keys > a.queries ? g.number(kKeysMore, kInt32) : nullptr;
    scores = g.keep_causal(scores, more, g.number(kNothing, kFloat));
  }
  g.multiply(g.softmax(scores), rows(kValue, a.value, a.kv_heads, a.keys), rows(kOut, a.out, a.heads, a.queries));
  return g;
}

// Engines for a graph, the best first by cuDNN's reckoning.
std::vector<Descriptor> engines_of(const Descriptor& graph) {
  constexpr int kMost = 8;
  Descriptor asked(kHeuristic);
  asked.set(kHeuristicGraph, kOfDescriptor, graph.get());
  asked.set(kHeuristicMode, kOfHeuristic, int{kModeA});
  asked.finalize();
  std::vector<Descriptor> engines;
  std::array<void*, kMost> pointers;
  for (void*& pointer : pointers) pointer = engines.emplace_back(kEngineConfig).get();
  int64_t count = 0;
  check(library().get(asked.get(), kHeuristicResults, kOfDescriptor, kMost, &count, pointers.data()));
  while (static_cast<int64_t>(engines.size()) > count) engines.pop_back();
  return engines;
}

// Calls of a device take turns: a handle has one stream at a time.
struct Device {
  Handle handle = nullptr;
  std::mutex mutex;
};

struct Plan {
  Device* device;
  Descriptor descriptor;
  int64_t workspace = 0;
};

// All that a plan depends on.
using Key = std::array<int64_t, 16>;

Key key_of(const CudaAttention& a, int dtype, int device) {
  return {device, dtype | (masks_causally(a) ? 8 : 0), a.batch, a.queries, a.keys, a.heads,
          a.kv_heads, a.head_size, a.query.batch_stride, a.query.row_stride, a.key.batch_stride, a.key.row_stride,
          a.value.batch_stride, a.value.row_stride, a.out.batch_stride, a.out.row_stride};
}

Device& device_of(int index) {
  static std::mutex mutex;
  static std::map<int, Device> devices;  // for as long as the process lives
  const std::lock_guard<std::mutex> lock(mutex);
  Device& device = devices[index];
  if (!device.handle && library().create(&device.handle) != 0) device.handle = nullptr;
  return device;
}

// Null: cuDNN has none.
std::unique_ptr<const Plan> built(const CudaAttention& a, int dtype, int index) {
  Device& device = device_of(index);
  if (!device.handle) return nullptr;
  const std::lock_guard<std::mutex> lock(device.mutex);
  try {
    Graph parts = graph_of(a, dtype == KPDEPLOY_BF16 ? kBFloat16 : kHalf);
    const Descriptor graph = parts.finished(device.handle);
    for (const Descriptor& engine : engines_of(graph)) {
      try {
        auto plan = std::make_unique<Plan>(Plan{&device, Descriptor(kPlan)});
        plan->descriptor.set(kPlanHandle, kOfHandle, device.handle);
        plan->descriptor.set(kPlanConfig, kOfDescriptor, engine.get());
        plan->descriptor.finalize();
        int64_t count = 0;
        check(library().get(plan->descriptor.get(), kPlanWorkspace, kOfInt64, 1, &count, &plan->workspace));
        return plan;
      } catch (const Refused&) {  // the next engine may take it
      }
    }
  } catch (const Refused&) {
  }
  return nullptr;
}

// With lengths cuDNN multiplies values beyond them by 0, and NaN there comes out (seen in 9.19): such calls are ours, as
// are causal ones of more queries than keys, some of which see none.
bool can_be_asked(const CudaAttention& a, int dtype) {
  const auto fits = [&](const CudaGrid& g) {
    return reinterpret_cast<uintptr_t>(g.data) % 16 == 0 && g.row_stride > 0 && g.row_stride % 8 == 0 &&
           (a.batch == 1 || (g.batch_stride > 0 && g.batch_stride % 8 == 0));
  };
  return (dtype == KPDEPLOY_BF16 || dtype == KPDEPLOY_F16) && a.head_size % 8 == 0 && !a.lengths && !a.offsets &&
         a.keys > 0 && (!masks_causally(a) || a.queries <= a.keys) && fits(a.query) && fits(a.key) && fits(a.value) && fits(a.out);
}

}  // namespace

CudnnAttention cudnn_attention_plan(const CudaAttention& a, int dtype, int device, bool may_build) {
  if (!can_be_asked(a, dtype) || !library().there) return {};
  static std::mutex mutex;
  static std::map<Key, std::unique_ptr<const Plan>> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key = key_of(a, dtype, device);
  auto known = plans.find(key);
  if (known == plans.end()) {
    if (!may_build) return {};
    known = plans.emplace(key, built(a, dtype, device)).first;
  }
  const Plan* const plan = known->second.get();
  return plan ? CudnnAttention{plan, plan->workspace} : CudnnAttention{};
}

void cudnn_attend(const CudnnAttention& chosen, const CudaAttention& a, void* workspace, void* stream) {
  const Plan& plan = *static_cast<const Plan*>(chosen.plan);
  float scale = a.scale;
  // Before 9.10 the kernels want the lowest number for nothing (cudnn-frontend).
  float nothing = library().version() < 91000 ? std::numeric_limits<float>::lowest() : -INFINITY;
  int32_t more = static_cast<int32_t>(a.keys - a.queries);
  std::vector<int64_t> ids = {kQuery, kKey, kValue, kOut, kScale};
  std::vector<const void*> pointers = {a.query.data, a.key.data, a.value.data, a.out.data, &scale};
  const auto add = [&](Id id, const void* pointer) {
    ids.push_back(id);
    pointers.push_back(pointer);
  };
  if (masks_causally(a)) add(kNothing, &nothing);
  if (masks_causally(a) && more) add(kKeysMore, &more);
  try {
    Descriptor pack(kVariantPack);
    pack.set(kPackIds, kOfInt64, static_cast<int64_t>(ids.size()), ids.data());
    pack.set(kPackPointers, kOfPointer, static_cast<int64_t>(pointers.size()), pointers.data());
    pack.set(kPackWorkspace, kOfPointer, workspace);
    pack.finalize();
    const std::lock_guard<std::mutex> lock(plan.device->mutex);
    check(library().set_stream(plan.device->handle, stream));
    check(library().execute(plan.device->handle, plan.descriptor.get(), pack.get()));
  } catch (const Refused& refused) {
    throw Refusal{KPDEPLOY_DEVICE_ERROR, "cuDNN: status " + std::to_string(refused.status) + " for attention"};
  }
}

}  // namespace kpdeploy
