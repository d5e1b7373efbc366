// Between torch's tensors, through its stable ABI, and the plain structs of the kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <array>
#include <optional>
#include <vector>

#include "cpu/parallel.h"
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

inline View view_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

inline Weight weight_of(const Tensor& t) {
  return {t.data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

/// d3net_kernels/_layout.py holds the same rule for the fake kernels.
inline bool is_channels_last(const Tensor& t) {
  return t.stride(1) == 1 && t.size(1) > 1 && t.size(2) * t.size(3) > 1;
}

inline void advise_large_pages(const Tensor& t) {
  cpu::advise_large_pages(t.data_ptr(), static_cast<size_t>(t.numel() * t.element_size()));
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
  Tensor t = torch::stable::detail::to<Tensor>(stack[0]);
  advise_large_pages(t);
  return t;
}

inline Tensor new_empty_like(const Tensor& t) {
  return new_empty(t, t.size(0), t.size(1), t.size(2), t.size(3), is_channels_last(t));
}

/// A vector of coefficients in the accumulation type.
class Coefficients {
 public:
  Coefficients(const Tensor& t, DType problem, int64_t size) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size,
                    "d3net_kernels: a vector of coefficients must have one element a channel");
    if (problem == DType::float64)
      copy(t, doubles_);
    else
      copy(t, floats_);
  }
  Coefficients(const MaybeTensor& t, DType problem, int64_t size) {
    if (t) *this = Coefficients(*t, problem, size);
  }
  const void* data() const {
    if (!doubles_.empty()) return doubles_.data();
    return floats_.empty() ? nullptr : floats_.data();
  }

 private:
  template <class T, class A>
  static void convert(const Tensor& t, std::vector<A>& to) {
    const T* from = static_cast<const T*>(t.data_ptr());
    to.resize(static_cast<size_t>(t.size(0)));
    for (size_t i = 0; i < to.size(); ++i)
      to[i] = static_cast<A>(from[static_cast<int64_t>(i) * t.stride(0)]);
  }
  template <class A>
  static void copy(const Tensor& t, std::vector<A>& to) {
    switch (dtype_of(t)) {
      case DType::float32: return convert<float>(t, to);
      case DType::float64: return convert<double>(t, to);
      case DType::bfloat16: return convert<torch::headeronly::BFloat16>(t, to);
      case DType::float16: return convert<torch::headeronly::Half>(t, to);
    }
  }

  std::vector<float> floats_;
  std::vector<double> doubles_;
};

/// Every `step`-th value into a one-dimensional tensor.
inline void assign(const Tensor& t, const double* values, int64_t step = 1) {
  auto write = [&](auto* to) {
    for (int64_t i = 0; i < t.size(0); ++i)
      to[i] = static_cast<std::remove_reference_t<decltype(*to)>>(
          dtype_of(t) == DType::float64 ? values[i * step] : static_cast<float>(values[i * step]));
  };
  switch (dtype_of(t)) {
    case DType::float32: return write(static_cast<float*>(t.data_ptr()));
    case DType::float64: return write(static_cast<double*>(t.data_ptr()));
    case DType::bfloat16: return write(static_cast<torch::headeronly::BFloat16*>(t.data_ptr()));
    case DType::float16: return write(static_cast<torch::headeronly::Half*>(t.data_ptr()));
  }
}

}  // namespace d3net
