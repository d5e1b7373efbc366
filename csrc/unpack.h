// Tensors of the stable ABI as the plain problem of multidilated_conv.h; shared by the backends'
// registrations. Arguments arrive validated by d3net_kernels/checks.py; what is checked again here
// is what would read or write astray.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <array>
#include <optional>
#include <vector>

#include "multidilated_conv.h"

namespace d3net {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: break;
  }
  STD_TORCH_CHECK(false, "d3net_kernels: dtype must be float32, float64, bfloat16 or float16");
}

/// What statistics are kept in; d3net_kernels/_layout.py holds the same rule.
inline ScalarType statistics_type(DType dtype) {
  return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
}

/// Where the numbers of a tensor lie. Its storage may have been freed under it.
inline void* data_of(const Tensor& t) {
  void* data = t.data_ptr();
  STD_TORCH_CHECK(data || t.numel() == 0,
                  "d3net_kernels: a tensor has no memory, its storage was freed");
  return data;
}

inline View view_of(const Tensor& t) {
  return {data_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline Weight weight_of(const Tensor& t) {
  return {data_of(t), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

/// d3net_kernels/_layout.py holds the same rule for the fake kernels.
inline bool is_channels_last(const Tensor& t) {
  return t.stride(1) == 1 && t.size(1) > 1 && t.size(2) * t.size(3) > 1;
}

inline Tensor new_empty(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w,
                        bool channels_last) {
  const Ints size{n, c, h, w};
  const Ints stride = channels_last ? Ints{c * h * w, 1, w * c, c} : Ints{c * h * w, h * w, w, 1};
  using torch::stable::detail::from;
  std::array<StableIValue, 6> stack{from(size),
                                    from(stride),
                                    from(std::optional<ScalarType>(like.scalar_type())),
                                    from(std::nullopt),
                                    from(std::optional<torch::stable::Device>(like.device())),
                                    from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor new_empty_like(const Tensor& t) {
  return new_empty(t, t.size(0), t.size(1), t.size(2), t.size(3), is_channels_last(t));
}

/// The operators' common arguments as a Problem, with the memory it points to. Of psi it fills in
/// relu only: where scale and shift go in the accumulation type is up to the backend.
class Arguments {
 public:
  Arguments(const Tensors& inputs, const Tensor& weight, const Ints& dilations,
            const MaybeTensor& scale, const MaybeTensor& shift, bool relu, int64_t precision)
      : device_(inputs.at(0).device()) {
    const Tensor& first = inputs[0];
    STD_TORCH_CHECK(dilations.size() == 2 * inputs.size(),
                    "multidilated_conv2d: dilations must hold two numbers a source");
    STD_TORCH_CHECK(scale.has_value() == shift.has_value(),
                    "multidilated_conv2d: scale and shift must be given together");
    STD_TORCH_CHECK(precision >= 0 && precision <= 2,
                    "multidilated_conv2d: precision must be 0, 1 or 2");
    problem.dtype = dtype_of(first);
    problem.batch = first.size(0);
    problem.height = first.size(2);
    problem.width = first.size(3);
    problem.out_channels = weight.size(0);
    problem.kernel_h = weight.size(2);
    problem.kernel_w = weight.size(3);
    for (size_t i = 0; i < inputs.size(); ++i) {
      const Tensor& x = inputs[i];
      STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == problem.batch && x.size(2) == problem.height &&
                          x.size(3) == problem.width && x.device() == device_ &&
                          x.scalar_type() == first.scalar_type(),
                      "multidilated_conv2d: sources must agree in dtype, device and N, H, W");
      sources_.push_back({view_of(x), x.size(1), dilations[2 * i], dilations[2 * i + 1]});
      problem.in_channels += x.size(1);
    }
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == problem.in_channels &&
                        weight.device() == device_ && weight.scalar_type() == first.scalar_type(),
                    "multidilated_conv2d: weight must be (K, sum of the sources' channels, kh, kw) "
                    "with the sources' dtype and device");
    problem.sources = sources_.data();
    problem.num_sources = static_cast<int64_t>(sources_.size());
    problem.weight = weight_of(weight);
    problem.psi.relu = relu;
    problem.precision = static_cast<Precision>(precision);
  }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  bool empty() const { return problem.batch * problem.height * problem.width == 0; }

  void check_gradient(const Tensor& g) const {
    STD_TORCH_CHECK(g.dim() == 4 && g.size(0) == problem.batch &&
                        g.size(1) == problem.out_channels && g.size(2) == problem.height &&
                        g.size(3) == problem.width && g.device() == device_ &&
                        dtype_of(g) == problem.dtype,
                    "multidilated_conv2d: grad_output must match the output's shape and dtype");
  }

  Problem problem;

 private:
  torch::stable::Device device_;
  std::vector<Source> sources_;
};

}  // namespace d3net
