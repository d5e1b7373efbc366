// The D2 block, forward and backward, as a sequence of tile passes in one parallel region each.
//
// A link is the convolution of one source, seen through one norm, for a run of layers: with a norm
// per source there are L, each for all later layers; with a norm per layer each layer has its own.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "../d2_block.h"
#include "packed_weights.h"
#include "relayout.h"
#include "tile_pass.h"
#include "tile_weight_grad.h"

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

/// What both directions know of a block: its links, and psi of each norm.
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

  const D2Problem& p;
  D2Features kept_;
  A* mean_;
  A* variance_;
  std::vector<Link> links_;
  std::vector<std::vector<A>> scale_, shift_;  // of each norm
};

template <class T>
class D2Forward : D2Block<T> {
  using Base = D2Block<T>;
  using Base::p;
  using typename Base::A;
  using Pass = TilePass<T, T, A>;

 public:
  using Base::Base;

  /// `mean` and `variance` hold those of x_0, where a norm wants them; the others are added.
  void run() {
    static thread_local Scratch sums_memory;
    const bool needs_sums = !Base::kWide && p.layers > 1;
    const Borrowed<A> sums(sums_memory, needs_sums ? this->pixels() * p.row() : 0);
    const std::vector<A> bias = layer_biases();
    std::vector<Pass> passes;
    std::vector<std::vector<Moments>> moments(this->links_.size());
    std::vector<std::vector<double>> counts(this->links_.size());
    for (size_t i = 0; i < this->links_.size(); ++i) {
      const Link& link = this->links_[i];
      Pass& pass = passes.emplace_back();
      pass.shape = this->shape_of(link);
      pass.plan = this->plan_of(pass.shape);
      pass.input = {this->source(link.source), true, this->psi_of(link)};
      pass.weight = this->weight_of(link);
      pass.wide_weights = this->wide_weights();
      pass.output.to = destination(sums.get());
      pass.output.to.begin = p.in_row(link.first_layer);
      pass.output.to.end = p.in_row(link.last_layer + 1);
      pass.output.accumulate = !link.opens;
      if (link.opens) pass.output.bias = bias.data() + (link.first_layer - 1) * p.growth;
      if (!Base::kWide && link.finishes)
        pass.output.completed = {this->layer(link.finishes), p.growth};
      if (measures(link.finishes)) {
        moments[i].resize(static_cast<size_t>(pass.runs() * p.growth));
        counts[i].resize(static_cast<size_t>(pass.runs()));
        pass.output.measure = {p.growth, moments[i].data(), counts[i].data()};
      }
    }
    PackedWeights<Pass> packed(passes, p.weights_recur);

    auto program = [&](Crew::Worker& worker) {
      packed.prepare(worker);
      worker.once([&] { this->fold_norm(0); });
      for (size_t i = 0; i < passes.size(); ++i) {
        worker.each(passes[i].tasks(),
                    [&](int64_t task, int64_t next) { passes[i].run(task, next, packed.of(i)); });
        const int64_t layer = this->links_[i].finishes;
        if (layer == 0) continue;
        if (layer < p.layers)
          worker.once([&] {
            if (measures(layer)) merge(layer, moments[i], counts[i]);
            this->fold_norm(layer);
          });
      }
    };
    Crew::run(program, p.multiplications());
  }

 private:
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

  Destination<A> destination(A* sums) const {
    Destination<A> to;
    if constexpr (Base::kWide) {
      to.cut = p.in_row(p.hidden_layers() + 1);
      to.low = this->slab(static_cast<A*>(this->kept_.features), this->kept_.pitch);
      to.high = this->slab(static_cast<A*>(this->kept_.out), p.out_layers * p.growth);
    } else {
      to.cut = std::numeric_limits<int64_t>::max();
      to.low = this->slab(sums, p.row());
    }
    return to;
  }

  void merge(int64_t layer, const std::vector<Moments>& moments,
             const std::vector<double>& counts) {
    for (int64_t c = 0; c < p.growth; ++c) {
      Moments total = moments[static_cast<size_t>(c)];
      double count = counts[0];
      for (size_t run = 1; run < counts.size(); count += counts[run++])
        total.merge(count, moments[run * static_cast<size_t>(p.growth) + static_cast<size_t>(c)],
                    counts[run]);
      this->mean_[p.first_channel(layer) + c] = static_cast<A>(total.mean);
      this->variance_[p.first_channel(layer) + c] = static_cast<A>(total.squares / count);
    }
  }
};

