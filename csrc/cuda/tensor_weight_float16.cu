#include "tensor_weight_impl.cuh"

D3NET_TENSOR_WEIGHT_KERNEL(tensor_weight_float16, d3net::cuda::float16, false)
D3NET_TENSOR_WEIGHT_KERNEL(tensor_weight_relu_float16, d3net::cuda::float16, true)
