// The kernels of the operators for AVX2.
#if defined(__x86_64__)

#include "isa_avx2.h"
// The kernels follow the switch to the instruction set.
#include "kernels_impl.h"

namespace d3net::cpu {
const Kernels& avx2_kernels() { return avx2::kKernels; }
}  // namespace d3net::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
