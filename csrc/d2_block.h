// A whole D2 block as plain structs: layer l reads psi(x_0), ..., psi(x_{l-1}), source i with
// dilation 2^i, and gives x_l; psi is batch normalisation and ReLU.
// (Takahashi & Mitsufuji, CVPR 2021, eq. 2 and 3.)
#pragma once

#include "multidilated_conv.h"

namespace d3net {

constexpr int64_t kAlignedChannels = 16;  // a cache line of float32
/// Of all layers together, for vectors along channels; d3net_kernels/block_node.py knows it too.
constexpr int64_t kFewestChannels = 8;

/// One batch normalisation; arrays of the accumulation type.
struct Norm {
  const void* weight = nullptr;
  const void* bias = nullptr;
  const void* mean = nullptr;  // running statistics, where use_batch is false
  const void* variance = nullptr;
  bool use_batch = false;
};

/// The convolution of one source for all the layers that read it: a slot of k outputs each.
struct SlotConv {
  Weight weight;               // (k (L - i), C_i, kernel_h, kernel_w)
  const void* bias = nullptr;  // (k (L - i),) of the accumulation type, or null
};

/// Some channels of x_0, which may come in several tensors that follow each other.
struct Part {
  View x;  // channels adjacent, except for the forward pass of few
  int64_t channels = 0;
};

struct D2Problem {
  DType dtype = DType::float32;
  DType weight_dtype = DType::float32;  // dtype, or float32 next to 16 bits
  int64_t batch = 0, height = 0, width = 0;
  int64_t in_channels = 0, growth = 0, layers = 0;
  int64_t out_layers = 0;  // how many of the last layers are the result
  int64_t kernel_h = 3, kernel_w = 3;
  bool per_layer = false;  // a norm for each layer's sources together, instead of one per source
  bool relu = true;
  double eps = 1e-5;
  int precision = 0;           // Precision
  bool weights_recur = false;  // the next calls are expected to have the same weights
  const Part* parts = nullptr;
  int64_t num_parts = 0;
  const SlotConv* convs = nullptr;
  const Norm* norms = nullptr;

  /// x_1 .. x_L side by side: all passes add to channels that end with x_L, so its end is aligned.
  int64_t row() const {
    return (growth * layers + kAlignedChannels - 1) / kAlignedChannels * kAlignedChannels;
  }
  int64_t in_row(int64_t layer) const { return row() - growth * (layers - layer + 1); }
  bool has_few_channels() const { return growth * layers < kFewestChannels; }
  int64_t hidden_layers() const { return layers - out_layers; }
  int64_t multiplications() const {
    const int64_t pairs = growth * (layers - 1) * layers / 2;  // each later source and its layers
    return batch * height * width * kernel_h * kernel_w * growth * (in_channels * layers + pairs);
  }

  /// Channels of the sources x_0 .. x_{L-1} together, which statistics are kept of.
  int64_t source_channels() const { return in_channels + (layers - 1) * growth; }
  int64_t channels_of(int64_t source) const { return source ? growth : in_channels; }
  int64_t first_channel(int64_t source) const {
    return source ? in_channels + (source - 1) * growth : 0;
  }
};

/// The layers that are kept but not returned live in `features`, the others in `out`. Both are
/// (batch, height, width, channels). A pixel of `features` has `pitch` elements, in which the
/// layers lie as in the row x_1 .. x_L that ends on a multiple of kAlignedChannels.
struct D2Features {
  void* features = nullptr;
  int64_t pitch = 0;
  void* out = nullptr;
};

struct D2Gradients {
  View out;           // in; any strides
  void* x = nullptr;  // (batch, height, width, in_channels), or null; likewise below
  void* const* weights = nullptr;
  double* const* biases = nullptr;        // (k (L - i),)
  double* const* norm_weights = nullptr;  // gamma
  double* const* norm_biases = nullptr;   // beta
};

}  // namespace d3net
