// The gradient to the weight and the bias.
//
//   dW[k, c, tap] = sum over pixels of g[k, pixel] * psi(x)[c, pixel + shift of tap]
//
// Pixels are cut into tiles; a block of g's channels of a tile stays in L1 while every channel and
// tap of x passes by. Tiles are dealt to a fixed number of partial sums, added in order at the end:
// no atomics, the same bits for any number of threads.
#pragma once

#include <vector>

#include "microkernel.h"
#include "parallel.h"
#include "tile_io.h"

namespace d3net::cpu::D3NET_ISA {

template <class T>
class WeightGradient {
  using A = Accumulator<T>;

 public:
  WeightGradient(const Problem& p, const View& gradient)
      : p_(p),
        gradient_(gradient),
        taps_(p.kernel_h * p.kernel_w),
        row_(p.in_channels * taps_ + 1) {
    const Machine m = machine(sizeof(A));
    const auto plan = choose_reduction_tiling(p.batch, p.height, p.width, p.out_channels,
                                              kMaxReduceBlock, row_ * p.out_channels, sizeof(A), m);
    tiling_ = plan.tiling;
    parts_ = plan.parts;
    for (int64_t i = 0; i < p.num_sources; ++i) {
      const Source& s = p.sources[i];
      windows_.push_back(choose_window(s.channels, p.kernel_h, p.kernel_w, s.dilation_h,
                                       s.dilation_w, p.width, false, tiling_, sizeof(A), m));
    }
    gradient_window_ =
        choose_window(tiling_.out_group, 1, 1, 1, 1, p.width, false, tiling_, sizeof(A), m);
  }

  /// weight: contiguous (K, sum C_i, kh, kw); bias: (K,).
  void run(T* weight, T* bias) {
    static thread_local Scratch memory;
    partial_ = memory.get<A>(parts_ * p_.out_channels * row_);
    auto program = [&](Crew::Worker& worker) {
      worker.each(parts_ * tiling_.out_groups, [&](int64_t i, int64_t) {
        sum_part(i / tiling_.out_groups, i % tiling_.out_groups);
      });
      worker.each(p_.out_channels, [&](int64_t k, int64_t) { add_parts(k, weight, bias); });
    };
    Crew::run(program, p_.multiplications());
  }

 private:
  A* partial(int64_t part, int64_t k) const {
    return partial_ + (part * p_.out_channels + k) * row_;
  }

  void sum_part(int64_t part, int64_t group) const {
    static thread_local Scratch gradient_memory, staging_memory;
    const int64_t channel = group * tiling_.out_group;
    const int64_t channels = std::min(tiling_.out_group, p_.out_channels - channel);
    std::memset(partial(part, channel), 0, static_cast<size_t>(channels * row_) * sizeof(A));

    A* g = gradient_memory.get<A>(tiling_.out_group * gradient_window_.channel_stride);
    const Stager<T> gradient_stager(gradient_, p_.height, p_.width, 1, 1, tiling_,
                                    gradient_window_);
    for (int64_t t = part; t < p_.batch * tiling_.tiles(); t += parts_) {
      const Tile tile = tile_at(t, tiling_, p_.height, p_.width);
      gradient_stager.stage(tile, channel, channels, {}, g);
      add_bias(tile, part, channel, channels, g);
      int64_t first_channel = 0;
      for (int64_t s = 0; s < p_.num_sources; ++s) {
        const Source& source = p_.sources[s];
        const Window& window = windows_[static_cast<size_t>(s)];
        const Stager<T> stager(source.x, p_.height, p_.width, source.dilation_h, p_.kernel_h,
                               tiling_, window);
        A* x = staging_memory.get<A>(window.chunk * window.channel_stride);
        const Activation<A> psi{static_cast<const A*>(p_.psi.scale),
                                static_cast<const A*>(p_.psi.shift), p_.psi.relu};
        for (int64_t c = 0; c < source.channels; c += window.chunk) {
          const int64_t chunk = std::min(window.chunk, source.channels - c);
          stager.stage(tile, c, chunk, psi.from_channel(first_channel + c), x);
          reduce_chunk(tile, source, window, x, chunk, part, first_channel + c, g, channel,
                       channels);
        }
        first_channel += source.channels;
      }
    }
  }

  void add_bias(const Tile& tile, int64_t part, int64_t channel, int64_t channels,
                const A* g) const {
    for (int64_t k = 0; k < channels; ++k) {
      Vec<A> sum{};
      for (int64_t r = 0; r < tile.rows; ++r) {
        const A* row = g + k * gradient_window_.channel_stride + r * gradient_window_.pitch;
        for (int64_t i = 0; i < tile.cols; i += kLanes<A>) sum += load(row + i);
      }
      partial(part, channel + k)[row_ - 1] += sum_lanes<A>(sum);
    }
  }

  void reduce_chunk(const Tile& tile, const Source& source, const Window& window, const A* x,
                    int64_t chunk, int64_t part, int64_t first_channel, const A* g, int64_t channel,
                    int64_t channels) const {
    const LiveTaps cols = live_taps(tile.col, tile.cols, p_.width, p_.kernel_w, source.dilation_w);
    ReduceArgs<A> args;
    args.g_plane = gradient_window_.channel_stride;
    args.g_row = gradient_window_.pitch;
    args.x_row = window.pitch;
    args.tap_step = source.dilation_w;
    args.vectors = ceil_div(tile.cols, kLanes<A>);
    args.out_stride = row_;
    for (int64_t k = 0; k < channels; k += tiling_.blocking.out_block) {
      const int64_t outs = std::min(tiling_.blocking.out_block, channels - k);
      for (int64_t c = 0; c < chunk; ++c) {
        for (int64_t i = 0; i < p_.kernel_h; ++i) {
          // Rows of the tile whose tap i lies inside the map.
          const int64_t shift = (i - p_.kernel_h / 2) * source.dilation_h;
          const int64_t first = std::max<int64_t>(0, -shift - tile.row);
          const int64_t last = std::min(tile.rows, p_.height - shift - tile.row);
          if (first >= last) continue;
          args.rows = last - first;
          args.g = g + k * gradient_window_.channel_stride + first * gradient_window_.pitch;
          const A* row = x + c * window.channel_stride +
                         (first + i * window.tap_rows) * window.pitch + window.lead;
          for (int64_t j = cols.first; j < cols.first + cols.count; j += kMaxTaps) {
            const int64_t taps = std::min<int64_t>(kMaxTaps, cols.first + cols.count - j);
            args.x = row + (j - p_.kernel_w / 2) * source.dilation_w;
            args.out = partial(part, channel + k) +
                       ((first_channel + c) * p_.kernel_h + i) * p_.kernel_w + j;
            kReduce<A>[outs - 1][taps - 1](args);
          }
        }
      }
    }
  }

  void add_parts(int64_t k, T* weight, T* bias) const {
    for (int64_t i = 0; i < row_; ++i) {
      A sum = 0;
      for (int64_t part = 0; part < parts_; ++part) sum += partial(part, k)[i];
      store_one<A>(i + 1 < row_ ? weight + k * (row_ - 1) + i : bias + k, sum);
    }
  }

  const Problem& p_;
  View gradient_;
  int64_t taps_, row_;  // row_: one output's weights and its bias
  Tiling tiling_;
  int64_t parts_;
  std::vector<Window> windows_;
  Window gradient_window_;
  A* partial_ = nullptr;
};

}  // namespace d3net::cpu::D3NET_ISA
