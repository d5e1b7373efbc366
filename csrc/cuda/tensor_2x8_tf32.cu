#include "tensor_impl.cuh"

D3NET_TENSOR_KERNELS(2, 8, tf32)
