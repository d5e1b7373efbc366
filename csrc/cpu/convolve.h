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

/// Brings the rows of the next chunk to L2 while the present one is computed, a few lines before
/// each microkernel call.
class Prefetcher {
  static constexpr int64_t kLine = 64;

 public:
  void aim_at_nothing() {
    runs_.clear();
    lines_ = 0;
  }
  template <class T>
  void aim(const Stager<T>& stager, const Tile& tile, int64_t channel, int64_t channels) {
    aim_at_nothing();
    stager.for_each_run(tile, channel, channels, [&](const void* begin, int64_t bytes) {
      runs_.push_back({static_cast<const char*>(begin), ceil_div(bytes, kLine) + 1});
      lines_ += runs_.back().lines;
    });
    run_ = runs_.begin();
  }
  /// Divides what is aimed at among `steps` calls of step().
  void share(int64_t steps) { per_step_ = ceil_div(lines_, steps); }
  void step() {
    for (int64_t n = std::min(per_step_, lines_); n > 0; --n, --lines_) {
      if (run_->lines == 0) ++run_;
      __builtin_prefetch(run_->at, 0, 2);
      run_->at += kLine;
      --run_->lines;
    }
  }

 private:
  struct Run {
    const char* at;
    int64_t lines;
  };
  std::vector<Run> runs_;
  std::vector<Run>::iterator run_;
  int64_t lines_ = 0, per_step_ = 0;
};

template <class T>
class Convolution {
  using A = Accumulator<T>;

 public:
  Convolution(const Shape& shape, std::vector<Operand<T>> operands, View out, const A* bias)
      : shape_(shape), operands_(std::move(operands)), out_(out), bias_(bias) {
    const Machine m = machine(sizeof(A));
    int64_t channels = 0, dilation_h = 1;
    for (const auto& o : operands_) {
      channels += o.channels;
      dilation_h = std::max(dilation_h, o.dilation_h);
    }
    const bool winograd =
        !std::is_same_v<A, double> &&
        prefers_winograd(shape.width, channels, shape.out_channels, shape.kernel_w, m);
    tiling_ = choose_tiling(shape.batch, shape.height, shape.width, shape.out_channels,
                            shape.kernel_h, dilation_h, winograd, sizeof(A), m);
    for (const auto& o : operands_) {
      windows_.push_back(choose_window(
          o.channels, shape.kernel_h, shape.kernel_w, o.dilation_h, o.dilation_w, shape.width,
          winograd && allows_winograd(o.dilation_w, shape.width, tiling_, m), tiling_, sizeof(A),
          m));
      steps_ += o.channels * shape.kernel_h * weight_cols(windows_.back());
    }
    raw_window_ =
        choose_window(tiling_.out_group, 1, 1, 1, 1, shape.width, false, tiling_, sizeof(A), m);
  }

  /// Also turn the result into the gradient to an activated source.
  void backward_through(const PsiBackward<T>& psi) { psi_backward_ = psi; }

  int64_t pack_tasks() const { return ceil_div(shape_.out_channels, tiling_.blocking.out_block); }
  int64_t packed_size() const { return shape_.out_channels * steps_; }
  void pack_into(A* packed) { packed_ = packed; }
  int64_t tiles() const { return shape_.batch * tiling_.tiles(); }
  int64_t tasks() const { return tiles() * tiling_.out_groups; }

