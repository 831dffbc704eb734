// The rows of kpdeploy/ops/gpu_measured.tsv, which the build compiles in, so that an artifact's library carries them; or
// those that the process was given since.

#include "gpu_choice.h"

#include <algorithm>
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

int dtype_of(const std::string& name) {
  return name == "float32" ? KPDEPLOY_F32 : name == "bfloat16" ? KPDEPLOY_BF16 : name == "float16" ? KPDEPLOY_F16 : name == "float8_e4m3fn" ? KPDEPLOY_F8 : KPDEPLOY_OTHER;
}

// One row a line, tabs between; the first line names the columns, of which the first eight are read.
std::vector<Row> parsed(const std::string& text) {
  std::vector<Row> rows;
  std::istringstream lines(text);
  std::string line;
  std::getline(lines, line);
  while (std::getline(lines, line)) {
    std::istringstream cells(line);
    std::string device, op, dtype, activation, provider;
    Row row{};
    std::getline(cells, device, '\t');
    cells >> op >> dtype >> activation >> row.rows >> row.k >> row.n >> provider;
    if (!cells) refuse("a row of measured providers cannot be read: %s", line.c_str());
    row.device = device;
    row.gated = op == "gated_linear";
    row.dtype = dtype_of(dtype);
    row.activation = row.gated ? static_cast<int>(KPDEPLOY_NONE) : kpdeploy_activation_of(activation.c_str());
    row.chosen = provider == "cublaslt" ? Chosen::kCublasLt : Chosen::kOwn;
    rows.push_back(row);
  }
  return rows;
}

constexpr double kNear = 2;  // a number of rows goes where the nearest that was measured does, up to so many times as many

std::mutex mutex;
std::shared_ptr<const std::vector<Row>> current;

}  // namespace

Chosen chosen_for(const char* device, const CudaLinear& a, int dtype) {
  std::shared_ptr<const std::vector<Row>> rows;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!current) current = std::make_shared<const std::vector<Row>>(parsed(kMeasured));
    rows = current;
  }
  Chosen chosen = Chosen::kUnmeasured;
  double apart = kNear;
  for (const Row& row : *rows) {
    const double more = static_cast<double>(std::max(row.rows, a.rows)) / std::max<int64_t>(1, std::min(row.rows, a.rows));
    if (more > apart || (more == apart && chosen != Chosen::kUnmeasured)) continue;
    if (row.n == a.n && row.k == a.k && row.dtype == dtype && row.gated == a.gated &&
        (a.gated || row.activation == a.activation) && row.device == device) {
      chosen = row.chosen;
      apart = more;
    }
  }
  return chosen;
}

}  // namespace kpdeploy

using namespace kpdeploy;

int kpdeploy_set_gpu_providers(const kpdeploy_context* context, const char* rows) {
  return guarded(context, "set_gpu_providers", [&] {
    auto made = std::make_shared<const std::vector<Row>>(parsed(rows ? rows : kMeasured));
    const std::lock_guard<std::mutex> lock(mutex);
    current = std::move(made);
  });
}
