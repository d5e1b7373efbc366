// The CUDA implementations of the operators whose schemas d3net_kernels/ops.py declares: unpacks
// tensors into the plain problem, allocates results, runs the program.
#include <limits>
#include <string>
#include <tuple>

#include "../unpack.h"
#include "launch.h"

namespace d3net::cuda {
namespace {

/// A vector of `size` coefficients; null where there is none.
Vector vector_of(const MaybeTensor& t, int64_t size, const Tensor& like) {
  if (!t) return {};
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == size && t->device() == like.device(),
                  "multidilated_conv2d: bias, scale and shift must have one element a channel and "
                  "the sources' device");
  return {data_of(*t), t->stride(0), dtype_of(*t)};
}

Coefficients coefficients_of(const Problem& p, const Tensor& like, const MaybeTensor& scale,
                             const MaybeTensor& shift, const MaybeTensor& bias) {
  return {vector_of(scale, p.in_channels, like), vector_of(shift, p.in_channels, like),
          vector_of(bias, p.out_channels, like)};
}

/// The output, and its moments where they are wanted.
Tensor output_of(const Arguments& call, const Tensor& like, const Coefficients& coefficients,
                 const Moments& moments) {
  const Problem& p = call.problem;
  Gpu gpu(like);
  Tensor out = new_empty(like, p.batch, p.out_channels, p.height, p.width, is_channels_last(like));
  if (!call.empty()) forward(gpu, p, coefficients, view_of(out), moments);
  return out;
}

Tensor forward_op(Tensors inputs, Tensor weight, MaybeTensor bias, Ints dilations,
                  MaybeTensor scale, MaybeTensor shift, bool relu, int64_t precision) {
  const Arguments call(inputs, weight, dilations, scale, shift, relu, precision);
  return output_of(call, inputs[0], coefficients_of(call.problem, inputs[0], scale, shift, bias),
                   {});
}

std::tuple<Tensor, Tensor, Tensor> forward_with_moments_op(Tensors inputs, Tensor weight,
                                                           MaybeTensor bias, Ints dilations,
                                                           MaybeTensor scale, MaybeTensor shift,
                                                           bool relu, int64_t precision) {
  const Arguments call(inputs, weight, dilations, scale, shift, relu, precision);
  const Problem& p = call.problem;
  const Coefficients coefficients = coefficients_of(p, inputs[0], scale, shift, bias);
  auto statistic = [&] {
    Tensor t = torch::stable::new_empty(inputs[0], Ints{p.out_channels}, statistics_type(p.dtype));
    if (call.empty()) torch::stable::fill_(t, std::numeric_limits<double>::quiet_NaN());
    return t;
  };
  Tensor mean = statistic(), variance = statistic();
  auto vector = [](const Tensor& t) { return Vector{t.data_ptr(), 1, dtype_of(t)}; };
  Tensor out = output_of(call, inputs[0], coefficients, {vector(mean), vector(variance)});
  return {std::move(out), std::move(mean), std::move(variance)};
}

std::tuple<Tensors, Tensor, Tensor> backward_data_op(Tensor grad_output, Tensors inputs,
                                                     Tensor weight, Ints dilations,
                                                     MaybeTensor scale, MaybeTensor shift,
                                                     bool relu, int64_t precision, Ints wanted) {
  const Arguments call(inputs, weight, dilations, scale, shift, relu, precision);
  const Problem& p = call.problem;
  call.check_gradient(grad_output);
  STD_TORCH_CHECK(wanted.size() == inputs.size(),
                  "multidilated_conv2d: wanted must hold one number a source");
  const Coefficients coefficients = coefficients_of(p, inputs[0], scale, shift, std::nullopt);
  Gpu gpu(inputs[0]);
  Tensors grad_inputs;
  std::vector<View> views;
  for (size_t i = 0; i < inputs.size(); ++i) {
    grad_inputs.push_back(wanted[i] ? new_empty_like(inputs[i])
                                    : torch::stable::new_empty(inputs[i], Ints{0}));
    views.push_back(wanted[i] ? view_of(grad_inputs[i]) : View{});
  }
  const Tensor& like = scale ? *scale : weight;
  const Ints channels{scale ? p.in_channels : 0};
  auto sums = [&](const Ints& size) {
    return call.empty() ? torch::stable::new_zeros(like, size)
                        : torch::stable::new_empty(like, size);
  };
  Tensor grad_scale = sums(channels), grad_shift = sums(channels);
  if (!call.empty())
    backward_data(gpu, p, coefficients, view_of(grad_output), views.data(),
                  scale ? coefficients_of(p, inputs[0], grad_scale, grad_shift, std::nullopt)
                        : Coefficients{});
  return {std::move(grad_inputs), std::move(grad_scale), std::move(grad_shift)};
}

std::tuple<Tensor, Tensor> backward_weight_op(Tensor grad_output, Tensors inputs, Tensor weight,
                                              Ints dilations, MaybeTensor scale, MaybeTensor shift,
                                              bool relu, int64_t precision) {
  const Arguments call(inputs, weight, dilations, scale, shift, relu, precision);
  const Problem& p = call.problem;
  call.check_gradient(grad_output);
  const Coefficients coefficients = coefficients_of(p, inputs[0], scale, shift, std::nullopt);
  Gpu gpu(inputs[0]);
  const Ints size{p.out_channels, p.in_channels, p.kernel_h, p.kernel_w}, outputs{p.out_channels};
  if (call.empty())
    return {torch::stable::new_zeros(weight, size), torch::stable::new_zeros(weight, outputs)};
  Tensor grad_weight = torch::stable::new_empty(weight, size);
  Tensor grad_bias = torch::stable::new_empty(weight, outputs);
  backward_weight(gpu, p, coefficients, view_of(grad_output), grad_weight.data_ptr(),
                  grad_bias.data_ptr());
  return {std::move(grad_weight), std::move(grad_bias)};
}

std::string archs_op() { return built_archs(); }

/// Whether this binary has code, or PTX to compile, for the GPU of that index.
bool serves_op(int64_t device) {
  const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, find_kernel("upload_table"));
  if (status != cudaErrorNoKernelImageForDevice) check(status, "cudaFuncGetAttributes");
  cudaGetLastError();
  return status == cudaSuccess;
}

}  // namespace
}  // namespace d3net::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(d3net_kernels, m) {
  m.def("cuda_archs() -> str");
  m.def("cuda_serves(int device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(d3net_kernels, CUDA, m) {
  m.impl("multidilated_conv2d", TORCH_BOX(&d3net::cuda::forward_op));
  m.impl("multidilated_conv2d_with_moments", TORCH_BOX(&d3net::cuda::forward_with_moments_op));
  m.impl("multidilated_conv2d_backward_data", TORCH_BOX(&d3net::cuda::backward_data_op));
  m.impl("multidilated_conv2d_backward_weight", TORCH_BOX(&d3net::cuda::backward_weight_op));
}

STABLE_TORCH_LIBRARY_IMPL(d3net_kernels, CompositeExplicitAutograd, m) {
  m.impl("cuda_archs", TORCH_BOX(&d3net::cuda::archs_op));
  m.impl("cuda_serves", TORCH_BOX(&d3net::cuda::serves_op));
}
