// The body of each tensor-core instantiation file: the kernels of one tile.
#pragma once

#include "tensor.cuh"

/// Dynamic shared memory has one name in a translation unit.
extern __shared__ __align__(128) unsigned char d3net_shared[];

#define D3NET_TENSOR_KERNEL(NAME, T, TILES, ROWS, RELU)                          \
  extern "C" __global__ void __launch_bounds__(d3net::cuda::tensor::kThreads, 2) \
      NAME(const __grid_constant__ d3net::cuda::TensorConvolve p) {              \
    d3net::cuda::tensor::forward<T, TILES, ROWS, RELU>(p, d3net_shared);         \
  }

#define D3NET_TENSOR_KERNELS_OF(T, NAME, TILES, ROWS)                                  \
  D3NET_TENSOR_KERNEL(tensor_forward_##TILES##x##ROWS##_##NAME, T, TILES, ROWS, false) \
  D3NET_TENSOR_KERNEL(tensor_forward_relu_##TILES##x##ROWS##_##NAME, T, TILES, ROWS, true)

#define D3NET_TENSOR_KERNELS(TILES, ROWS)                               \
  D3NET_TENSOR_KERNELS_OF(d3net::cuda::bfloat16, bfloat16, TILES, ROWS) \
  D3NET_TENSOR_KERNELS_OF(d3net::cuda::float16, float16, TILES, ROWS)
