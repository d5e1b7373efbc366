// The D2 block backward: of each link, in reverse order, the gradients of the weight and of what
// psi gave, then of the source; in one parallel region.
#pragma once

#include <vector>

#include "d2_links.h"
#include "packed_weights.h"
#include "relayout.h"
#include "tile_weight_grad.h"

namespace d3net::cpu::D3NET_ISA {

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
