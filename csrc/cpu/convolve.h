// Correlation with packed weights: the forward pass, and (with the weights flipped and transposed
// and the gradient as its only operand) the gradient to each source.
//
// A task owns one tile of the output. It stages a chunk of channels, adds all live taps of that
// chunk to the tile's accumulators, moves on to the next chunk and the next source, and writes the
// tile once at the end: every output is rounded once, whatever the number of sources.
#pragma once

#include <vector>

#include "microkernel.h"
#include "parallel.h"
#include "tile_io.h"
#include "winograd.h"

namespace d3net::cpu::D3NET_ISA {

/// One input of a convolution: its tensor, psi, dilation, and its part of the weight,
/// addressed as [output][channel][tap row][tap col].
template <class T>
struct Operand {
  View x;
  int64_t channels, dilation_h, dilation_w;
  Activation<Accumulator<T>> psi;
  Weight weight;
};

struct Shape {
  int64_t batch, height, width, out_channels, kernel_h, kernel_w;
};

/// Turns the gradient to psi(x) into the gradient to x, and sums what scale and shift need.
template <class T>
struct PsiBackward {
  View x;
  Activation<Accumulator<T>> psi;
  double* sums = nullptr;  // [tile][channel][2]: d scale, d shift; null: not wanted
};

template <class T>
class Convolution {
  using A = Accumulator<T>;

 public:
  Convolution(const Shape& shape, std::vector<Operand<T>> operands, View out, const A* bias)
      : shape_(shape), operands_(std::move(operands)), out_(out), bias_(bias) {
    const Machine m = machine(sizeof(A));
    int64_t channels = 0;
    for (const auto& o : operands_) channels += o.channels;
    const bool winograd =
        !std::is_same_v<A, double> && prefers_winograd(shape.batch, shape.height, shape.width,
                                                       channels, shape.out_channels,
                                                       shape.kernel_w, m);
    tiling_ = choose_tiling(shape.batch, shape.height, shape.width, shape.out_channels, winograd,
                            sizeof(A), m);
    for (const auto& o : operands_) {
      windows_.push_back(choose_window(
          o.channels, shape.kernel_h, shape.kernel_w, o.dilation_h, o.dilation_w, shape.width,
          winograd && allows_winograd(o.dilation_w, shape.width, tiling_, m), tiling_, sizeof(A),
          m));
      steps_ += o.channels * shape.kernel_h * weight_cols(windows_.back());
    }
    raw_window_ = choose_window(tiling_.out_group, 1, 1, 1, 1, shape.width, false, tiling_,
                                sizeof(A), m);
  }

  /// Also turn the result into the gradient to an activated source.
  void backward_through(const PsiBackward<T>& psi) { psi_backward_ = psi; }

  int64_t pack_tasks() const {
    return ceil_div(shape_.out_channels, tiling_.blocking.out_block);
  }
  int64_t packed_size() const { return shape_.out_channels * steps_; }
  void pack_into(A* packed) { packed_ = packed; }
  int64_t tiles() const { return shape_.batch * tiling_.tiles(); }
  int64_t tasks() const { return tiles() * tiling_.out_groups; }

  /// Packs the weights of one block of outputs as [operand][chunk][tap row][tap col][channel][output],
  /// tap cols transformed where the operand's rows are.
  void pack(int64_t block) const {
    const int64_t first = block * tiling_.blocking.out_block;
    const int64_t outs = outputs_of(block);
    A* to = packed_ + first * steps_;
    for (size_t o = 0; o < operands_.size(); ++o) {
      const Weight& w = operands_[o].weight;
      const T* from = static_cast<const T*>(w.data) + first * w.stride_k;
      for (int64_t c = 0; c < operands_[o].channels; c += windows_[o].chunk) {
        const int64_t chunk = std::min(windows_[o].chunk, operands_[o].channels - c);
        for (int64_t i = 0; i < shape_.kernel_h; ++i)
          for (int64_t j = 0; j < weight_cols(windows_[o]); ++j)
            for (int64_t k = c; k < c + chunk; ++k)
              for (int64_t n = 0; n < outs; ++n) {
                const T* row = from + n * w.stride_k + k * w.stride_c + i * w.stride_h;
                auto tap = [&](int64_t col) { return load_one<A>(row + col * w.stride_w); };
                *to++ = windows_[o].winograd
                            ? transform_weight(static_cast<int>(j), tap(0), tap(1), tap(2))
                            : tap(j);
              }
      }
    }
  }

