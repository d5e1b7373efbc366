// The multidilated convolution as plain structs, shared by every backend.
//
//   y[n, k] = bias[k] + sum_i correlate(psi(x_i)[n], W[k, channels of i]; dilation d_i)
//
// with "same" zero padding applied after psi(x) = relu(x * scale + shift).
// (Takahashi & Mitsufuji, CVPR 2021, eq. 2.)
#pragma once

#include <cstdint>

namespace d3net {

enum class DType { float32, float64, bfloat16, float16 };

/// What torch's float32 precision switch allows. "high" lets TF32 stand in for float32 in products,
/// "medium" bfloat16 too.
enum class Precision : int { highest = 0, high = 1, medium = 2 };

/// A 4-d tensor of any layout; strides count elements.
struct View {
  void* data = nullptr;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

/// One skip connection: its tensor, its channels and its dilation.
struct Source {
  View x;
  int64_t channels = 0;
  int64_t dilation_h = 1, dilation_w = 1;
};

/// (K, sum C_i, kh, kw) with any strides.
struct Weight {
  const void* data = nullptr;
  int64_t stride_k = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

/// psi over the concatenated channels. Null scale and shift: no affine part.
/// The arrays hold the accumulation type (double for float64, else float).
struct Psi {
  const void* scale = nullptr;
  const void* shift = nullptr;
  bool relu = false;
};

/// What the forward pass and both backward passes have in common.
struct Problem {
  DType dtype = DType::float32;
  int64_t batch = 0, height = 0, width = 0;
  int64_t out_channels = 0, in_channels = 0;  // K and sum C_i
  int64_t kernel_h = 1, kernel_w = 1;
  const Source* sources = nullptr;
  int64_t num_sources = 0;
  Weight weight;
  Psi psi;
  Precision precision = Precision::highest;

  int64_t multiplications() const {
    return batch * height * width * kernel_h * kernel_w * out_channels * in_channels;
  }
};

}  // namespace d3net
