// Chooses the instruction set at run time: one binary serves every CPU.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels.h"

namespace d3net::cpu {
namespace {

/// Whether the CPU multiplies bfloat16 in a matrix unit (AMX) and the system lets this process use
/// it: it keeps the unit's registers only for processes that have asked for them.
bool may_use_amx() {
#if defined(__x86_64__) && defined(__linux__)
  uint32_t a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr uint32_t kTile = 1u << 24, kBfloat16 = 1u << 22;
  if (!(d & kTile) || !(d & kBfloat16) || !__builtin_cpu_supports("avx512bf16")) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels* find(const char* name) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (!name || !std::strcmp(name, "amx")) && may_use_amx()) return &amx_kernels();
  if (avx512 && (!name || !std::strcmp(name, "avx512"))) return &avx512_kernels();
  if (avx2 && (!name || !std::strcmp(name, "avx2"))) return &avx2_kernels();
#endif
  if (!name || !std::strcmp(name, "portable")) return &portable_kernels();
  return nullptr;
}

const Kernels* at_start() {
  const char* name = std::getenv("D3NET_KERNELS_ISA");
  const Kernels* kernels = find(name && *name ? name : nullptr);
  if (!kernels)
    throw std::runtime_error(
        std::string("D3NET_KERNELS_ISA is '") + name +
        "'; accepted are portable, avx2, avx512 and amx where this CPU has them");
  return kernels;
}

std::atomic<const Kernels*>& in_force() {
  static std::atomic<const Kernels*> kernels{at_start()};
  return kernels;
}

}  // namespace

const Kernels& kernels() { return *in_force().load(std::memory_order_relaxed); }

bool force_isa(const char* name) {
  const Kernels* asked = find(name);
  if (asked) in_force().store(asked, std::memory_order_relaxed);
  return asked != nullptr;
}

}  // namespace d3net::cpu