  /// Packs the weights of one block of outputs; the order is operand, chunk, tap row, tap col,
  /// channel, output. Tap cols are transformed where the operand's rows are.
  void pack(int64_t block) const {
    const int64_t first = block * tiling_.blocking.out_block;
    const int64_t outs = outputs_of(block);
    A* to = packed_ + first * steps_;
    for (size_t o = 0; o < operands_.size(); ++o) {
      const Weight& w = operands_[o].weight;
      const T* from = static_cast<const T*>(w.data) + first * w.stride_k;
      for (int64_t c = 0; c < operands_[o].channels; c += windows_[o].chunk) {
        const int64_t chunk = std::min(windows_[o].chunk, operands_[o].channels - c);
        const int64_t cols = weight_cols(windows_[o]);
        for (int64_t k = 0; k < chunk; ++k)
          for (int64_t i = 0; i < shape_.kernel_h; ++i) {
            const T* row = from + (c + k) * w.stride_c + i * w.stride_h;
            A* at = to + (i * cols * chunk + k) * outs;
            if (windows_[o].winograd)
              for (int64_t n = 0; n < outs; ++n, row += w.stride_k, ++at)
                transform_weights(load_one<A>(row), load_one<A>(row + w.stride_w),
                                  load_one<A>(row + 2 * w.stride_w), at, chunk * outs);
            else
              for (int64_t n = 0; n < outs; ++n, row += w.stride_k, ++at)
                for (int64_t j = 0; j < cols; ++j)
                  at[j * chunk * outs] = load_one<A>(row + j * w.stride_w);
          }
        to += shape_.kernel_h * cols * chunk * outs;
      }
    }
  }

  /// next: the task this thread will run after it (-1: none), whose rows are prefetched.
  void run(int64_t task, int64_t next) const {
    static thread_local Scratch staging_memory, acc_memory;
    const int64_t tile_index = task % tiles();
    const int64_t channel = task / tiles() * tiling_.out_group;
    const int64_t channels = std::min(tiling_.out_group, shape_.out_channels - channel);
    const Tile tile = tile_of(task);
    static thread_local Prefetcher prefetcher;
    prefetcher.aim_at_nothing();

    A* acc = acc_memory.get<A>(tiling_.out_group * acc_plane());
    int64_t steps = 0;  // weights of one output before the present chunk
    for (size_t o = 0; o < operands_.size(); ++o) {
      const Operand<T>& source = operands_[o];
      const Window& window = windows_[o];
      const Stager<T> stager = stager_of(o);
      A* staging = staging_memory.get<A>(
          window.chunk * (window.winograd ? window.transformed_stride : window.channel_stride));
      for (int64_t c = 0; c < source.channels; c += window.chunk) {
        const int64_t chunk = std::min(window.chunk, source.channels - c);
        const Rows rows{tile, source, window, chunk, steps, channel, channels};
        if (c + chunk < source.channels)
          prefetcher.aim(stager, tile, c + chunk,
                         std::min(window.chunk, source.channels - c - chunk));
        else if (o + 1 < operands_.size())
          prefetcher.aim(stager_of(o + 1), tile, 0, windows_[o + 1].chunk);
        else if (next >= 0)
          prefetcher.aim(stager_of(0), tile_of(next), 0, windows_[0].chunk);
        else
          prefetcher.aim_at_nothing();
        prefetcher.share(correlations(rows));
        if (window.winograd) {
          stage_transformed(stager, rows, c, staging);
          correlate_transformed(rows, staging, acc, prefetcher);
        } else {
          stager.stage(tile, c, chunk, source.psi.from_channel(c), staging);
          correlate_direct(rows, staging, acc, prefetcher);
        }
        steps += chunk * shape_.kernel_h * weight_cols(window);
      }
    }
    if (psi_backward_.x.data) apply_psi_backward(tile, tile_index, channel, channels, acc);
    if (out_.data)
      write_tile<T>(out_, tile, channel, channels, acc, acc_plane(), tiling_.cols, bias_);
  }

 private:
  Tile tile_of(int64_t task) const {
    return tile_at(task % tiles(), tiling_, shape_.height, shape_.width);
  }
  Stager<T> stager_of(size_t operand) const {
    const Operand<T>& o = operands_[operand];
    return {o.x,     shape_.height,    shape_.width, o.dilation_h, shape_.kernel_h,
            tiling_, windows_[operand]};
  }
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

