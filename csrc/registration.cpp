// The CPU implementations of the operators whose schemas d3net_kernels/ops.py declares: unpacks
// tensors into the plain problem (unpack.h), allocates results, calls the kernels.
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu_tensors.h"

namespace d3net {
namespace {

/// Arguments with psi's coefficients. These kernels compute in all bits of float32, whatever the
/// precision allows.
class Call : public Arguments {
 public:
  Call(const Tensors& inputs, const Tensor& weight, const Ints& dilations, const MaybeTensor& scale,
       const MaybeTensor& shift, bool relu, int64_t precision)
      : Arguments(inputs, weight, dilations, scale, shift, relu, precision),
        scale_(scale, problem.dtype, problem.in_channels),
        shift_(shift, problem.dtype, problem.in_channels) {
    problem.psi.scale = scale_.data();
    problem.psi.shift = shift_.data();
  }

 private:
  Coefficients scale_, shift_;
};

Tensor forward(Tensors inputs, Tensor weight, MaybeTensor bias, Ints dilations, MaybeTensor scale,
               MaybeTensor shift, bool relu, int64_t precision) {
  const Call call(inputs, weight, dilations, scale, shift, relu, precision);
  const Problem& p = call.problem;
  const Coefficients bias_values(bias, p.dtype, p.out_channels);
  Tensor out = new_output(inputs[0], p.batch, p.out_channels, p.height, p.width,
                          is_channels_last(inputs[0]));
  if (!call.empty()) cpu::kernels().forward(p, bias_values.data(), view_of(out));
  return out;
}

std::tuple<Tensors, Tensor, Tensor> backward_data(Tensor grad_output, Tensors inputs, Tensor weight,
                                                  Ints dilations, MaybeTensor scale,
                                                  MaybeTensor shift, bool relu, int64_t precision,
                                                  Ints wanted) {
  const Call call(inputs, weight, dilations, scale, shift, relu, precision);
  const Problem& p = call.problem;
  call.check_gradient(grad_output);
  STD_TORCH_CHECK(wanted.size() == inputs.size(),
                  "multidilated_conv2d: wanted must hold one number a source");
  Tensors grad_inputs;
  std::vector<View> views;
  for (size_t i = 0; i < inputs.size(); ++i) {
    grad_inputs.push_back(wanted[i] ? new_empty_like(inputs[i])
                                    : torch::stable::new_empty(inputs[i], Ints{0}));
    views.push_back(wanted[i] ? view_of(grad_inputs[i]) : View{});
  }
  const Tensor& like = scale ? *scale : weight;
  const int64_t channels = scale ? p.in_channels : 0;
  Tensor grad_scale = torch::stable::new_empty(like, Ints{channels});
  Tensor grad_shift = torch::stable::new_empty(like, Ints{channels});
  std::vector<double> sums(static_cast<size_t>(2 * channels));
  if (!call.empty())
    cpu::kernels().backward_data(p, view_of(grad_output), views.data(),
                                 scale ? sums.data() : nullptr);
  if (scale) {
    assign(grad_scale, sums.data(), 2);
    assign(grad_shift, sums.data() + 1, 2);
  }
  return {std::move(grad_inputs), std::move(grad_scale), std::move(grad_shift)};
}

std::tuple<Tensor, Tensor> backward_weight(Tensor grad_output, Tensors inputs, Tensor weight,
                                           Ints dilations, MaybeTensor scale, MaybeTensor shift,
                                           bool relu, int64_t precision) {
  const Call call(inputs, weight, dilations, scale, shift, relu, precision);
  const Problem& p = call.problem;
  call.check_gradient(grad_output);
  const Ints size{p.out_channels, p.in_channels, p.kernel_h, p.kernel_w};
  if (call.empty())
    return {torch::stable::new_zeros(weight, size),
            torch::stable::new_zeros(weight, Ints{p.out_channels})};
  Tensor grad_weight = torch::stable::new_empty(weight, size);
  Tensor grad_bias = torch::stable::new_empty(weight, Ints{p.out_channels});
  cpu::kernels().backward_weight(p, view_of(grad_output), grad_weight.data_ptr(),
                                 grad_bias.data_ptr());
  return {std::move(grad_weight), std::move(grad_bias)};
}

/// Mean and biased variance per channel; NaN where there is nothing to average.
std::tuple<Tensor, Tensor> channel_moments(Tensor x) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(),
                  "channel_moments: x must be a CPU tensor (N, C, H, W)");
  const DType dtype = dtype_of(x);
  const int64_t channels = x.size(1), count = x.size(0) * x.size(2) * x.size(3);
  std::vector<double> moments(static_cast<size_t>(2 * channels),
                              std::numeric_limits<double>::quiet_NaN());
  if (count > 0)
    cpu::kernels().moments(dtype, view_of(x), x.size(0), channels, x.size(2), x.size(3),
                           moments.data());
  Tensor mean = torch::stable::new_empty(x, Ints{channels}, statistics_type(dtype));
  Tensor variance = torch::stable::new_empty(x, Ints{channels}, statistics_type(dtype));
  assign(mean, moments.data(), 2);
  assign(variance, moments.data() + 1, 2);
  return {std::move(mean), std::move(variance)};
}

std::string cpu_isa(std::string request) {
  STD_TORCH_CHECK(request.empty() || cpu::force_isa(request.c_str()), "cpu_isa: got '", request,
                  "', accepted are portable, avx2, avx512 and amx where this CPU has them");
  return cpu::kernels().isa;
}

}  // namespace

void cpu::run_on_all_threads(void (*body)(void*, int64_t worker), void* context) {
  torch::stable::parallel_for(0, num_threads(), 1,
                              [&](int64_t worker, int64_t) { body(context, worker); });
}
int64_t cpu::num_threads() { return torch::stable::get_num_threads(); }

}  // namespace d3net

STABLE_TORCH_LIBRARY_IMPL(d3net_kernels, CPU, m) {
  m.impl("multidilated_conv2d", TORCH_BOX(&d3net::forward));
  m.impl("multidilated_conv2d_backward_data", TORCH_BOX(&d3net::backward_data));
  m.impl("multidilated_conv2d_backward_weight", TORCH_BOX(&d3net::backward_weight));
  m.impl("channel_moments", TORCH_BOX(&d3net::channel_moments));
}

STABLE_TORCH_LIBRARY_IMPL(d3net_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&d3net::cpu_isa));
}
