// The CUDA C++ that csrc/cuda uses, for the host compiler: included before everything else.
#pragma once

#include <vector_functions.h>
#include <vector_types.h>

#include "runtime.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __grid_constant__
#undef __launch_bounds__
#undef __forceinline__
#undef __align__
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ static  // one block at a time

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define threadIdx (gpu::machine.self->thread)
#define blockIdx (gpu::machine.block)
#define blockDim (gpu::machine.block_size)
#define gridDim (gpu::machine.grid_size)

using std::max;
using std::min;

inline void __syncthreads() { gpu::barrier(); }

inline void __syncwarp(unsigned mask = 0xffffffff) {
  gpu::meet(mask, nullptr, true, [](gpu::Fiber*, unsigned) {});
}

template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int step, int = 32) {
  struct Exchange {
    T value, result;
    int from;
  } mine{value, value, static_cast<int>(gpu::machine.self->lane) ^ step};
  gpu::meet(mask, &mine, false, [](gpu::Fiber* lanes, unsigned members) {
    for (int lane = 0; lane < 32; ++lane) {
      if (!(members >> lane & 1)) continue;
      auto* own = static_cast<Exchange*>(lanes[lane].argument);
      if (!(members >> own->from & 1)) gpu::die("a shuffle reads a lane outside the mask");
      own->result = static_cast<Exchange*>(lanes[own->from].argument)->value;
    }
  });
  return mine.result;
}

template <class T>
inline T __ldg(const T* from) {
  return *from;
}

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
