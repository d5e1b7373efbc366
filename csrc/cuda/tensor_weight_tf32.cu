#include "tensor_weight_impl.cuh"

D3NET_TENSOR_WEIGHT_KERNEL(tensor_weight_tf32, d3net::cuda::tf32, false)
D3NET_TENSOR_WEIGHT_KERNEL(tensor_weight_relu_tf32, d3net::cuda::tf32, true)
