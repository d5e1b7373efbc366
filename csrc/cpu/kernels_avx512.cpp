// The kernels of the operators for AVX512.
#if defined(__x86_64__)

#include "isa_avx512.h"
// The kernels follow the switch to the instruction set.
#include "kernels_impl.h"

namespace d3net::cpu {
const Kernels& avx512_kernels() { return avx512::kKernels; }
const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx512::kKernels;
    k.isa = "amx";
    k.amx = true;
    return k;
  }();
  return kernels;
}
}  // namespace d3net::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
