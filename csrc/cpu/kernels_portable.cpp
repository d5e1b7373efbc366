// 128-bit vectors of the architecture's baseline: SSE2 on x86-64, NEON on Arm.
//
// Standard headers come first: what they define must not be compiled for this instruction set.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#define D3NET_ISA portable
#define D3NET_ISA_NAME "portable"
#define D3NET_VECTOR_BYTES 16
#if defined(__aarch64__)
#define D3NET_VECTOR_REGISTERS 32
#else
#define D3NET_VECTOR_REGISTERS 16
#endif

#include "kernels_impl.h"

namespace d3net::cpu {
const Kernels& portable_kernels() { return portable::kKernels; }
}  // namespace d3net::cpu
