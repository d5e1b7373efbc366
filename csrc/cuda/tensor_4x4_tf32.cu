#include "tensor_impl.cuh"

D3NET_TENSOR_KERNELS(4, 4, tf32)
