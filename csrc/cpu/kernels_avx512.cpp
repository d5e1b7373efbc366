// The kernels compiled for AVX512; run only where dispatch.cpp found it.
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
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define D3NET_ISA avx512
#define D3NET_ISA_NAME "avx512"
#define D3NET_VECTOR_BYTES 64
#define D3NET_VECTOR_REGISTERS 32

#include "kernels_impl.h"

namespace d3net::cpu {
const Kernels& avx512_kernels() { return avx512::kKernels; }
}  // namespace d3net::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
