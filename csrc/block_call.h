// The arguments of a D2 block's operators: its parameters, and a call with them as a D2Problem.
// Arguments arrive validated by d3net_kernels/checks.py.
#pragma once

#include <vector>

#include "cpu/kernels.h"
#include "cpu_tensors.h"
#include "d2_block.h"

namespace d3net {

/// All but the input and what may change from call to call. Absent vectors are empty ones.
struct BlockParams {
  Tensors weights, biases, norm_weights, norm_biases, running_means, running_variances;
  Ints use_batch;
  double eps;
  bool per_layer, relu;
  int64_t out_layers;
};

/// The same tensor with adjacent channels.
inline Tensor with_adjacent_channels(const Tensor& x) {
  if (x.stride(1) == 1 || x.size(1) == 1) return x;
  Tensor copy = new_output(x, x.size(0), x.size(1), x.size(2), x.size(3), true);
  if (x.numel() > 0)
    cpu::kernels().to_channels_last(dtype_of(x), view_of(x), x.size(0), x.size(1), x.size(2),
                                    x.size(3), copy.data_ptr());
  return copy;
}

/// The block's arguments as a D2Problem, with the memory it points to.
class BlockCall {
 public:
  /// Tensors may be others than at the last call with these parameters: all is looked at anew.
  BlockCall(const Tensors& inputs, const BlockParams& params, int64_t precision, bool forward) {
    const auto& [weights, biases, norm_weights, norm_biases, running_means, running_variances,
                 use_batch, eps, per_layer, relu, out_layers] = params;
    const size_t layers = weights.size();
    STD_TORCH_CHECK(!inputs.empty(), "d2_block: x must come in one part at least");
    STD_TORCH_CHECK(layers > 0 && biases.size() == layers && norm_weights.size() == layers &&
                        norm_biases.size() == layers && running_means.size() == layers &&
                        running_variances.size() == layers && use_batch.size() == layers,
                    "d2_block: there must be one convolution and one norm a layer");
    problem.growth = weights.back().size(0);
    problem.layers = static_cast<int64_t>(layers);
    inputs_.reserve(inputs.size());
    parts_.reserve(inputs.size());
    convs_.reserve(layers);
    norms_.reserve(layers);
    vectors_.reserve(5 * layers);
    const bool any_layout = forward && problem.has_few_channels();
    for (const Tensor& input : inputs) {
      STD_TORCH_CHECK(input.dim() == 4 && input.is_cpu(),
                      "d2_block: x must be (N, C, H, W) on the CPU");
      const Tensor& x = inputs_.emplace_back(any_layout ? input : with_adjacent_channels(input));
      parts_.push_back({view_of(x), x.size(1)});
      problem.in_channels += x.size(1);
      STD_TORCH_CHECK(x.size(0) == inputs[0].size(0) && x.size(2) == inputs[0].size(2) &&
                          x.size(3) == inputs[0].size(3) && dtype_of(x) == dtype_of(inputs[0]),
                      "d2_block: all parts of x must share N, H, W and dtype");
    }
    const Tensor& x = inputs_[0];
    problem.dtype = dtype_of(x);
    problem.weight_dtype = dtype_of(weights[0]);
    problem.batch = x.size(0);
    problem.height = x.size(2);
    problem.width = x.size(3);
    problem.out_layers = out_layers;
    problem.kernel_h = weights[0].size(2);
    problem.kernel_w = weights[0].size(3);
    problem.per_layer = per_layer;
    problem.relu = relu;
    problem.eps = eps;
    problem.precision = static_cast<int>(precision);
    problem.parts = parts_.data();
    problem.num_parts = static_cast<int64_t>(parts_.size());
    STD_TORCH_CHECK(problem.kernel_h % 2 == 1 && problem.kernel_w % 2 == 1 &&
                        problem.kernel_h * problem.kernel_w <= cpu::kMostTaps,
                    "d2_block: kernels must have odd sides and at most 64 taps");
    STD_TORCH_CHECK(
        problem.weight_dtype == problem.dtype ||
            (problem.weight_dtype == DType::float32 && problem.dtype != DType::float64),
        "d2_block: weights must have x's dtype, or float32 next to bfloat16 and float16");
    STD_TORCH_CHECK(out_layers >= 1 && out_layers <= problem.layers,
                    "d2_block: out_layers must lie between 1 and the number of layers");
    for (size_t i = 0; i < layers; ++i) {
      const int64_t source = static_cast<int64_t>(i), channels = problem.channels_of(source);
      const Tensor& w = weights[i];
      STD_TORCH_CHECK(
          w.dim() == 4 && w.size(0) == problem.growth * (problem.layers - source) &&
              w.size(1) == channels && w.size(2) == problem.kernel_h &&
              w.size(3) == problem.kernel_w && w.is_cpu() && dtype_of(w) == problem.weight_dtype,
          "d2_block: a weight must be (k (L - i), C_i, kh, kw) on x's device, all of one dtype");
      convs_.push_back({weight_of(w), vector(biases[i], w.size(0))});
      const int64_t normed = per_layer ? problem.first_channel(source) + channels : channels;
      norms_.push_back({vector(norm_weights[i], normed), vector(norm_biases[i], normed), nullptr,
                        nullptr, use_batch[i] != 0});
      if (!use_batch[i]) {
        norms_.back().mean = vector(running_means[i], normed);
        norms_.back().variance = vector(running_variances[i], normed);
      }
    }
    problem.convs = convs_.data();
    problem.norms = norms_.data();
  }
  BlockCall(const BlockCall&) = delete;
  BlockCall& operator=(const BlockCall&) = delete;

  /// Channels of a pixel of the features that are kept but not returned.
  int64_t pitch() const {
    if (problem.hidden_layers() == 0) return 0;
    const int64_t end = problem.in_row(problem.hidden_layers() + 1);
    return (end + kAlignedChannels - 1) / kAlignedChannels * kAlignedChannels;
  }
  /// Whether a norm takes batch statistics of x_0.
  bool measures_input() const { return problem.per_layer ? measures() : norms_[0].use_batch; }
  /// Whether any does, of any source.
  bool measures() const {
    for (const Norm& norm : norms_)
      if (norm.use_batch) return true;
    return false;
  }
  bool empty() const { return problem.batch * problem.height * problem.width == 0; }

  D2Problem problem;

 private:
  /// Null for an absent vector, which is passed as an empty one.
  const void* vector(const Tensor& t, int64_t size) {
    if (t.numel() == 0) return nullptr;
    vectors_.emplace_back(t, problem.dtype, size);
    return vectors_.back().data();
  }

  Tensors inputs_;
  std::vector<Part> parts_;
  std::vector<SlotConv> convs_;
  std::vector<Norm> norms_;
  std::vector<Coefficients> vectors_;
};

}  // namespace d3net
