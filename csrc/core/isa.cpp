#include "isa.h"

#include <cstdlib>
#include <string>

#include "check.h"

namespace vtok {

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kBaseline: return "baseline";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
  }
  return "unknown";
}

static Isa best_isa() {
#if defined(VTOK_HAVE_X86_ISA)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

static Isa choose_isa() {
  const Isa best = best_isa();
  const char* wanted = std::getenv("VTOK_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(wanted) == name_of(isa) && isa <= best) return isa;
  }
  throw std::invalid_argument(
      join_message("VTOK_CPU_ISA must be baseline, avx2 or avx512, at most ", name_of(best),
                   " on this machine, got ", wanted));
}

Isa cpu_isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

}  // namespace vtok
