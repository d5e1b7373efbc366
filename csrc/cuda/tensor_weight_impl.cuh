// The body of the instantiation files of the tensor-core weight gradient.
#pragma once

#include "tensor_weight.cuh"

/// Dynamic shared memory has one name in a translation unit.
extern __shared__ __align__(128) unsigned char d3net_shared[];

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define D3NET_TENSOR_BODY(...)  // tensor_refuses in plan.h keeps these kernels from older GPUs
#else
#define D3NET_TENSOR_BODY(...) d3net::cuda::tensor::__VA_ARGS__(p, d3net_shared);
#endif

#define D3NET_TENSOR_WEIGHT_KERNEL(NAME, T, RELU)                                         \
  extern "C" __global__ void __launch_bounds__(d3net::cuda::weight_threads(sizeof(T)), 2) \
      NAME(const __grid_constant__ d3net::cuda::TensorWeightGradient p) {                 \
    D3NET_TENSOR_BODY(backward_weight<T, RELU>)                                           \
  }
