// What the CPU bindings need of tensors besides unpack.h: coefficients by value, fresh outputs.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <vector>

#include "cpu/parallel.h"
#include "unpack.h"

namespace d3net {

inline void advise_large_pages(const Tensor& t) {
  cpu::advise_large_pages(t.data_ptr(), static_cast<size_t>(t.numel() * t.element_size()));
}

/// A result about to be filled.
inline Tensor new_output(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w,
                         bool channels_last) {
  Tensor t = new_empty(like, n, c, h, w, channels_last);
  advise_large_pages(t);
  return t;
}

/// A vector of coefficients in the accumulation type: the tensor's own, or a converted copy. The
/// tensor has to outlive it.
class Coefficients {
 public:
  Coefficients(const Tensor& t, DType problem, int64_t size) {
    STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size && t.is_cpu(),
                    "d3net_kernels: a vector of coefficients must have one element a channel and "
                    "be on the CPU");
    if (problem == DType::float64)
      data_ = in(DType::float64, t, doubles_);
    else
      data_ = in(DType::float32, t, floats_);
  }
  Coefficients(const MaybeTensor& t, DType problem, int64_t size) {
    if (t) *this = Coefficients(*t, problem, size);
  }
  Coefficients(Coefficients&&) = default;
  Coefficients& operator=(Coefficients&&) = default;
  const void* data() const { return data_; }

 private:
  template <class T, class A>
  static void convert(const Tensor& t, std::vector<A>& to) {
    const T* from = static_cast<const T*>(data_of(t));
    to.resize(static_cast<size_t>(t.size(0)));
    for (size_t i = 0; i < to.size(); ++i)
      to[i] = static_cast<A>(from[static_cast<int64_t>(i) * t.stride(0)]);
  }
  template <class A>
  static const void* in(DType wanted, const Tensor& t, std::vector<A>& copy) {
    const DType dtype = dtype_of(t);
    if (dtype == wanted && t.stride(0) == 1) return data_of(t);
    switch (dtype) {
      case DType::float32: convert<float>(t, copy); break;
      case DType::float64: convert<double>(t, copy); break;
      case DType::bfloat16: convert<torch::headeronly::BFloat16>(t, copy); break;
      case DType::float16: convert<torch::headeronly::Half>(t, copy); break;
    }
    return copy.data();
  }

  const void* data_ = nullptr;
  std::vector<float> floats_;  // where t is not of that type, or has gaps
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
