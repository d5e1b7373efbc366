// The D2 block of so few channels that vectors run along the pixels of a row, not along channels:
// layer by layer, each reading all its sources at once.
#pragma once

#include "convolve.h"
#include "d2_links.h"
#include "moments.h"

namespace d3net::cpu::D3NET_ISA {

template <class T>
class D2Rows : D2Block<T> {
  using Base = D2Block<T>;
  using Base::p;
  using typename Base::A;

 public:
  using Base::Base;

  /// `mean` and `variance` hold those of x_0, where a norm wants them; the others are added.
  void run() {
    std::vector<std::vector<T>> rounded(static_cast<size_t>(p.layers));
    std::vector<Weight> weights;
    for (int64_t i = 0; i < p.layers; ++i)
      weights.push_back(in_own_type(p.convs[i].weight, i, rounded[static_cast<size_t>(i)]));
    const std::vector<A> bias = this->layer_biases();
    this->fold_norm(0);
    for (int64_t layer = 1; layer <= p.layers; ++layer) {
      std::vector<Convolution<T>> one;
      const A* its_bias = bias.data() + (layer - 1) * p.growth;
      one.emplace_back(Shape{p.batch, p.height, p.width, p.growth, p.kernel_h, p.kernel_w},
                       operands(layer, weights), view(this->layer(layer)), its_bias);
      const int64_t moved = this->pixels() * (p.first_channel(layer) + p.growth);
      run_all(one, p.multiplications() / p.layers, moved);
      if (layer == p.layers) break;
      if (this->measures(layer)) measure(layer);
      this->fold_norm(layer);
    }
  }

 private:
  template <class E>
  static View view(const Slab<E>& s) {
    return {const_cast<T*>(s.data), s.stride_n, 1, s.stride_h, s.stride_w};
  }

  /// The weight of source i; the kernels take no others than of the type of x.
  Weight in_own_type(const Weight& w, int64_t i, std::vector<T>& memory) const {
    if (!this->wide_weights()) return w;
    const int64_t taps = p.kernel_h * p.kernel_w, channels = p.channels_of(i);
    memory.resize(static_cast<size_t>(p.growth * (p.layers - i) * channels * taps));
    T* to = memory.data();
    for (int64_t k = 0; k < p.growth * (p.layers - i); ++k)
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t y = 0; y < p.kernel_h; ++y)
          for (int64_t x = 0; x < p.kernel_w; ++x)
            store_one<A>(
                to++,
                static_cast<const A*>(
                    w.data)[k * w.stride_k + c * w.stride_c + y * w.stride_h + x * w.stride_w]);
    return {memory.data(), channels * taps, taps, p.kernel_w, 1};
  }

  /// x_0, whose channels need not be adjacent, or an earlier layer.
  std::vector<Part> source_views(int64_t i) const {
    if (i == 0) return {p.parts, p.parts + p.num_parts};
    return {{view(this->layer(i)), p.growth}};
  }

  std::vector<Operand<T>> operands(int64_t layer, const std::vector<Weight>& weights) const {
    std::vector<Operand<T>> all;
    for (int64_t i = 0; i < layer; ++i) {
      Activation<A> psi = this->psi_of({p.per_layer ? layer - 1 : i, i, layer, layer, false, 0});
      Weight w = weights[static_cast<size_t>(i)];
      const T* from = static_cast<const T*>(w.data) + (layer - 1 - i) * p.growth * w.stride_k;
      for (const auto& [x, channels] : source_views(i)) {
        w.data = from;
        all.push_back({x, channels, int64_t{1} << i, int64_t{1} << i, psi, w});
        psi = psi.from_channel(channels);
        from += channels * w.stride_c;
      }
    }
    return all;
  }

  void measure(int64_t layer) {
    std::vector<double> found(static_cast<size_t>(2 * p.growth));
    moments<T>(view(this->layer(layer)), p.batch, p.growth, p.height, p.width, found.data());
    for (int64_t c = 0; c < p.growth; ++c) {
      const int64_t channel = p.first_channel(layer) + c;
      this->mean_[channel] = static_cast<A>(found[static_cast<size_t>(2 * c)]);
      this->variance_[channel] = static_cast<A>(found[static_cast<size_t>(2 * c + 1)]);
    }
  }
};

}  // namespace d3net::cpu::D3NET_ISA
