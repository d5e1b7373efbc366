// What every way to compute a D2 block knows of it: its links, what a pass over one is given, and
// psi of each norm.
//
// A link is the convolution of one source, seen through one norm, for a run of layers: with a norm
// per source there are L, each for all later layers; with a norm per layer each layer has its own.
#pragma once

#include <cmath>
#include <vector>

#include "../d2_block.h"
#include "tile_pass.h"

namespace d3net::cpu::D3NET_ISA {

struct Link {
  int64_t norm, source;
  int64_t first_layer, last_layer;  // 1 .. L, the layers that read the source
  bool opens;                       // nothing was added to these layers before
  int64_t finishes;                 // the layer that is complete after this link, or 0
};

inline std::vector<Link> links_of(const D2Problem& p) {
  std::vector<Link> links;
  if (p.per_layer) {
    for (int64_t layer = 1; layer <= p.layers; ++layer)
      for (int64_t i = 0; i < layer; ++i)
        links.push_back({layer - 1, i, layer, layer, i == 0, i == layer - 1 ? layer : 0});
  } else {
    for (int64_t i = 0; i < p.layers; ++i) links.push_back({i, i, i + 1, p.layers, i == 0, i + 1});
  }
  return links;
}

template <class T>
class D2Block {
 protected:
  using A = Accumulator<T>;
  static constexpr bool kWide = std::is_same_v<T, A>;  // features are kept as they are summed

 public:
  D2Block(const D2Problem& problem, const D2Features& kept, A* mean, A* variance)
      : p(problem), kept_(kept), mean_(mean), variance_(variance), links_(links_of(problem)) {
    for (int64_t j = 0; j < p.layers; ++j) {
      scale_.emplace_back(norm_channels(j));
      shift_.emplace_back(norm_channels(j));
    }
  }

 protected:
  int64_t pixels() const { return p.batch * p.height * p.width; }
  int64_t norm_channels(int64_t norm) const {
    return p.per_layer ? p.first_channel(norm) + p.channels_of(norm) : p.channels_of(norm);
  }
  /// Where a source's channels start in a norm, and a norm's channels in the statistics.
  int64_t in_norm(int64_t source) const { return p.per_layer ? p.first_channel(source) : 0; }
  int64_t in_statistics(int64_t norm) const { return p.per_layer ? 0 : p.first_channel(norm); }

  template <class E>
  Slab<E> slab(E* data, int64_t pitch) const {
    return {data, p.height * p.width * pitch, p.width * pitch, pitch};
  }
  Slab<T> layer(int64_t l) const {
    if (l <= p.hidden_layers())
      return slab(static_cast<T*>(kept_.features) + p.in_row(l), kept_.pitch);
    return slab(static_cast<T*>(kept_.out) + (l - p.hidden_layers() - 1) * p.growth,
                p.out_layers * p.growth);
  }
  Parts<T> source(int64_t i) const {
    Parts<T> parts;
    if (i == 0) {
      for (const Part* part = p.parts; part < p.parts + p.num_parts; ++part)
        parts.add({static_cast<const T*>(part->x.data), part->x.stride_n, part->x.stride_h,
                   part->x.stride_w},
                  part->channels);
    } else {
      const Slab<T> s = layer(i);
      parts.add({s.data, s.stride_n, s.stride_h, s.stride_w}, p.growth);
    }
    return parts;
  }

  A mean_of(int64_t norm, int64_t channel) const {
    const Norm& n = p.norms[norm];
    return n.use_batch ? mean_[in_statistics(norm) + channel]
                       : static_cast<const A*>(n.mean)[channel];
  }
  double rstd_of(int64_t norm, int64_t channel) const {
    const Norm& n = p.norms[norm];
    const A variance = n.use_batch ? variance_[in_statistics(norm) + channel]
                                   : static_cast<const A*>(n.variance)[channel];
    return 1 / std::sqrt(static_cast<double>(variance) + p.eps);
  }
  /// Batch normalisation as one factor and one summand a channel.
  void fold_norm(int64_t norm) {
    const Norm& n = p.norms[norm];
    for (int64_t c = 0; c < norm_channels(norm); ++c) {
      // The summand follows from the rounded factor, so that both err as one near the mean.
      const double weight = static_cast<double>(static_cast<const A*>(n.weight)[c]);
      const double bias = static_cast<double>(static_cast<const A*>(n.bias)[c]);
      const A scale = static_cast<A>(weight * rstd_of(norm, c));
      const double at_mean = static_cast<double>(mean_of(norm, c)) * static_cast<double>(scale);
      scale_[static_cast<size_t>(norm)][static_cast<size_t>(c)] = scale;
      shift_[static_cast<size_t>(norm)][static_cast<size_t>(c)] = static_cast<A>(bias - at_mean);
    }
  }
  Activation<A> psi_of(const Link& link) const {
    const auto norm = static_cast<size_t>(link.norm);
    return Activation<A>{scale_[norm].data(), shift_[norm].data(), p.relu}.from_channel(
        in_norm(link.source));
  }

  PassShape shape_of(const Link& link) const {
    PassShape s;
    s.batch = p.batch;
    s.height = p.height;
    s.width = p.width;
    s.in_channels = p.channels_of(link.source);
    s.in_tensors = static_cast<int64_t>(source(link.source).x.size());
    s.out_channels = (link.last_layer - link.first_layer + 1) * p.growth;
    s.kernel_h = p.kernel_h;
    s.kernel_w = p.kernel_w;
    s.dilation_h = s.dilation_w = int64_t{1} << link.source;
    return s;
  }
  PassPlan plan_of(const PassShape& shape, Machine machine = machine_of<A>()) const {
    // 16-bit features round far above the errors of Winograd's larger tiles.
    const Precision precision = std::is_same_v<T, bfloat16>  ? Precision::medium
                                : std::is_same_v<T, float16> ? Precision::high
                                                             : static_cast<Precision>(p.precision);
    return plan_pass(shape, precision, sizeof(A) == sizeof(double), machine);
  }
  Weight weight_of(const Link& link) const {
    const int64_t slot = link.first_layer - 1 - link.source;
    Weight w = p.convs[link.source].weight;
    w.data = static_cast<const char*>(w.data) + slot * p.growth * w.stride_k * weight_bytes();
    return w;
  }
  bool wide_weights() const { return p.weight_dtype != p.dtype; }
  int64_t weight_bytes() const { return wide_weights() ? sizeof(A) : sizeof(T); }

  /// Of each layer the sum over its sources, so that it is added, and rounded, once.
  std::vector<A> layer_biases() const {
    std::vector<A> sums(static_cast<size_t>(p.layers * p.growth));
    for (int64_t c = 0; c < p.layers * p.growth; ++c) {
      double sum = 0;
      for (int64_t i = 0; i <= c / p.growth; ++i)
        if (const A* bias = static_cast<const A*>(p.convs[i].bias))
          sum += static_cast<double>(bias[c - i * p.growth]);
      sums[static_cast<size_t>(c)] = static_cast<A>(sum);
    }
    return sums;
  }

  /// Whether batch statistics of x_layer are wanted.
  bool measures(int64_t layer) const {
    if (layer == 0 || layer == p.layers) return false;
    if (!p.per_layer) return p.norms[layer].use_batch;
    for (int64_t j = layer; j < p.layers; ++j)
      if (p.norms[j].use_batch) return true;
    return false;
  }

  const D2Problem& p;
  D2Features kept_;
  A* mean_;
  A* variance_;
  std::vector<Link> links_;
  std::vector<std::vector<A>> scale_, shift_;  // of each norm
};

}  // namespace d3net::cpu::D3NET_ISA
