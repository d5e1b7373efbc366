#include "direct_impl.cuh"

D3NET_DIRECT_KERNELS(double, float64)
