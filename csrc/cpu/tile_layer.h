// One multidilated convolution on tiles, forward and backward: source after source, all of them in
// channels_last memory order.
#pragma once

#include <vector>

#include "packed_weights.h"
#include "tile_weight_grad.h"

namespace d3net::cpu::D3NET_ISA {

/// Tiles serve where all channels are adjacent, so that nothing is transposed, and where what is
/// made fills its vectors well; otherwise rows of pixels are faster (measured on D3Net's layers).
class TileLayer {
  using Pass = TilePass<float, float, float>;
  using WeightGradient = TileWeightGradient<float, float>;

 public:
  explicit TileLayer(const Problem& problem) : p(problem) {}

  bool forward(const float* bias, const View& out) const {
    if (!adjacent(out) || !fills_vectors(p.out_channels)) return false;
    std::vector<Pass> passes;
    each_group([&](const Group& g) {
      Pass& pass = passes.emplace_back();
      pass.shape = shape_of(g);
      pass.plan = plan_of(pass.shape);
      pass.input = input_of(g);
      pass.weight = weight_of(g);
      pass.output.to = destination(out, p.out_channels);
      pass.output.bias = g.channel == 0 ? bias : nullptr;
      pass.output.accumulate = g.channel > 0;
    });
    run(passes);
    return true;
  }

  /// As Kernels::backward_data has it.
  bool backward_data(const View& gradient, const View* grad_inputs, double* psi_sums) const {
    if (!adjacent(gradient)) return false;
    int64_t filled = 0;
    for (int64_t i = 0; i < p.num_sources; ++i) {
      if (!grad_inputs[i].data || grad_inputs[i].stride_c != 1) return false;
      filled += round_up(p.sources[i].channels, kLanes<float>);
    }
    if (!fills_vectors(p.in_channels) || 4 * p.in_channels < 3 * filled) return false;
    std::vector<Pass> passes;
    std::vector<std::vector<double>> sums(static_cast<size_t>(p.num_sources));
    const std::vector<float> zeros(static_cast<size_t>(p.in_channels));
    int64_t channel = 0;
    for (int64_t i = 0; i < p.num_sources; ++i) {
      const Group g{i, i + 1, channel, p.sources[i].channels};
      Pass& pass = passes.emplace_back();
      pass.shape = shape_of(g).transposed();
      pass.plan = plan_of(pass.shape);
      pass.input.parts.add(slab<const float>(gradient), p.out_channels);
      pass.weight = transposed(weight_of(g), p.kernel_h, p.kernel_w, sizeof(float));
      pass.output.to = destination(grad_inputs[i], g.channels);
      if (p.psi.scale || p.psi.relu) {
        std::vector<double>& of_source = sums[static_cast<size_t>(i)];
        of_source.resize(static_cast<size_t>(2 * pass.runs() * g.channels));
        const TileInput<float, float> input = input_of(g);
        pass.output.behind = {input.parts, input.psi, zeros.data(), of_source.data(), true};
      }
      channel += g.channels;
    }
    run(passes);
    if (!psi_sums) return true;
    for (size_t i = 0; i < passes.size(); ++i)
      for (int64_t c = 0; c < p.sources[i].channels; ++c, psi_sums += 2) {
        double gradient_sum = 0, with_x = 0;
        for (int64_t r = 0; r < passes[i].runs(); ++r) {
          const double* of_run = &sums[i][static_cast<size_t>(2 * (r * p.sources[i].channels + c))];
          gradient_sum += of_run[0];
          with_x += of_run[1];
        }
        psi_sums[0] = with_x;
        psi_sums[1] = gradient_sum;
      }
    return true;
  }

  bool backward_weight(const View& gradient, float* weight, float* bias) const {
    if (!adjacent(gradient) || !fills_vectors(p.out_channels)) return false;
    static thread_local Scratch memory;
    std::vector<WeightGradient> gradients;
    Machine machine = machine_of<float>();
    machine.pairs = false;
    int64_t size = 0;
    each_group([&](const Group& g) {
      WeightGradient& w = gradients.emplace_back();
      w.shape = shape_of(g);
      w.algorithm = plan_of(w.shape, machine).algorithm;
      w.input = input_of(g);
      w.gradient = slab<const float>(gradient);
      w.to = weight + g.channel * p.kernel_h * p.kernel_w;
      w.to_stride = p.in_channels * p.kernel_h * p.kernel_w;
      size = std::max(size, w.workspace_size());
    });
    const Borrowed<float> workspace(memory, size);
    const int64_t rows = p.batch * p.height;
    std::vector<double> row_sums(static_cast<size_t>(rows * p.out_channels));
    auto program = [&](Crew::Worker& worker) {
      worker.each(rows, [&](int64_t i, int64_t) { sum_row(gradient, i, row_sums.data()); });
      for (const WeightGradient& w : gradients) w.run(worker, workspace.get());
    };
    Crew::run(program, p.multiplications());
    for (int64_t c = 0; c < p.out_channels; ++c) {
      double sum = 0;
      for (int64_t i = 0; i < rows; ++i)
        sum += row_sums[static_cast<size_t>(i * p.out_channels + c)];
      bias[c] = static_cast<float>(sum);
    }
    return true;
  }

