// The CPU implementation of the D2 block's two operators: unpacks tensors into the plain problem,
// allocates results, calls the kernels. Arguments arrive validated by d3net_kernels/checks.py.
#include <tuple>

#include "cpu/kernels.h"
#include "cpu/packed_cache.h"
#include "cpu_tensors.h"
#include "d2_block.h"

namespace d3net {
namespace {

/// The same tensor with adjacent channels.
Tensor with_adjacent_channels(const Tensor& x) {
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
  BlockCall(const Tensors& inputs, const Tensors& weights, const Tensors& biases,
            const Tensors& norm_weights, const Tensors& norm_biases, const Tensors& running_means,
            const Tensors& running_variances, const Ints& use_batch, double eps, bool per_layer,
            bool relu, int64_t out_layers, int64_t precision, bool forward) {
    const size_t layers = weights.size();
    STD_TORCH_CHECK(!inputs.empty(), "d2_block: x must come in one part at least");
    STD_TORCH_CHECK(layers > 0 && biases.size() == layers && norm_weights.size() == layers &&
                        norm_biases.size() == layers && running_means.size() == layers &&
                        running_variances.size() == layers && use_batch.size() == layers,
                    "d2_block: there must be one convolution and one norm a layer");
    problem.growth = weights.back().size(0);
    problem.layers = static_cast<int64_t>(layers);
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

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensors parts, Tensors weights, Tensors biases,
                                                   Tensors norm_weights, Tensors norm_biases,
                                                   Tensors running_means, Tensors running_variances,
                                                   Ints use_batch, double eps, bool per_layer,
                                                   bool relu, int64_t out_layers, int64_t precision,
                                                   bool keep) {
  BlockCall call(parts, weights, biases, norm_weights, norm_biases, running_means,
                 running_variances, use_batch, eps, per_layer, relu, out_layers, precision, true);
  call.problem.weights_recur = !keep;  // who goes backward has others soon
  const Tensor& x = parts[0];
  const D2Problem& p = call.problem;
  const ScalarType kept = statistics_type(p.dtype);
  Tensor out = new_output(x, p.batch, p.growth * p.out_layers, p.height, p.width, true);
  Tensor features =
      torch::stable::new_empty(x, Ints{p.batch, p.height, p.width, keep ? call.pitch() : 0});
  advise_large_pages(features);
  static thread_local cpu::Scratch memory;
  const int64_t hidden = keep ? 0 : p.batch * p.height * p.width * call.pitch();
  const cpu::Borrowed<char> temporary(memory, hidden * x.element_size());
  const Ints measured{call.measures() ? p.source_channels() : 0};
  Tensor mean = torch::stable::new_zeros(x, measured, kept);
  Tensor variance = torch::stable::new_zeros(x, measured, kept);
  if (!call.empty()) {
    if (call.measures_input()) {
      std::vector<double> moments(static_cast<size_t>(2 * p.in_channels));
      double* next = moments.data();
      for (const Part* part = p.parts; part < p.parts + p.num_parts; ++part) {
        cpu::kernels().moments(p.dtype, part->x, p.batch, part->channels, p.height, p.width, next);
        next += 2 * part->channels;
      }
      assign(torch::stable::narrow(mean, 0, 0, p.in_channels), moments.data(), 2);
      assign(torch::stable::narrow(variance, 0, 0, p.in_channels), moments.data() + 1, 2);
    }
    void* data = keep ? features.data_ptr() : temporary.get();
    cpu::kernels().d2_forward(p, {data, call.pitch(), out.data_ptr()}, mean.data_ptr(),
                              variance.data_ptr());
  }
  return {std::move(out), std::move(features), std::move(mean), std::move(variance)};
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors> backward(
    Tensor grad_out, Tensors parts, Tensor out, Tensor features, Tensor mean, Tensor variance,
    Tensors weights, Tensors biases, Tensors norm_weights, Tensors norm_biases,
    Tensors running_means, Tensors running_variances, Ints use_batch, double eps, bool per_layer,
    bool relu, int64_t out_layers, int64_t precision, Ints wanted) {
  const BlockCall call(parts, weights, biases, norm_weights, norm_biases, running_means,
                       running_variances, use_batch, eps, per_layer, relu, out_layers, precision,
                       false);
  const Tensor& x = parts[0];
  const D2Problem& p = call.problem;
  const size_t layers = weights.size();
  STD_TORCH_CHECK(wanted.size() == 1 + 4 * layers && grad_out.dim() == 4 && grad_out.is_cpu() &&
                      dtype_of(grad_out) == p.dtype && grad_out.size(0) == p.batch &&
                      grad_out.size(1) == p.growth * p.out_layers && grad_out.size(2) == p.height &&
                      grad_out.size(3) == p.width,
                  "d2_block: the output's gradient must match the output");
  const bool empty = call.empty();
  auto gradient = [&](const Tensor& t, bool is_wanted) {
    if (!is_wanted) return torch::stable::new_empty(t, Ints{0});
    Ints size;
    for (int64_t d = 0; d < t.dim(); ++d) size.push_back(t.size(d));
    return empty ? torch::stable::new_zeros(t, size) : torch::stable::new_empty(t, size);
  };
  auto wants = [&](size_t kind, size_t i) { return wanted[1 + kind * layers + i] != 0; };

  Tensor grad_x = wanted[0] ? new_output(x, p.batch, p.in_channels, p.height, p.width, true)
                            : torch::stable::new_empty(x, Ints{0});
  std::array<Tensors, 4> grads;  // of weights, biases, norms' weights and biases
  std::vector<void*> weight_data;
  std::array<std::vector<std::vector<double>>, 3> vectors;
  std::array<std::vector<double*>, 3> vector_data;
  const std::array<const Tensors*, 4> like{&weights, &biases, &norm_weights, &norm_biases};
  for (size_t kind = 0; kind < 4; ++kind)
    for (size_t i = 0; i < layers; ++i) {
      const Tensor& t = (*like[kind])[i];
      grads[kind].push_back(gradient(t, wants(kind, i)));
      if (kind == 0) {
        weight_data.push_back(wants(kind, i) ? grads[kind][i].data_ptr() : nullptr);
        continue;
      }
      auto& values =
          vectors[kind - 1].emplace_back(wants(kind, i) ? static_cast<size_t>(t.size(0)) : 0);
      vector_data[kind - 1].push_back(values.empty() ? nullptr : values.data());
    }
  if (!empty) {
    cpu::kernels().d2_backward(
        p, {features.data_ptr(), call.pitch(), out.data_ptr()}, mean.data_ptr(),
        variance.data_ptr(),
        {view_of(grad_out), wanted[0] ? grad_x.data_ptr() : nullptr, weight_data.data(),
         vector_data[0].data(), vector_data[1].data(), vector_data[2].data()});
    for (size_t kind = 1; kind < 4; ++kind)
      for (size_t i = 0; i < layers; ++i)
        if (wants(kind, i)) assign(grads[kind][i], vectors[kind - 1][i].data());
  }
  return {std::move(grad_x), std::move(grads[0]), std::move(grads[1]), std::move(grads[2]),
          std::move(grads[3])};
}

/// What is kept of packed weights.
int64_t packed_bytes() { return static_cast<int64_t>(cpu::PackedCache::of_process().bytes()); }

std::string plan(int64_t batch, int64_t in_channels, int64_t out_channels, int64_t height,
                 int64_t width, int64_t dilation, int64_t precision, bool exact) {
  STD_TORCH_CHECK(batch > 0 && in_channels > 0 && out_channels > 0 && height > 0 && width > 0 &&
                      dilation > 0 && precision >= 0 && precision <= 2,
                  "cpu_plan: sizes and dilation must be positive, precision 0, 1 or 2");
  cpu::PassShape shape;
  shape.batch = batch;
  shape.height = height;
  shape.width = width;
  shape.in_channels = in_channels;
  shape.out_channels = out_channels;
  shape.dilation_h = shape.dilation_w = dilation;
  return cpu::kernels().plan(shape, static_cast<int>(precision), exact);
}

}  // namespace
}  // namespace d3net

STABLE_TORCH_LIBRARY_IMPL(d3net_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_plan", TORCH_BOX(&d3net::plan));
  m.impl("cpu_packed_bytes", TORCH_BOX(&d3net::packed_bytes));
}

STABLE_TORCH_LIBRARY_IMPL(d3net_kernels, CPU, m) {
  m.impl("d2_block", TORCH_BOX(&d3net::forward));
  m.impl("d2_block_backward", TORCH_BOX(&d3net::backward));
}
