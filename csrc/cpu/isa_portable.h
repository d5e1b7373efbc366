// 128-bit vectors of the architecture's baseline: SSE2 on x86-64, NEON on Arm.
#pragma once

#define D3NET_ISA portable
#define D3NET_ISA_NAME "portable"
#define D3NET_VECTOR_BYTES 16
#if defined(__aarch64__)
#define D3NET_VECTOR_REGISTERS 32
#else
#define D3NET_VECTOR_REGISTERS 16
#endif