template <class T>
class D2Backward : D2Block<T> {
  using Base = D2Block<T>;
  using Base::p;
  using typename Base::A;
  using Pass = TilePass<A, T, A>;
  using WeightGradient = TileWeightGradient<T, A>;

 public:
  D2Backward(const D2Problem& problem, const D2Features& kept, A* mean, A* variance,
             const D2Gradients& gradients)
      : Base(problem, kept, mean, variance), g_(gradients) {
    for (int64_t j = 0; j < p.layers; ++j) {
      this->fold_norm(j);
      means_.emplace_back(this->norm_channels(j));
      for (int64_t c = 0; c < this->norm_channels(j); ++c)
        means_.back()[static_cast<size_t>(c)] = this->mean_of(j, c);
    }
    for (int64_t c = 0; c < p.layers; ++c) layer_sums_.emplace_back(p.growth);
  }

  void run() {
    const int64_t widest = writes_to_x() ? p.growth : std::max(p.in_channels, p.growth);
    const int64_t pitch_y = round_up(widest, kAlignedChannels);
    static thread_local Scratch rows_memory, y_memory, workspace_memory;
    const Borrowed<A> rows(rows_memory, this->pixels() * p.row());
    const Borrowed<A> gradient_y(y_memory, this->pixels() * pitch_y);
    rows_ = this->slab(rows.get(), p.row());
    gradient_y_ = this->slab(gradient_y.get(), pitch_y);

    std::vector<Pass> passes;  // in the order of the links; empty where not wanted
    std::vector<std::vector<double>> sums(this->links_.size());
    std::vector<WeightGradient> weight_gradients;
    int64_t workspace_size = 0;
    for (size_t i = 0; i < this->links_.size(); ++i) {
      const Link& link = this->links_[i];
      passes.push_back(data_gradient(link));
      sums[i].resize(static_cast<size_t>(2 * passes[i].runs() * passes[i].shape.out_channels));
      passes[i].output.behind.sums = sums[i].data();
      weight_gradients.push_back(weight_gradient(link));
      if (weight_gradients[i].to)
        workspace_size = std::max(workspace_size, weight_gradients[i].workspace_size());
    }
    PackedWeights<Pass> packed(passes, false);
    const Borrowed<A> workspace(workspace_memory, workspace_size);
    const int64_t map_rows = p.batch * p.height;
    std::vector<double> row_sums(static_cast<size_t>(map_rows * p.growth));
    std::vector<Coefficients> coefficients(static_cast<size_t>(std::max(p.in_channels, p.growth)));

    auto program = [&](Crew::Worker& worker) {
      packed.prepare(worker);
      worker.each(map_rows, [&](int64_t i, int64_t) { copy_gradient(i, row_sums.data()); });
      worker.once([&] { add_rows(p.layers, row_sums); });
      for (size_t i = this->links_.size(); i-- > 0;) {
        const Link& link = this->links_[i];
        if (weight_gradients[i].to) weight_gradients[i].run(worker, workspace.get());
        if (!wanted(link)) continue;
        worker.each(passes[i].tasks(),
                    [&](int64_t task, int64_t next) { passes[i].run(task, next, packed.of(i)); });
        worker.once([&] { finish_norm(link, sums[i], passes[i].runs(), coefficients.data()); });
        if (!source_wanted(link.source)) continue;
        const bool first = opens_source(i), last = link.first_layer == link.source + 1;
        const Parts<T> source = this->source(link.source);
        worker.each(map_rows, [&](int64_t r, int64_t) {
          apply_norm(link, source, r, coefficients.data(), !first,
                     link.source && last ? row_sums.data() : nullptr);
        });
        if (link.source && last) worker.once([&] { add_rows(link.source, row_sums); });
      }
    };
    Crew::run(program, p.multiplications());
    bias_gradients();
  }

 private:
  /// dx = dy * slope + (x - mean) * tilt + offset.
  struct Coefficients {
    A slope, tilt, offset;
  };

