#include "tensor_impl.cuh"

D3NET_TENSOR_KERNELS(1, 8, tf32)