  void run(int64_t task) const {
    static thread_local Scratch staging_memory, transformed_memory, product_memory, acc_memory;
    const int64_t tile_index = task % tiles();
    const int64_t channel = task / tiles() * tiling_.out_group;
    const int64_t channels = std::min(tiling_.out_group, shape_.out_channels - channel);
    const Tile tile = tile_at(tile_index, tiling_, shape_.height, shape_.width);

    A* acc = acc_memory.get<A>(tiling_.out_group * acc_plane());
    int64_t steps = 0;  // weights of one output before the present chunk
    for (size_t o = 0; o < operands_.size(); ++o) {
      const Operand<T>& source = operands_[o];
      const Window& window = windows_[o];
      const Stager<T> stager(source.x, shape_.height, shape_.width, source.dilation_h,
                             shape_.kernel_h, tiling_, window);
      A* staging = staging_memory.get<A>(window.chunk * window.channel_stride);
      A *transformed = nullptr, *products = nullptr;
      if (window.winograd) {
        transformed = transformed_memory.get<A>(window.chunk * window.transformed_stride);
        products = product_memory.get<A>(tiling_.out_group * 2 * acc_plane());
      }
      for (int64_t c = 0; c < source.channels; c += window.chunk) {
        const int64_t chunk = std::min(window.chunk, source.channels - c);
        stager.stage(tile, c, chunk, source.psi.from_channel(c), staging);
        const Rows rows{tile, source, window, chunk, steps, channel, channels};
        if (window.winograd) {
          transform(stager, rows, staging, transformed);
          correlate_rows(rows, transformed, products, c == 0);
        } else {
          correlate_rows(rows, staging, acc, steps == 0);
        }
        steps += chunk * shape_.kernel_h * weight_cols(window);
      }
      if (window.winograd) inverse(tile, source, window, channels, products, o == 0, acc);
    }
    if (psi_backward_.x.data) apply_psi_backward(tile, tile_index, channel, channels, acc);
    if (out_.data)
      write_tile<T>(out_, tile, channel, channels, acc, acc_plane(), tiling_.cols, bias_);
  }

 private:
  int64_t acc_plane() const { return tiling_.rows * tiling_.cols; }
  int64_t outputs_of(int64_t block) const {
    return std::min(tiling_.blocking.out_block,
                    shape_.out_channels - block * tiling_.blocking.out_block);
  }

  int64_t weight_cols(const Window& window) const {
    return window.winograd ? kWinogradPlanes : shape_.kernel_w;
  }

  /// One chunk of one source's channels, and the outputs they are added to.
  struct Rows {
    const Tile& tile;
    const Operand<T>& source;
    const Window& window;
    int64_t chunk, steps, channel, channels;
  };

  void transform(const Stager<T>& stager, const Rows& rows, const A* staging,
                 A* transformed) const {
    static thread_local Scratch memory;
    const Window& w = rows.window;
    A* parts = memory.get<A>(2 * (w.pairs + w.lead));
    for (int64_t c = 0; c < rows.chunk; ++c)
      for (int64_t slot = 0; slot < w.slots; ++slot)
        if (stager.holds_row(slot, rows.tile))
          transform_row(staging + c * w.channel_stride + slot * w.pitch + w.lead, w.pairs,
                        rows.source.dilation_w, parts,
                        transformed + c * w.transformed_stride + slot * kWinogradPlanes * w.pairs,
                        w.pairs);
  }

  void inverse(const Tile& tile, const Operand<T>& source, const Window& window,
               int64_t channels, const A* products, bool first, A* acc) const {
    for (int64_t k = 0; k < channels; ++k)
      for (int64_t r = 0; r < tile.rows; ++r)
        inverse_row(products + k * 2 * acc_plane() + r * window.pairs,
                    tiling_.rows * window.pairs, window.pairs, source.dilation_w, first,
                    acc + k * acc_plane() + r * tiling_.cols);
  }

  /// Adds all live taps of a chunk. Direct rows are one plane whose horizontal taps are shifts;
  /// transformed rows are four planes, each with accumulators of its own and no horizontal tap.
  void correlate_rows(const Rows& rows, const A* x, A* acc, bool first) const {
    constexpr int lanes = kLanes<A>;
    const auto& [tile, source, window, chunk, steps, channel, channels] = rows;
    const int64_t kb = tiling_.blocking.out_block, pv = tiling_.blocking.pixel_vectors;
    const int64_t planes = window.winograd ? kWinogradPlanes : 1;
    const int64_t pitch = window.winograd ? kWinogradPlanes * window.pairs : window.pitch;
    const int64_t acc_cols = window.winograd ? window.pairs : tiling_.cols;
    const int64_t vectors = window.winograd ? window.pairs / lanes : ceil_div(tile.cols, lanes);

    CorrelateArgs<A> args;
    args.channels = chunk;
    args.channel_stride = window.winograd ? window.transformed_stride : window.channel_stride;
    args.tap_row_step = window.tap_rows * pitch;
    args.tap_col_step = source.dilation_w;
    args.acc_stride = planes * tiling_.rows * acc_cols;
    args.first = first;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const LiveTaps live_rows =
          live_taps(tile.row + r, 1, shape_.height, shape_.kernel_h, source.dilation_h);
      args.tap_rows = live_rows.count;
      const A* row = x + r * pitch + live_rows.first * args.tap_row_step;
      for (int64_t plane = 0; plane < planes; ++plane) {
        for (int64_t v = 0; v < vectors; v += pv) {
          const int64_t width = std::min(pv, vectors - v);
          LiveTaps live_cols{plane, 1};
          args.x = row + plane * window.pairs + v * lanes;
          if (!window.winograd) {
            const int64_t pixels = std::min(width * lanes, tile.cols - v * lanes);
            live_cols = live_taps(tile.col + v * lanes, pixels, shape_.width, shape_.kernel_w,
                                  source.dilation_w);
            args.x += window.lead + (live_cols.first - shape_.kernel_w / 2) * source.dilation_w;
          }
          args.tap_cols = live_cols.count;
          for (int64_t k = channel; k < channel + channels; k += kb) {
            const int64_t outs = outputs_of(k / kb);
            args.w_tap_row_step = weight_cols(window) * chunk * outs;
            args.w = packed_ + k * steps_ + steps * outs + live_rows.first * args.w_tap_row_step +
                     live_cols.first * chunk * outs;
            args.acc = acc + (k - channel) * args.acc_stride +
                       (plane * tiling_.rows + r) * acc_cols + v * lanes;
            kCorrelate<A>[outs - 1][width - 1](args);
          }
        }
      }
    }
  }