  /// Whether the gradient of a source is of use to anyone.
  bool source_wanted(int64_t source) const {
    if (g_.x) return true;
    for (int64_t i = 0; i < source; ++i)
      if (g_.weights[i] || g_.biases[i] || g_.norm_weights[i] || g_.norm_biases[i]) return true;
    return false;
  }
  bool wanted(const Link& link) const {
    return source_wanted(link.source) || g_.norm_weights[link.norm] || g_.norm_biases[link.norm];
  }
  /// Whether no gradient of its source came before the link's, in reverse order; nor does one from
  /// outside the block.
  bool opens_source(size_t link) const {
    const int64_t source = this->links_[link].source;
    if (source > p.hidden_layers()) return false;
    for (size_t i = link + 1; i < this->links_.size(); ++i)
      if (this->links_[i].source == source) return false;
    return true;
  }

  /// Whether the gradient of x_0 is that of psi(x_0) until it becomes its own, in place.
  bool writes_to_x() const { return Base::kWide && g_.x && (!p.per_layer || p.layers == 1); }
  Slab<A> gradient_y_of(const Link& link) const {
    if (link.source == 0 && writes_to_x()) return this->slab(static_cast<A*>(g_.x), p.in_channels);
    return gradient_y_;
  }

  Slab<A> gradient_of(int64_t layer) const {
    Slab<A> s = rows_;
    s.data += p.in_row(layer);
    return s;
  }
  static Slab<const A> read(const Slab<A>& s) {
    return {s.data, s.stride_n, s.stride_h, s.stride_w};
  }

  Pass data_gradient(const Link& link) const {
    Pass pass;
    if (!wanted(link)) return pass;
    pass.shape = this->shape_of(link).transposed();
    pass.plan = this->plan_of(pass.shape);
    pass.input.parts.add(read(gradient_of(link.first_layer)), pass.shape.in_channels);
    pass.weight = transposed(this->weight_of(link), p.kernel_h, p.kernel_w, this->weight_bytes());
    pass.wide_weights = this->wide_weights();
    pass.output.to.low = gradient_y_of(link);
    pass.output.to.cut = pass.output.to.end = pass.shape.out_channels;
    pass.output.behind = {
        this->source(link.source), this->psi_of(link),
        means_[static_cast<size_t>(link.norm)].data() + this->in_norm(link.source), nullptr, false};
    return pass;
  }

  WeightGradient weight_gradient(const Link& link) const {
    WeightGradient w;
    w.shape = this->shape_of(link);
    Machine machine = machine_of<A>();
    machine.pairs = false;
    w.algorithm = this->plan_of(w.shape, machine).algorithm;
    w.input = {this->source(link.source), true, this->psi_of(link)};
    w.gradient = read(gradient_of(link.first_layer));
    w.to_stride = p.channels_of(link.source) * p.kernel_h * p.kernel_w;
    w.wide = this->wide_weights();
    const int64_t slot = (link.first_layer - 1 - link.source) * p.growth * w.to_stride;
    if (void* to = g_.weights[link.source])
      w.to = static_cast<char*>(to) + slot * this->weight_bytes();
    return w;
  }

  /// One row of the output's gradient; sums of the last layer's.
  void copy_gradient(int64_t i, double* row_sums) const {
    const int64_t n = i / p.height, y = i % p.height;
    const int64_t channels = p.out_layers * p.growth;
    A* to = gradient_of(p.hidden_layers() + 1).at(n, y, 0);
    to_adjacent_channels(
        static_cast<const T*>(g_.out.data) + n * g_.out.stride_n + y * g_.out.stride_h,
        g_.out.stride_w, g_.out.stride_c, p.width, channels, to, p.row());
    const A* last = gradient_of(p.layers).at(n, y, 0);
    for (int64_t c = 0; c < p.growth; c += kLanes<A>) {
      Vec<A> sum{};
      for (int64_t x = 0; x < p.width; ++x)
        sum += load_first<A>(last + x * p.row() + c, p.growth - c);
      add_lanes(sum, c, row_sums + i * p.growth);
    }
  }
  void add_lanes(Vec<A> sum, int64_t channel, double* sums) const {
    for (int64_t l = 0; l < std::min<int64_t>(kLanes<A>, p.growth - channel); ++l)
      sums[channel + l] = static_cast<double>(sum[l]);
  }
  void add_rows(int64_t layer, const std::vector<double>& row_sums) {
    std::vector<double>& sums = layer_sums_[static_cast<size_t>(layer - 1)];
    std::fill(sums.begin(), sums.end(), 0.0);
    for (size_t i = 0; i < row_sums.size(); ++i) sums[i % sums.size()] += row_sums[i];
  }