  /// Microkernel calls of a chunk.
  int64_t correlations(const Rows& rows) const {
    const int64_t unit = kLanes<A> * tiling_.blocking.pixel_vectors;
    const int64_t columns = rows.window.winograd
                                ? kWinogradPlanes * ceil_div(rows.window.pairs, unit)
                                : ceil_div(rows.tile.cols, unit);
    return rows.tile.rows * columns * ceil_div(rows.channels, tiling_.blocking.out_block);
  }

  /// Stages a chunk's rows, a few channels at a time, and transforms them while they are in L1.
  void stage_transformed(const Stager<T>& stager, const Rows& rows, int64_t channel,
                         A* transformed) const {
    static thread_local Scratch memory;
    constexpr int64_t group = kLanes<A>;
    const Window& w = rows.window;
    A* staged = memory.get<A>(group * w.pitch + 2 * (w.pairs + w.lead));
    A* parts = staged + group * w.pitch;
    for (int64_t slot = 0; slot < w.slots; ++slot) {
      if (!stager.holds_row(slot, rows.tile)) continue;
      for (int64_t c = 0; c < rows.chunk; c += group) {
        const int64_t channels = std::min(group, rows.chunk - c);
        stager.stage_row(rows.tile, slot, channel + c, channels,
                         rows.source.psi.from_channel(channel + c), staged, w.pitch);
        for (int64_t i = 0; i < channels; ++i)
          transform_row(
              staged + i * w.pitch + w.lead, w.pairs, rows.source.dilation_w, parts,
              transformed + (c + i) * w.transformed_stride + slot * kWinogradPlanes * w.pairs,
              w.pairs);
      }
    }
  }

  /// Arguments common to all of a chunk's microkernels on one row; x is at its first live tap row.
  CorrelateArgs<A> row_args(const Rows& rows, int64_t r, const A* x, int64_t pitch,
                            int64_t channel_stride, LiveTaps live_rows) const {
    CorrelateArgs<A> args;
    args.channels = rows.chunk;
    args.channel_stride = channel_stride;
    args.tap_rows = live_rows.count;
    args.tap_row_step = rows.window.tap_rows * pitch;
    args.tap_cols = 1;
    args.tap_col_step = rows.source.dilation_w;
    args.x = x + r * pitch + live_rows.first * args.tap_row_step;
    return args;
  }

  /// Points args at the weights of the block of outputs that starts at k; returns its size.
  int64_t aim_weights(const Rows& rows, int64_t k, int64_t tap_row, int64_t tap_col,
                      CorrelateArgs<A>& args) const {
    const int64_t outs = outputs_of(k / tiling_.blocking.out_block);
    args.w_tap_row_step = weight_cols(rows.window) * rows.chunk * outs;
    args.w = packed_ + k * steps_ + rows.steps * outs + tap_row * args.w_tap_row_step +
             tap_col * rows.chunk * outs;
    return outs;
  }

  LiveTaps live_rows_of(const Rows& rows, int64_t r) const {
    return live_taps(rows.tile.row + r, 1, shape_.height, shape_.kernel_h, rows.source.dilation_h);
  }

  /// f(first vector, vectors) over nearly equal parts of at most blocking.pixel_vectors.
  template <class F>
  D3NET_INLINE void for_vector_blocks(int64_t vectors, F&& f) const {
    int64_t blocks = ceil_div(vectors, tiling_.blocking.pixel_vectors);
    for (int64_t v = 0, width; v < vectors; v += width, --blocks)
      f(v, width = ceil_div(vectors - v, blocks));
  }

