// The body of each tensor-core instantiation file: the kernels of one tile and dtype.
#pragma once

#include "tensor_epilogue.cuh"

/// Dynamic shared memory has one name in a translation unit.
extern __shared__ __align__(128) unsigned char d3net_shared[];

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define D3NET_TENSOR_BODY(...)  // tensor_refuses in plan.h keeps these kernels from older GPUs
#else
#define D3NET_TENSOR_BODY(...) d3net::cuda::tensor::__VA_ARGS__(p, d3net_shared);
#endif

#define D3NET_TENSOR_ENTRY(NAME)                                                 \
  extern "C" __global__ void __launch_bounds__(d3net::cuda::tensor::kThreads, 2) \
      NAME(const __grid_constant__ d3net::cuda::TensorConvolve p)

#define D3NET_TENSOR_KERNEL(NAME, T, TILES, ROWS, RELU) \
  D3NET_TENSOR_ENTRY(NAME) { D3NET_TENSOR_BODY(forward<T, TILES, ROWS, RELU>) }

#define D3NET_TENSOR_BACKWARD_KERNEL(NAME, T, TILES, ROWS) \
  D3NET_TENSOR_ENTRY(NAME) { D3NET_TENSOR_BODY(backward_data<T, TILES, ROWS>) }

#define D3NET_TENSOR_KERNELS(TILES, ROWS, T)                                                       \
  D3NET_TENSOR_KERNEL(tensor_forward_##TILES##x##ROWS##_##T, d3net::cuda::T, TILES, ROWS, false)   \
  D3NET_TENSOR_KERNEL(tensor_forward_relu_##TILES##x##ROWS##_##T, d3net::cuda::T, TILES, ROWS,     \
                      true)                                                                        \
  D3NET_TENSOR_BACKWARD_KERNEL(tensor_backward_data_##TILES##x##ROWS##_##T, d3net::cuda::T, TILES, \
                               ROWS)
