#include "cpu/isa.h"

#if defined(CNN_EXT_HAS_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>

namespace cnn_ext::cpu {
namespace {

constexpr Isa kAllIsas[] = {Isa::baseline, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

bool processor_has(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (isa) {
    case Isa::baseline:
      return true;
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::avx512:
      return processor_has(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_bf16:
      return processor_has(Isa::avx512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

Isa detect() {
  Isa best = Isa::baseline;
  for (Isa isa : kAllIsas) {
    if (processor_has(isa)) best = isa;
  }
  const char* wanted = std::getenv("CNN_EXT_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  std::string names;
  for (Isa isa : kAllIsas) {
    if (!processor_has(isa)) continue;
    if (wanted == std::string(isa_name(isa))) return isa;
    names += names.empty() ? isa_name(isa) : std::string(", ") + isa_name(isa);
  }
  throw std::invalid_argument("CNN_EXT_ISA is \"" + std::string(wanted) + "\"; this machine has: " + names);
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::baseline:
      return "baseline";
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    case Isa::avx512_bf16:
      return "avx512_bf16";
  }
  return "?";
}

// The system grants a process the unit's registers when it asks for them.
bool has_matrix_unit() {
#if defined(CNN_EXT_HAS_AMX)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool has = processor_has(Isa::avx512_bf16) && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                          syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return has;
#else
  return false;
#endif
}

bool has_fast_dot_products() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return __builtin_cpu_is("amd") && processor_has(Isa::avx512_bf16);
#else
  return false;
#endif
}

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

}  // namespace cnn_ext::cpu