  /// Adds a chunk's live taps to the accumulators; a horizontal tap is a shift of the staged row.
  void correlate_direct(const Rows& rows, const A* staging, A* acc, Prefetcher& prefetcher) const {
    constexpr int lanes = kLanes<A>;
    const auto& [tile, source, window, chunk, steps, channel, channels] = rows;
    for (int64_t r = 0; r < tile.rows; ++r) {
      const LiveTaps live_rows = live_rows_of(rows, r);
      CorrelateArgs<A> args =
          row_args(rows, r, staging + window.lead, window.pitch, window.channel_stride, live_rows);
      args.acc_stride = acc_plane();
      args.first = steps == 0;
      const A* row = args.x;
      for_vector_blocks(ceil_div(tile.cols, lanes), [&](int64_t v, int64_t width) {
        const int64_t pixels = std::min(width * lanes, tile.cols - v * lanes);
        const LiveTaps live_cols = live_taps(tile.col + v * lanes, pixels, shape_.width,
                                             shape_.kernel_w, source.dilation_w);
        args.tap_cols = live_cols.count;
        args.x = row + v * lanes + (live_cols.first - shape_.kernel_w / 2) * source.dilation_w;
        for (int64_t k = channel; k < channel + channels; k += tiling_.blocking.out_block) {
          const int64_t outs = aim_weights(rows, k, live_rows.first, live_cols.first, args);
          args.acc = acc + (k - channel) * acc_plane() + r * tiling_.cols + v * lanes;
          prefetcher.step();
          kCorrelate<A>[outs - 1][width - 1](args);
        }
      });
    }
  }

  /// The same on transformed rows: each plane is a product of its own without horizontal taps; the
  /// products of a few vectors stay in L1 until the inverse transform adds them up.
  void correlate_transformed(const Rows& rows, const A* transformed, A* acc,
                             Prefetcher& prefetcher) const {
    static thread_local Scratch memory;
    constexpr int lanes = kLanes<A>;
    const auto& [tile, source, window, chunk, steps, channel, channels] = rows;
    const int64_t plane_step = tiling_.blocking.pixel_vectors * lanes;
    A* products = memory.get<A>(tiling_.out_group * kWinogradPlanes * plane_step);
    for (int64_t r = 0; r < tile.rows; ++r) {
      const LiveTaps live_rows = live_rows_of(rows, r);
      CorrelateArgs<A> args = row_args(rows, r, transformed, kWinogradPlanes * window.pairs,
                                       window.transformed_stride, live_rows);
      args.acc_stride = kWinogradPlanes * plane_step;
      args.first = true;
      const A* row = args.x;
      for_vector_blocks(window.pairs / lanes, [&](int64_t v, int64_t width) {
        for (int64_t plane = 0; plane < kWinogradPlanes; ++plane) {
          args.x = row + plane * window.pairs + v * lanes;
          for (int64_t k = channel; k < channel + channels; k += tiling_.blocking.out_block) {
            const int64_t outs = aim_weights(rows, k, live_rows.first, plane, args);
            args.acc = products + (k - channel) * args.acc_stride + plane * plane_step;
            prefetcher.step();
            kCorrelate<A>[outs - 1][width - 1](args);
          }
        }
        for (int64_t k = 0; k < channels; ++k)
          inverse_row(products + k * args.acc_stride, plane_step, v * lanes, width * lanes,
                      source.dilation_w, steps == 0, acc + k * acc_plane() + r * tiling_.cols);
      });
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

/// Runs convolutions of so much work together, weights packed first, in one parallel region; the
/// amount as in Crew::run.
template <class T>
void run_all(std::vector<Convolution<T>>& convolutions, int64_t multiplications,
             int64_t numbers = 0) {
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
  auto program = [&](Crew::Worker& worker) {
    worker.each(packs, [&](int64_t i, int64_t) {
      size_t c = 0;
      while (i >= convolutions[c].pack_tasks()) i -= convolutions[c++].pack_tasks();
      convolutions[c].pack(i);
    });
    worker.each(tasks, [&](int64_t i, int64_t next) {
      size_t c = 0;
      while (i >= convolutions[c].tasks()) {
        next -= convolutions[c].tasks();
        i -= convolutions[c++].tasks();
      }
      convolutions[c].run(i, next < convolutions[c].tasks() ? next : -1);
    });
  };
  Crew::run(program, multiplications, numbers);
}

}  // namespace d3net::cpu::D3NET_ISA
