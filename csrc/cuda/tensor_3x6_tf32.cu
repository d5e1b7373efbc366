#include "tensor_impl.cuh"

D3NET_TENSOR_KERNELS(3, 6, tf32)
