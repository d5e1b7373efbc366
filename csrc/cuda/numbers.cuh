// The four dtypes on the device: conversion to the accumulation type and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../multidilated_conv.h"

namespace d3net::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;
using tf32 = float;  // in the names of kernels whose products round float32 to TF32

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float widen(float v) { return v; }
__device__ inline double widen(double v) { return v; }
__device__ inline float widen(bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(float16 v) { return __half2float(v); }

template <class T>
__device__ inline T narrow(Accumulator<T> v) {
  if constexpr (sizeof(T) != 2)
    return v;
  else if constexpr (__is_same(T, bfloat16))
    return __float2bfloat16_rn(v);
  else
    return __float2half_rn(v);
}

/// Element `i` of an array whose dtype only the host knew.
__device__ inline double load_as(DType dtype, const void* from, int64_t i) {
  switch (dtype) {
    case DType::float32: return static_cast<const float*>(from)[i];
    case DType::float64: return static_cast<const double*>(from)[i];
    case DType::bfloat16: return widen(static_cast<const bfloat16*>(from)[i]);
    case DType::float16: return widen(static_cast<const float16*>(from)[i]);
  }
  return 0;
}

__device__ inline void store_as(DType dtype, void* to, int64_t i, double v) {
  switch (dtype) {
    case DType::float32: static_cast<float*>(to)[i] = static_cast<float>(v); break;
    case DType::float64: static_cast<double*>(to)[i] = v; break;
    case DType::bfloat16:
      static_cast<bfloat16*>(to)[i] = __float2bfloat16_rn(static_cast<float>(v));
      break;
    case DType::float16:
      static_cast<float16*>(to)[i] = __float2half_rn(static_cast<float>(v));
      break;
  }
}

/// psi of the paper without the padding: relu(x * scale + shift); NaN passes the ReLU.
template <class A>
__device__ inline A psi(A x, const A* scale, const A* shift, int64_t channel, bool relu) {
  if (scale) x = fma(x, scale[channel], shift[channel]);
  return relu && x < 0 ? A{0} : x;
}

/// The sum over the 32 lanes of a warp, in one fixed order, in every lane.
template <class A>
__device__ inline A warp_sum(A v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

}  // namespace d3net::cuda
