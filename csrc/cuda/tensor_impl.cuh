// The body of each tensor-core instantiation file: the kernels of one tile and dtype.
#pragma once

#include "tensor.cuh"

/// Dynamic shared memory has one name in a translation unit.
extern __shared__ __align__(128) unsigned char d3net_shared[];

#define D3NET_TENSOR_KERNEL(NAME, FUNCTION, ...)                                 \
  extern "C" __global__ void __launch_bounds__(d3net::cuda::tensor::kThreads, 2) \
      NAME(const __grid_constant__ d3net::cuda::TensorConvolve p) {              \
    d3net::cuda::tensor::FUNCTION<d3net::cuda::__VA_ARGS__>(p, d3net_shared);    \
  }

#define D3NET_TENSOR_KERNELS(TILES, ROWS, T)                                                     \
  D3NET_TENSOR_KERNEL(tensor_forward_##TILES##x##ROWS##_##T, forward, T, TILES, ROWS, false)     \
  D3NET_TENSOR_KERNEL(tensor_forward_relu_##TILES##x##ROWS##_##T, forward, T, TILES, ROWS, true) \
  D3NET_TENSOR_KERNEL(tensor_backward_data_##TILES##x##ROWS##_##T, backward_data, T, TILES, ROWS)
