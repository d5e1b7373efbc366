// The D2 block for AVX512.
#if defined(__x86_64__)

#include "isa_avx512.h"
// The kernels follow the switch to the instruction set.
#include "d2_block_entry.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__
