#include "tensor_impl.cuh"

D3NET_TENSOR_KERNELS(5, 4, tf32)
