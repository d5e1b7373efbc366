// Every kernel by name: the one list that the binary, the tests and the resource report share.
#pragma once

// X(name, type of its one parameter)
#define D3NET_CUDA_DIRECT_KERNELS(X, DTYPE) \
  X(direct_forward_##DTYPE, Convolve)       \
  X(direct_backward_data_##DTYPE, Convolve) \
  X(direct_backward_weight_##DTYPE, WeightGradient)

#define D3NET_CUDA_TENSOR_KERNELS_OF(X, TILE, DTYPE)      \
  X(tensor_forward_##TILE##_##DTYPE, TensorConvolve)      \
  X(tensor_forward_relu_##TILE##_##DTYPE, TensorConvolve) \
  X(tensor_backward_data_##TILE##_##DTYPE, TensorConvolve)

// The tiles of kTensorTiles in plan.h.
#define D3NET_CUDA_TENSOR_KERNELS(X, DTYPE)      \
  D3NET_CUDA_TENSOR_KERNELS_OF(X, 1x8, DTYPE)    \
  D3NET_CUDA_TENSOR_KERNELS_OF(X, 2x8, DTYPE)    \
  D3NET_CUDA_TENSOR_KERNELS_OF(X, 3x6, DTYPE)    \
  D3NET_CUDA_TENSOR_KERNELS_OF(X, 4x4, DTYPE)    \
  D3NET_CUDA_TENSOR_KERNELS_OF(X, 5x4, DTYPE)    \
  X(tensor_weight_##DTYPE, TensorWeightGradient) \
  X(tensor_weight_relu_##DTYPE, TensorWeightGradient)

#define D3NET_CUDA_KERNELS(X)              \
  X(upload_table, Upload)                  \
  X(widen_coefficients, Widen)             \
  X(pack_weights, Pack)                    \
  X(pack_weight_chunks, PackChunks)        \
  X(finish_sums, Finish)                   \
  X(finish_channel_moments, FinishMoments) \
  D3NET_CUDA_DIRECT_KERNELS(X, float32)    \
  D3NET_CUDA_DIRECT_KERNELS(X, float64)    \
  D3NET_CUDA_DIRECT_KERNELS(X, bfloat16)   \
  D3NET_CUDA_DIRECT_KERNELS(X, float16)    \
  D3NET_CUDA_TENSOR_KERNELS(X, bfloat16)   \
  D3NET_CUDA_TENSOR_KERNELS(X, float16)    \
  D3NET_CUDA_TENSOR_KERNELS(X, tf32)

namespace d3net::cuda {

/// The kernel's address for the CUDA runtime; null if there is none of that name.
const void* find_kernel(const char* name);

/// The architectures with machine code in this binary, as in "80 90".
const char* built_archs();

}  // namespace d3net::cuda
