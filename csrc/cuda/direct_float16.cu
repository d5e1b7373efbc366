#include "direct_impl.cuh"

D3NET_DIRECT_KERNELS(d3net::cuda::float16, float16)