 private:
  /// Sources that one pass reads together, and their channels among all.
  struct Group {
    int64_t first, last;  // of sources: [first, last)
    int64_t channel, channels;
  };

  /// Kernels of one tap do not tell sources apart, whatever their dilations.
  template <class F>
  void each_group(F&& item) const {
    if (p.kernel_h * p.kernel_w == 1) return item(Group{0, p.num_sources, 0, p.in_channels});
    int64_t channel = 0;
    for (int64_t i = 0; i < p.num_sources; channel += p.sources[i++].channels)
      item(Group{i, i + 1, channel, p.sources[i].channels});
  }

  bool adjacent(const View& other) const {
    if (p.dtype != DType::float32 || p.kernel_h * p.kernel_w > kMostTaps || other.stride_c != 1)
      return false;
    for (int64_t i = 0; i < p.num_sources; ++i)
      if (p.sources[i].x.stride_c != 1) return false;
    return true;
  }
  static bool fills_vectors(int64_t channels) {
    constexpr int64_t lanes = kLanes<float>;
    return 2 * channels >= 3 * lanes && 4 * channels >= 3 * round_up(channels, lanes);
  }

  template <class E>
  static Slab<E> slab(const View& v) {
    return {static_cast<E*>(v.data), v.stride_n, v.stride_h, v.stride_w};
  }
  static Destination<float> destination(const View& out, int64_t channels) {
    Destination<float> to;
    to.low = slab<float>(out);
    to.cut = to.end = channels;
    return to;
  }
  PassShape shape_of(const Group& g) const {
    const Source& source = p.sources[g.first];
    return {p.batch,    p.height,   p.width,           g.channels,        p.out_channels,
            p.kernel_h, p.kernel_w, source.dilation_h, source.dilation_w, g.last - g.first};
  }
  PassPlan plan_of(const PassShape& shape, Machine machine = machine_of<float>()) const {
    return plan_pass(shape, p.precision, false, machine);
  }
  TileInput<float, float> input_of(const Group& g) const {
    TileInput<float, float> input;
    for (int64_t i = g.first; i < g.last; ++i)
      input.parts.add(slab<const float>(p.sources[i].x), p.sources[i].channels);
    input.psi = Activation<float>{static_cast<const float*>(p.psi.scale),
                                  static_cast<const float*>(p.psi.shift), p.psi.relu}
                    .from_channel(g.channel);
    input.activated = p.psi.scale || p.psi.relu;
    return input;
  }
  Weight weight_of(const Group& g) const {
    Weight w = p.weight;
    w.data = static_cast<const float*>(w.data) + g.channel * w.stride_c;
    return w;
  }

  void run(const std::vector<Pass>& passes) const {
    PackedWeights<Pass> packed(passes, false);
    auto program = [&](Crew::Worker& worker) {
      packed.prepare(worker);
      for (size_t i = 0; i < passes.size(); ++i)
        worker.each(passes[i].tasks(),
                    [&](int64_t task, int64_t next) { passes[i].run(task, next, packed.of(i)); });
    };
    Crew::run(program, p.multiplications());
  }

  void sum_row(const View& gradient, int64_t row, double* sums) const {
    const float* first = slab<const float>(gradient).at(row / p.height, row % p.height, 0);
    for (int64_t c = 0; c < p.out_channels; c += kLanes<float>) {
      const int64_t some = std::min<int64_t>(kLanes<float>, p.out_channels - c);
      Vec<float> sum{};
      for (int64_t x = 0; x < p.width; ++x)
        sum += load_first<float>(first + x * gradient.stride_w + c, some);
      for (int64_t l = 0; l < some; ++l)
        sums[row * p.out_channels + c + l] = static_cast<double>(sum[l]);
    }
  }

  const Problem& p;
};

}  // namespace d3net::cpu::D3NET_ISA
