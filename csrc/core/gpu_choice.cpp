// The rows of kpdeploy/ops/gpu_measured.tsv and attention_measured.tsv, which the build compiles in, so that an artifact's
// library carries them; or those that the process was given since.

#include "gpu_choice.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <vector>

#include "checks.h"

namespace kpdeploy {
namespace {

const char kMeasured[] =
#include "gpu_measured.inc"
    ;

struct Row {
  std::string device;
  bool gated;
  int dtype, activation;
  int64_t rows, k, n;
  Chosen chosen;
};

struct AttentionRow {
  std::string device;
  int dtype;
  int64_t batch, queries, keys, heads, kv_heads, size;
  bool causal, lengths;
  Chosen chosen;
};

struct Tables {
  std::vector<Row> products;
  std::vector<AttentionRow> attentions;
};

int dtype_of(const std::string& name) {
  return name == "float32" ? KPDEPLOY_F32 : name == "bfloat16" ? KPDEPLOY_BF16 : name == "float16" ? KPDEPLOY_F16 : name == "float8_e4m3fn" ? KPDEPLOY_F8 : KPDEPLOY_OTHER;
}

Chosen provider_of(const std::string& name) {
  return name == "cublaslt" ? Chosen::kCublasLt : name == "cudnn" ? Chosen::kCudnn : Chosen::kOwn;
}

// The cells of a row after device, op and dtype, up to the provider.
Row product_of(std::istream& cells, bool gated) {
  std::string activation, provider;
  Row row{};
  cells >> activation >> row.rows >> row.k >> row.n >> provider;
  row.gated = gated;
  row.activation = gated ? static_cast<int>(KPDEPLOY_NONE) : kpdeploy_activation_of(activation.c_str());
  row.chosen = provider_of(provider);
  return row;
}

AttentionRow attention_of(std::istream& cells) {
  std::string causal, provider;
  int64_t mean_length = 0;
  AttentionRow row{};
  cells >> row.batch >> row.queries >> row.keys >> row.heads >> row.kv_heads >> row.size >> causal >> mean_length >> provider;
  row.causal = causal == "yes";
  row.lengths = mean_length > 0;
  row.chosen = provider_of(provider);
  return row;
}

// One row a line, tabs between; the first line of a table names its columns.
Tables parsed(const std::string& text) {
  Tables tables;
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line);
  while (std::getline(lines, line)) {
    if (line.empty() || line.rfind("device\t", 0) == 0) continue;
    std::istringstream cells(line);
    std::string device, op, dtype;
    std::getline(cells, device, '\t');
    cells >> op >> dtype;
    if (op == "attention") {
      AttentionRow& row = tables.attentions.emplace_back(attention_of(cells));
      row.device = device;
      row.dtype = dtype_of(dtype);
    } else {
      Row& row = tables.products.emplace_back(product_of(cells, op == "gated_linear"));
      row.device = device;
      row.dtype = dtype_of(dtype);
    }
    if (!cells) refuse("a row of measured providers cannot be read: %s", line.c_str());
  }
  return tables;
}

constexpr double kNear = 2;  // a number of rows goes where the nearest that was measured does, up to so many times as many

// How many times one is as many as the other.
double times_apart(int64_t a, int64_t b) {
  return static_cast<double>(std::max(a, b)) / std::max<int64_t>(1, std::min(a, b));
}

std::mutex mutex;
std::shared_ptr<const Tables> current;

std::shared_ptr<const Tables> current_tables() {
  const std::lock_guard<std::mutex> lock(mutex);
  if (!current) current = std::make_shared<const Tables>(parsed(kMeasured));
  return current;
}

}  // namespace

Chosen chosen_for(const char* device, const CudaLinear& a, int dtype) {
  const auto tables = current_tables();
  // Half the bits are half the bits: float16 goes where bfloat16 was measured, of whose rows the table has more.
  const auto alike = [&](int other) { return other == dtype || (dtype == KPDEPLOY_F16 && other == KPDEPLOY_BF16); };
  Chosen chosen = Chosen::kUnmeasured;
  double apart = kNear;
  for (const Row& row : tables->products) {
    const double more = times_apart(row.rows, a.rows);
    if (more > apart || (more == apart && chosen != Chosen::kUnmeasured)) continue;
    if (row.n == a.n && row.k == a.k && alike(row.dtype) && row.gated == a.gated &&
        (a.gated || row.activation == a.activation) && row.device == device) {
      chosen = row.chosen;
      apart = more;
    }
  }
  return chosen;
}

Chosen chosen_for(const char* device, const CudaAttention& a, int dtype) {
  if (a.offsets) return Chosen::kUnmeasured;
  const bool causal = a.causal && a.queries > 1, lengths = a.lengths != nullptr;  // a single query sees all keys
  const auto tables = current_tables();
  Chosen chosen = Chosen::kUnmeasured;
  double apart = INFINITY;
  for (const AttentionRow& row : tables->attentions) {
    const bool same = row.dtype == dtype && row.heads == a.heads && row.kv_heads == a.kv_heads &&
                      row.size == a.head_size && row.causal == causal && row.lengths == lengths && row.device == device;
    const double batch = times_apart(row.batch, a.batch), queries = times_apart(row.queries, a.queries),
                 keys = times_apart(row.keys, a.keys), more = batch * queries * keys;
    if (!same || std::max({batch, queries, keys}) > kNear || more >= apart) continue;
    chosen = row.chosen;
    apart = more;
  }
  return chosen;
}

}  // namespace kpdeploy

using namespace kpdeploy;

int kpdeploy_set_gpu_providers(const kpdeploy_context* context, const char* rows) {
  return guarded(context, "set_gpu_providers", [&] {
    auto made = std::make_shared<const Tables>(parsed(rows ? rows : kMeasured));
    const std::lock_guard<std::mutex> lock(mutex);
    current = std::move(made);
  });
}