  /// Gradients of gamma and beta, and what they do to that of the source.
  void finish_norm(const Link& link, const std::vector<double>& sums, int64_t runs,
                   Coefficients* coefficients) const {
    const int64_t channels = p.channels_of(link.source), start = this->in_norm(link.source);
    const Norm& norm = p.norms[link.norm];
    const double count = static_cast<double>(this->pixels());
    for (int64_t c = 0; c < channels; ++c) {
      double sum = 0, sum_x = 0;
      for (int64_t t = 0; t < runs; ++t) {
        sum += sums[static_cast<size_t>(2 * (t * channels + c))];
        sum_x += sums[static_cast<size_t>(2 * (t * channels + c) + 1)];
      }
      const double rstd = this->rstd_of(link.norm, start + c);
      if (double* to = g_.norm_weights[link.norm]) to[start + c] = sum_x * rstd;
      if (double* to = g_.norm_biases[link.norm]) to[start + c] = sum;
      const double slope =
          static_cast<double>(static_cast<const A*>(norm.weight)[start + c]) * rstd;
      coefficients[c] = {static_cast<A>(slope), 0, 0};
      if (!norm.use_batch) continue;
      coefficients[c].tilt = static_cast<A>(-slope * rstd * rstd * sum_x / count);
      coefficients[c].offset = static_cast<A>(-slope * sum / count);
    }
  }

  /// One row of a source's gradient, and its sums.
  void apply_norm(const Link& link, const Parts<T>& source, int64_t i,
                  const Coefficients* coefficients, bool accumulate, double* row_sums) const {
    const int64_t n = i / p.height, y = i % p.height;
    const A* mean = means_[static_cast<size_t>(link.norm)].data() + this->in_norm(link.source);
    const Slab<A> gradients = gradient_y_of(link);
    auto row = [&](auto* to, int64_t pitch) {
      using To = std::remove_reference_t<decltype(*to)>;
      constexpr int lanes = kLanes<A>;
      source.each_group(
          lanes, [&](const Slab<const T>& x, int64_t in_part, int64_t c, int64_t, int64_t some) {
            A slopes[lanes] = {}, tilts[lanes] = {}, offsets[lanes] = {};
            for (int64_t l = 0; l < some; ++l) {
              slopes[l] = coefficients[c + l].slope;
              tilts[l] = coefficients[c + l].tilt;
              offsets[l] = coefficients[c + l].offset;
            }
            const Vec<A> slope = load(slopes), tilt = load(tilts), offset = load(offsets);
            const Vec<A> centre = load_first<A>(mean + c, some);
            Vec<A> sum{};
            auto pixels = [&](auto whole) __attribute__((always_inline)) {
              const A* dy = gradients.at(n, y, 0) + c;
              const T* from = x.at(n, y, 0) + in_part;
              To* out = to + c;
              for (int64_t w = 0; w < p.width; ++w) {
                const Vec<A> value = whole ? load<A>(from) : load_first<A>(from, some);
                const Vec<A> gradient = whole ? load(dy) : load_first<A>(dy, some);
                Vec<A> v = fma(slope, gradient, fma(tilt, value - centre, offset));
                if (accumulate) v += whole ? load<A>(out) : load_first<A>(out, some);
                sum += v;
                if (whole)
                  store<A>(out, v);
                else
                  store_first<A>(out, v, some);
                dy += gradients.stride_w;
                from += x.stride_w;
                out += pitch;
              }
            };
            if (some == lanes)
              pixels(std::true_type{});
            else
              pixels(std::false_type{});
            if (row_sums) add_lanes(sum, c, row_sums + i * p.growth);
          });
    };
    if (link.source)
      row(gradient_of(link.source).at(n, y, 0), p.row());
    else
      row(static_cast<T*>(g_.x) + i * p.width * p.in_channels, p.in_channels);
  }

  /// Each slot's bias adds to one layer: its gradient is the sum of the layer's.
  void bias_gradients() const {
    for (int64_t i = 0; i < p.layers; ++i)
      if (double* to = g_.biases[i])
        for (int64_t layer = i + 1; layer <= p.layers; ++layer)
          to = std::copy_n(layer_sums_[static_cast<size_t>(layer - 1)].begin(), p.growth, to);
  }

  const D2Gradients& g_;
  Slab<A> rows_;        // gradients of x_1 .. x_L, side by side
  Slab<A> gradient_y_;  // of psi(source), relu' applied
  std::vector<std::vector<A>> means_;
  std::vector<std::vector<double>> layer_sums_;
};

}  // namespace d3net::cpu::D3NET_ISA
