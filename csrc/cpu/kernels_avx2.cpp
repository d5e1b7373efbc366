// The kernels compiled for AVX2; run only where dispatch.cpp found it.
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

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define D3NET_ISA avx2
#define D3NET_ISA_NAME "avx2"
#define D3NET_VECTOR_BYTES 32
#define D3NET_VECTOR_REGISTERS 16

#include "kernels_impl.h"

namespace d3net::cpu {
const Kernels& avx2_kernels() { return avx2::kKernels; }
}  // namespace d3net::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
