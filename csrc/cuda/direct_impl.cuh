// The body of each direct instantiation file: the three kernels of one dtype.
#pragma once

#include "direct.cuh"

#define D3NET_DIRECT_KERNELS(T, NAME)                                                        \
  extern "C" __global__ void __launch_bounds__(d3net::cuda::kDirectThreads, 2)               \
      direct_forward_##NAME(const __grid_constant__ d3net::cuda::Convolve p) {               \
    d3net::cuda::direct::forward<T>(p);                                                      \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(d3net::cuda::kDirectThreads, 2)               \
      direct_backward_data_##NAME(const __grid_constant__ d3net::cuda::Convolve p) {         \
    d3net::cuda::direct::backward_data<T>(p);                                                \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(d3net::cuda::kDirectThreads, 2)               \
      direct_backward_weight_##NAME(const __grid_constant__ d3net::cuda::WeightGradient p) { \
    d3net::cuda::direct::backward_weight<T>(p);                                              \
  }
