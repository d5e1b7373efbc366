// From here on functions are compiled for AVX2; they run only where dispatch.cpp found it.
//
// The standard headers and what all instruction sets share come first: what they define, templates
// included, must not be compiled for this one, since the linker keeps one copy for all.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <immintrin.h>

#include "kernels.h"
#include "packed_cache.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define D3NET_ISA avx2
#define D3NET_ISA_NAME "avx2"
#define D3NET_VECTOR_BYTES 32
#define D3NET_VECTOR_REGISTERS 16
