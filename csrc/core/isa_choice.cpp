// Which instruction set runs: the best that this CPU has, unless another one was asked for.

#include <atomic>
#include <cstring>

#include "isa.h"
#include "kpdeploy.h"

namespace kpdeploy {

#if defined(__x86_64__)
namespace avx512 { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
#endif
namespace baseline { extern const Kernels table; }

namespace {

bool has(const char* name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!std::strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!std::strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(name, "baseline");
}

const Kernels* const kTables[] = {
#if defined(__x86_64__)
    &avx512::table, &avx2::table,
#endif
    &baseline::table,
};

const Kernels* best() {
  for (const Kernels* table : kTables)
    if (has(table->name)) return table;
  return &baseline::table;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{best()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

}  // namespace kpdeploy

extern "C" const char* kpdeploy_isa(void) { return kpdeploy::kernels().name; }

extern "C" int kpdeploy_use_isa(const char* name) {
  for (const kpdeploy::Kernels* table : kpdeploy::kTables)
    if (name && !std::strcmp(table->name, name) && kpdeploy::has(name)) {
      kpdeploy::chosen() = table;
      return KPDEPLOY_OK;
    }
  return KPDEPLOY_UNSUPPORTED;
}
