// The body of each instruction set's translation unit: the kernels for four dtypes.
#pragma once

#include <vector>

#include "convolve.h"
#include "kernels.h"
#include "moments.h"
#include "relayout.h"
#include "weight_grad.h"

namespace d3net::cpu::D3NET_ISA {

// In a translation unit of their own, d2_block_*.cpp. Those on tiles return false if not done.
bool forward_on_tiles(const Problem&, const void* bias, const View& out);
bool backward_data_on_tiles(const Problem&, const View& gradient, const View* grad_inputs,
                            double* psi_sums);
bool backward_weight_on_tiles(const Problem&, const View& gradient, void* weight, void* bias);
void d2_forward(const D2Problem&, const D2Features&, void* mean, void* variance);
void d2_backward(const D2Problem&, const D2Features&, const void* mean, const void* variance,
                 const D2Gradients&);
std::string d2_plan(const PassShape&, int precision, bool exact);

namespace {

template <class T>
Shape shape_of(const Problem& p, int64_t out_channels) {
  return {p.batch, p.height, p.width, out_channels, p.kernel_h, p.kernel_w};
}

template <class T>
Activation<Accumulator<T>> psi_of(const Problem& p) {
  using A = Accumulator<T>;
  return {static_cast<const A*>(p.psi.scale), static_cast<const A*>(p.psi.shift), p.psi.relu};
}

template <class T>
Weight weight_from_channel(const Weight& w, int64_t channel) {
  Weight part = w;
  part.data = static_cast<const T*>(w.data) + channel * w.stride_c;
  return part;
}

template <class T>
void forward(const Problem& p, const void* bias, const View& out) {
  std::vector<Operand<T>> operands;
  int64_t channel = 0;
  for (int64_t i = 0; i < p.num_sources; ++i) {
    const Source& s = p.sources[i];
    operands.push_back({s.x, s.channels, s.dilation_h, s.dilation_w,
                        psi_of<T>(p).from_channel(channel),
                        weight_from_channel<T>(p.weight, channel)});
    channel += s.channels;
  }
  std::vector<Convolution<T>> convolutions;
  convolutions.emplace_back(shape_of<T>(p, p.out_channels), std::move(operands), out,
                            static_cast<const Accumulator<T>*>(bias));
  run_all(convolutions, p.multiplications());
}

template <class T>
void backward_data(const Problem& p, const View& gradient, const View* grad_inputs,
                   double* psi_sums) {
  std::vector<Convolution<T>> convolutions;
  std::vector<std::vector<double>> sums;  // of each convolution, [tile][channel][2]
  int64_t channel = 0;
  for (int64_t i = 0; i < p.num_sources; ++i) {
    const Source& s = p.sources[i];
    const Weight weight = weight_from_channel<T>(p.weight, channel);
    if (grad_inputs[i].data || psi_sums) {
      convolutions.emplace_back(
          shape_of<T>(p, s.channels),
          std::vector<Operand<T>>{{gradient,
                                   p.out_channels,
                                   s.dilation_h,
                                   s.dilation_w,
                                   {},
                                   transposed(weight, p.kernel_h, p.kernel_w, sizeof(T))}},
          grad_inputs[i], nullptr);
      sums.emplace_back();
      if (psi_sums) sums.back().resize(convolutions.back().tiles() * s.channels * 2);
      if (p.psi.scale || p.psi.relu)
        convolutions.back().backward_through(
            {s.x, psi_of<T>(p).from_channel(channel), psi_sums ? sums.back().data() : nullptr});
    }
    channel += s.channels;
  }
  run_all(convolutions, p.multiplications());
  if (!psi_sums) return;
  for (const auto& of_source : sums) {  // with psi_sums every source has its convolution
    const size_t width = static_cast<size_t>(2 * p.sources[&of_source - sums.data()].channels);
    for (size_t j = 0; j < width; ++j) {
      double total = 0;
      for (size_t t = j; t < of_source.size(); t += width) total += of_source[t];
      *psi_sums++ = total;
    }
  }
}

template <class T>
void backward_weight(const Problem& p, const View& gradient, void* weight, void* bias) {
  WeightGradient<T>(p, gradient).run(static_cast<T*>(weight), static_cast<T*>(bias));
}

template <class F>
void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::float32: return f(float{});
    case DType::float64: return f(double{});
    case DType::bfloat16: return f(bfloat16{});
    case DType::float16: return f(float16{});
  }
}

const Kernels kKernels{
    D3NET_ISA_NAME,
    [](const Problem& p, const void* bias, const View& out) {
      if (forward_on_tiles(p, bias, out)) return;
      for_dtype(p.dtype, [&](auto t) { forward<decltype(t)>(p, bias, out); });
    },
    [](const Problem& p, const View& gradient, const View* grad_inputs, double* psi_sums) {
      if (backward_data_on_tiles(p, gradient, grad_inputs, psi_sums)) return;
      for_dtype(p.dtype,
                [&](auto t) { backward_data<decltype(t)>(p, gradient, grad_inputs, psi_sums); });
    },
    [](const Problem& p, const View& gradient, void* weight, void* bias) {
      if (backward_weight_on_tiles(p, gradient, weight, bias)) return;
      for_dtype(p.dtype, [&](auto t) { backward_weight<decltype(t)>(p, gradient, weight, bias); });
    },
    [](DType dtype, const View& x, int64_t batch, int64_t channels, int64_t height, int64_t width,
       double* out) {
      for_dtype(dtype,
                [&](auto t) { moments<decltype(t)>(x, batch, channels, height, width, out); });
    },
    d2_plan,
    [](DType dtype, const View& x, int64_t batch, int64_t channels, int64_t height, int64_t width,
       void* to) {
      for_dtype(dtype, [&](auto t) {
        to_channels_last(x, batch, channels, height, width, static_cast<decltype(t)*>(to));
      });
    },
    d2_forward,
    d2_backward};

}  // namespace
}  // namespace d3net::cpu::D3NET_ISA
