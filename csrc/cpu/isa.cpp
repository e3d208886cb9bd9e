#include "isa.h"

#include <vector>

#include "../tensors.h"

namespace tokenops {
namespace {

bool has(const std::string& name) {
  if (name == "generic") return true;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (name == "avx2") return avx2;
  if (name == "avx512") return avx512;
  if (name == "avx512_bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return false;
}

const std::vector<std::string>& usable() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> found;
#define X(isa) \
  if (has(#isa)) found.push_back(#isa);
    TOKENOPS_ISAS
#undef X
    return found;
  }();
  return names;
}

std::string cpu_isas() {
  std::string joined;
  for (const std::string& name : usable()) joined += (joined.empty() ? "" : ",") + name;
  return joined;
}

}  // namespace

Isa isa_of(const std::string& name) {
  const std::string& wanted = name.empty() ? usable().back() : name;
  for (const std::string& each : usable()) {
    if (each != wanted) continue;
#define X(isa) \
  if (wanted == #isa) return Isa::isa;
    TOKENOPS_ISAS
#undef X
  }
  STD_TORCH_CHECK(false, "isa must be one of ", cpu_isas(), " on this machine, got ", name);
  return Isa::generic;
}

STABLE_TORCH_LIBRARY_IMPL(tokenops, CompositeExplicitAutograd, m) { m.impl("cpu_isas", TORCH_BOX(&cpu_isas)); }

}  // namespace tokenops