  /// acc *= psi'(x); sums over the tile of acc * relu'(x) * x and acc * relu'(x), per channel.
  void apply_psi_backward(const Tile& tile, int64_t tile_index, int64_t channel, int64_t channels,
                          A* acc) const {
    static thread_local Scratch memory;
    constexpr int lanes = kLanes<A>;
    A* raw = memory.get<A>(tiling_.out_group * raw_window_.channel_stride);
    const Stager<T> stager(psi_backward_.x, shape_.height, shape_.width, 1, 1, tiling_,
                           raw_window_);
    stager.stage(tile, channel, channels, {}, raw);
    const Activation<A> psi = psi_backward_.psi.from_channel(channel);
    for (int64_t c = 0; c < channels; ++c) {
      const Vec<A> scale = broadcast(psi.scale ? psi.scale[c] : A{1});
      const Vec<A> shift = broadcast(psi.scale ? psi.shift[c] : A{0});
      double sum_scale = 0, sum_shift = 0;
      for (int64_t r = 0; r < tile.rows; ++r) {
        A* g = acc + c * acc_plane() + r * tiling_.cols;
        const A* x = raw + c * raw_window_.channel_stride + r * raw_window_.pitch;
        Vec<A> row_scale{}, row_shift{};
        for (int64_t i = 0; i < tile.cols; i += lanes) {
          const Vec<A> value = load(x + i), y = fma(value, scale, shift);
          const Mask<A> dead = psi.relu ? (y <= 0) : Mask<A>{};
          const Mask<A> inside = first_lanes<A>(tile.cols - i);
          const Vec<A> gradient = inside & ~dead ? load(g + i) : Vec<A>{};
          row_scale = fma(gradient, value, row_scale);
          row_shift += gradient;
          store(g + i, gradient * scale);
        }
        sum_scale += static_cast<double>(sum_lanes<A>(row_scale));
        sum_shift += static_cast<double>(sum_lanes<A>(row_shift));
      }
      if (psi_backward_.sums) {
        double* to = psi_backward_.sums + (tile_index * shape_.out_channels + channel + c) * 2;
        to[0] = sum_scale;
        to[1] = sum_shift;
      }
    }
  }

  Shape shape_;
  std::vector<Operand<T>> operands_;
  View out_;
  const A* bias_;
  PsiBackward<T> psi_backward_;
  Tiling tiling_;
  std::vector<Window> windows_;
  Window raw_window_;
  int64_t steps_ = 0;  // packed weights of one output
  A* packed_ = nullptr;
};

/// Runs convolutions together, weights packed first, in one parallel region.
template <class T>
void run_all(std::vector<Convolution<T>>& convolutions) {
  static thread_local Scratch packed_memory;
  int64_t size = 0, packs = 0, tasks = 0;
  for (const auto& c : convolutions) {
    size += round_up(c.packed_size(), 64);
    packs += c.pack_tasks();
    tasks += c.tasks();
  }
  auto* packed = packed_memory.get<Accumulator<T>>(size);
  for (auto& c : convolutions) {
    c.pack_into(packed);
    packed += round_up(c.packed_size(), 64);
  }
  WorkQueue packing(packs), computing(tasks);
  auto body = [&] {
    packing.work([&](int64_t i) {
      size_t c = 0;
      while (i >= convolutions[c].pack_tasks()) i -= convolutions[c++].pack_tasks();
      convolutions[c].pack(i);
    });
    packing.wait();
    computing.work([&](int64_t i) {
      size_t c = 0;
      while (i >= convolutions[c].tasks()) i -= convolutions[c++].tasks();
      convolutions[c].run(i);
    });
  };
  on_all_threads(body);
}

}  // namespace d3net::cpu::D3NET_ISA
