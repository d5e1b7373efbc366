// The CPU implementation of the D2 block's operators: allocates results, calls the kernels.
#include <memory>
#include <mutex>
#include <tuple>
#include <unordered_map>

#include "block_call.h"
#include "cpu/packed_cache.h"

namespace d3net {
namespace {

Tensor new_result(const BlockCall& call, const Tensor& x) {
  const D2Problem& p = call.problem;
  return new_output(x, p.batch, p.growth * p.out_layers, p.height, p.width, true);
}

/// The layers that are returned into `out`; the others into `features`, or where that is null into
/// memory of this thread's own.
void compute(const BlockCall& call, const Tensor& out, void* features, void* mean, void* variance) {
  if (call.empty()) return;
  const D2Problem& p = call.problem;
  static thread_local cpu::Scratch memory;
  const int64_t hidden = features ? 0 : p.batch * p.height * p.width * call.pitch();
  const cpu::Borrowed<char> temporary(memory, hidden * out.element_size());
  if (!features) features = temporary.get();
  cpu::kernels().d2_forward(p, {features, call.pitch(), out.data_ptr()}, mean, variance);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensors parts, Tensors weights, Tensors biases,
                                                   Tensors norm_weights, Tensors norm_biases,
                                                   Tensors running_means, Tensors running_variances,
                                                   Ints use_batch, double eps, bool per_layer,
                                                   bool relu, int64_t out_layers, int64_t precision,
                                                   bool keep) {
  const BlockParams params{std::move(weights),
                           std::move(biases),
                           std::move(norm_weights),
                           std::move(norm_biases),
                           std::move(running_means),
                           std::move(running_variances),
                           std::move(use_batch),
                           eps,
                           per_layer,
                           relu,
                           out_layers};
  BlockCall call(parts, params, precision, true);
  call.problem.weights_recur = !keep;  // who goes backward has others soon
  const Tensor& x = parts[0];
  const D2Problem& p = call.problem;
  const ScalarType kept = statistics_type(p.dtype);
  Tensor out = new_result(call, x);
  Tensor features =
      torch::stable::new_empty(x, Ints{p.batch, p.height, p.width, keep ? call.pitch() : 0});
  advise_large_pages(features);
  const Ints measured{call.measures() ? p.source_channels() : 0};
  Tensor mean = torch::stable::new_zeros(x, measured, kept);
  Tensor variance = torch::stable::new_zeros(x, measured, kept);
  if (call.measures_input() && !call.empty()) {
    std::vector<double> moments(static_cast<size_t>(2 * p.in_channels));
    double* next = moments.data();
    for (const Part* part = p.parts; part < p.parts + p.num_parts; ++part) {
      cpu::kernels().moments(p.dtype, part->x, p.batch, part->channels, p.height, p.width, next);
      next += 2 * part->channels;
    }
    assign(torch::stable::narrow(mean, 0, 0, p.in_channels), moments.data(), 2);
    assign(torch::stable::narrow(variance, 0, 0, p.in_channels), moments.data() + 1, 2);
  }
  compute(call, out, keep ? features.data_ptr() : nullptr, mean.data_ptr(), variance.data_ptr());
  return {std::move(out), std::move(features), std::move(mean), std::move(variance)};
}

/// Parameters of blocks by number, for calls that bring their input alone: some thirty tensors take
/// longer to hand over than a small map to compute. Only the tensors are kept, no number of theirs.
class Handles {
 public:
  /// Never destroyed: what it holds must not outlive torch.
  static Handles& of_process() {
    static auto* handles = new Handles;
    return *handles;
  }
  int64_t add(BlockParams&& params) {
    auto held = std::make_shared<const BlockParams>(std::move(params));
    const std::lock_guard lock(mutex_);
    held_.emplace(++last_, std::move(held));
    return last_;
  }
  std::shared_ptr<const BlockParams> find(int64_t handle) {
    const std::lock_guard lock(mutex_);
    const auto at = held_.find(handle);
    STD_TORCH_CHECK(at != held_.end(), "d2_block: there is no handle ", handle);
    return at->second;
  }
  void remove(int64_t handle) {
    std::shared_ptr<const BlockParams> released;  // outside of the lock
    const std::lock_guard lock(mutex_);
    const auto at = held_.find(handle);
    if (at == held_.end()) return;
    released = std::move(at->second);
    held_.erase(at);
  }
  int64_t count() {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(held_.size());
  }

 private:
  std::mutex mutex_;
  std::unordered_map<int64_t, std::shared_ptr<const BlockParams>> held_;
  int64_t last_ = 0;
};

/// With running statistics alone.
int64_t new_handle(Tensors weights, Tensors biases, Tensors norm_weights, Tensors norm_biases,
                   Tensors running_means, Tensors running_variances, double eps, bool per_layer,
                   bool relu, int64_t out_layers) {
  Ints use_batch(weights.size(), 0);
  return Handles::of_process().add({std::move(weights), std::move(biases), std::move(norm_weights),
                                    std::move(norm_biases), std::move(running_means),
                                    std::move(running_variances), std::move(use_batch), eps,
                                    per_layer, relu, out_layers});
}

Tensor forward_of_handle(Tensors parts, int64_t handle, int64_t precision) {
  const auto params = Handles::of_process().find(handle);
  BlockCall call(parts, *params, precision, true);
  call.problem.weights_recur = true;
  Tensor out = new_result(call, parts[0]);
  compute(call, out, nullptr, nullptr, nullptr);
  return out;
}

void release_handle(int64_t handle) { Handles::of_process().remove(handle); }
int64_t count_handles() { return Handles::of_process().count(); }

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors> backward(
    Tensor grad_out, Tensors parts, Tensor out, Tensor features, Tensor mean, Tensor variance,
    Tensors weights, Tensors biases, Tensors norm_weights, Tensors norm_biases,
    Tensors running_means, Tensors running_variances, Ints use_batch, double eps, bool per_layer,
    bool relu, int64_t out_layers, int64_t precision, Ints wanted) {
  const BlockParams params{weights,           biases,    norm_weights, norm_biases, running_means,
                           running_variances, use_batch, eps,          per_layer,   relu,
                           out_layers};
  const BlockCall call(parts, params, precision, false);
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
  m.impl("d2_block_release", TORCH_BOX(&d3net::release_handle));
  m.impl("d2_block_handles", TORCH_BOX(&d3net::count_handles));
}

STABLE_TORCH_LIBRARY_IMPL(d3net_kernels, CPU, m) {
  m.impl("d2_block", TORCH_BOX(&d3net::forward));
  m.impl("d2_block_backward", TORCH_BOX(&d3net::backward));
  m.impl("d2_block_handle", TORCH_BOX(&d3net::new_handle));
  m.impl("d2_block_of_handle", TORCH_BOX(&d3net::forward_of_handle));
}
