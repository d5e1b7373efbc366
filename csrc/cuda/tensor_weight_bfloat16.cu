#include "tensor_weight_impl.cuh"

D3NET_TENSOR_WEIGHT_KERNEL(tensor_weight_bfloat16, d3net::cuda::bfloat16, false)
D3NET_TENSOR_WEIGHT_KERNEL(tensor_weight_relu_bfloat16, d3net::cuda::bfloat16, true)
