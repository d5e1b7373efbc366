// The weight gradient of one source, the exact transpose of tile_pass.h in the weights: the same
// transformed inputs V, times the spread output gradients D, summed over the tiles, gathered back
// to the 3x3 taps.
//
// The map is cut into slices with sums of their own, added in the order of the slices; how many is
// a matter of the shape alone, and so are the bits. Within a slice tiles are taken a panel at a
// time: transformed, then multiplied by position and channels. A thread takes whole slices where
// they share out evenly, and reads only what it wrote itself; otherwise all share each panel.
#pragma once

#include <vector>

#include "parallel.h"
#include "tile_gemm.h"
#include "tile_input.h"

namespace d3net::cpu::D3NET_ISA {

template <class In, class A>
class TileWeightGradient {
  static constexpr int kN = kLanes<A>;

 public:
  PassShape shape;  // that of the forward pass
  Algorithm algorithm = Algorithm::direct;
  TileInput<In, A> input;
  Slab<const A> gradient;  // data: the first output channel
  void* to = nullptr;      // (out_channels, in_channels, kernel_h, kernel_w)
  bool wide = false;       // of type A, not In
  int64_t to_stride = 0;   // between output channels; all else is dense

  /// Elements of memory that run() needs, shared by the threads.
  int64_t workspace_size() const {
    const Layout l = layout();
    return l.v_size + l.d_size + l.slices * l.u_size;
  }

  void run(Crew::Worker& worker, A* workspace) const {
    switch (algorithm) {
      case Algorithm::direct: return run_tiles<1>(worker, workspace);
      case Algorithm::winograd2:
        if constexpr (std::is_same_v<A, float>) run_tiles<2>(worker, workspace);
        return;
      case Algorithm::winograd4:
        if constexpr (std::is_same_v<A, float>) run_tiles<4>(worker, workspace);
        return;
    }
  }

 private:
  static constexpr int64_t kPanelBytes = 1 << 20;  // V and D: part of the last-level cache
  static constexpr int64_t kTilesAtOnce = 8;
  static constexpr int64_t kMostSlices = 8, kLeastTiles = 256;  // in a slice
  static constexpr int64_t kChannelsAtOnce = 8;

  /// How the workspace is laid out. Positions are one vector further apart than they need, so that
  /// they do not fall on one cache set.
  struct Layout {
    int64_t in_groups, out_groups, slices, panel;
    int64_t v_position, v_size, d_position, d_size, u_channel, u_position, u_size;
  };
  Layout layout() const {
    Layout l;
    l.in_groups = input.parts.groups(kN);
    l.out_groups = ceil_div(shape.out_channels, kN);
    const int64_t positions = shape.positions(algorithm);
    const int64_t d_positions = algorithm == Algorithm::direct ? 1 : positions;
    const int64_t tile_bytes = (positions * l.in_groups + d_positions * l.out_groups) * kN *
                               static_cast<int64_t>(sizeof(A));
    const int64_t tiles = shape.grid(algorithm).count();
    for (l.slices = kMostSlices; l.slices > 1 && tiles / l.slices < kLeastTiles;) l.slices /= 2;
    const int64_t most = round_up(ceil_div(tiles, l.slices), kTilesAtOnce);
    l.panel = std::min(
        most, std::clamp<int64_t>(kPanelBytes / tile_bytes, 32, 512) / kTilesAtOnce * kTilesAtOnce);
    l.v_position = l.in_groups * l.panel * kN + kN;
    l.v_size = positions * l.v_position;
    l.d_position = l.out_groups * l.panel * kN + kN;
    l.d_size = d_positions * l.d_position;
    l.u_channel = l.out_groups * kN;
    l.u_position = l.in_groups * kN * l.u_channel + kN;
    l.u_size = positions * l.u_position;
    return l;
  }

  template <int m>
  void run_tiles(Crew::Worker& worker, A* workspace) const {
    static thread_local Scratch panel_memory;
    const Layout l = layout();
    A* u = workspace + l.v_size + l.d_size;
    if (l.slices % worker.workers() == 0)
      worker.each(l.slices, [&](int64_t slice, int64_t) {
        Alone alone;
        A* panel = l.slices == 1 ? workspace : panel_memory.get<A>(l.v_size + l.d_size);
        sum_slice<m>(alone, l, slice, panel, u + slice * l.u_size);
      });
    else
      for (int64_t slice = 0; slice < l.slices; ++slice)
        sum_slice<m>(worker, l, slice, workspace, u + slice * l.u_size);
    const std::vector<Run> runs = runs_of_channels();
    worker.each(static_cast<int64_t>(runs.size()), [&](int64_t i, int64_t) {
      const Run& run = runs[static_cast<size_t>(i)];
      for (int64_t out = 0; out < shape.out_channels; out += kN)
        for (int64_t c = 0; c < run.channels; ++c)
          gather<m>(l, run.channel + c, out, u + (run.u_row + c) * l.u_channel + out);
    });
  }

  template <int m, class Workers>
  void sum_slice(Workers& worker, const Layout& l, int64_t slice, A* v, A* u) const {
    const TileGrid grid = shape.grid(algorithm);
    const int64_t tiles = grid.count(), positions = shape.positions(algorithm);
    const int64_t slice_begin = tiles * slice / l.slices, end = tiles * (slice + 1) / l.slices;
    std::vector<int64_t> sizes;  // of the groups of input channels
    input.parts.each_group(
        kN, [&](const auto&, int64_t, int64_t, int64_t, int64_t n) { sizes.push_back(n); });
    A* d = v + l.v_size;
    if constexpr (m == 1)  // some taps may see nothing but padding
      worker.each(positions, [&](int64_t p, int64_t) {
        std::fill(u + p * l.u_position, u + (p + 1) * l.u_position, A{0});
      });
    // Enough items to share, each with a run of channels of one position.
    const int64_t blocks = std::min(l.in_groups, ceil_div(kWantedTasks * 2, positions));
    for (int64_t begin = slice_begin; begin < end; begin += l.panel) {
      const int64_t count = std::min(l.panel, end - begin);
      worker.each(ceil_div(count, kTilesAtOnce), [&](int64_t i, int64_t) {
        const int64_t first = i * kTilesAtOnce;
        const Tiles some(grid, begin + first, std::min(kTilesAtOnce, count - first));
        int every[kMostTaps];
        for (int q = 0; q < kMostTaps; ++q) every[q] = q;
        input.template transform<m, false>(shape, some, every, m == 1 ? positions : 0,
                                           v + first * kN, l.panel, l.v_position);
        spread_gradients<m>(l, some, d + first * kN);
      });
      int live[kMostTaps] = {};
      const int64_t num_live =
          m == 1 ? shape.live_taps_of(box_of(grid, begin, count), live) : positions;
      const int64_t items = num_live * blocks;
      const int64_t ahead = std::min(l.panel, end - begin - count);
      worker.each(items, [&](int64_t i, int64_t) {
        prefetch_tiles<m>(grid, begin + count + ahead * i / items,
                          begin + count + ahead * (i + 1) / items);
        const int64_t p = m == 1 ? live[i / blocks] : i / blocks, block = i % blocks;
        multiply_position(l, sizes, v + p * l.v_position, d + (m == 1 ? 0 : p) * l.d_position,
                          count, block * l.in_groups / blocks, (block + 1) * l.in_groups / blocks,
                          u + p * l.u_position, m > 1 && begin == slice_begin);
      });
    }
  }

  /// Input channels whose taps lie on the same cache lines, and their first row of U.
  struct Run {
    int64_t channel, u_row, channels;
  };
  std::vector<Run> runs_of_channels() const {
    std::vector<Run> runs;
    input.parts.each_group(
        kN, [&](const auto&, int64_t, int64_t channel, int64_t group, int64_t n) {
          for (int64_t c = 0; c < n; c += kChannelsAtOnce)
            runs.push_back({channel + c, group * kN + c, std::min(kChannelsAtOnce, n - c)});
        });
    return runs;
  }

  /// What the next panel will read comes to the caches while this one is multiplied.
  template <int m>
  D3NET_INLINE void prefetch_tiles(const TileGrid& grid, int64_t begin, int64_t end) const {
    if (begin >= end) return;
    TileCursor cursor(grid, begin);
    for (int64_t t = begin; t < end; ++t, cursor.advance())
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < m; ++j) {
          const int64_t y = cursor.y + i * grid.dilation_h, x = cursor.x + j * grid.dilation_w;
          if (y >= shape.height || x >= shape.width) continue;
          input.parts.prefetch_pixel(cursor.image, y, x);
          prefetch(gradient.at(cursor.image, y, x),
                   shape.out_channels * static_cast<int64_t>(sizeof(A)));
        }
  }

  template <int m>
  void spread_gradients(const Layout& l, const Tiles& tiles, A* d) const {
    for (int64_t channel = 0; channel < shape.out_channels; channel += kN, d += l.panel * kN) {
      const int64_t n = std::min<int64_t>(kN, shape.out_channels - channel);
      auto element = [&](const Origin& tile, int64_t i, int64_t j) __attribute__((always_inline)) {
        const int64_t y = tile.y + i * shape.dilation_h, x = tile.x + j * shape.dilation_w;
        if (y >= shape.height || x >= shape.width) return Vec<A>{};
        const A* p = gradient.at(tile.image, y, x) + channel;
        return n == kN ? load(p) : load_first<A>(p, n);
      };
      for (int64_t t = 0; t < tiles.count; ++t) {
        A* to_tile = d + t * kN;
        if constexpr (m == 1) {
          store(to_tile, element(tiles.at[t], 0, 0));
        } else {
          constexpr int side = Winograd<m>::positions;
          Vec<A> rows[m][side];
          for (int i = 0; i < m; ++i) {
            Vec<A> row[m];
            unroll<m>([&](auto j)
                          __attribute__((always_inline)) { row[j] = element(tiles.at[t], i, j); });
            Winograd<m>::spread(row, rows[i]);
          }
          unroll<side>([&](auto j) __attribute__((always_inline)) {
            Vec<A> column[m], result[side];
            unroll<m>([&](auto i) __attribute__((always_inline)) { column[i] = rows[i][j]; });
            Winograd<m>::spread(column, result);
            unroll<side>([&](auto i) __attribute__((always_inline)) {
              store(to_tile + (i * side + j) * l.d_position, result[i]);
            });
          });
        }
      }
    }
  }

  /// U += V^T D of one position, for some groups of input channels.
  void multiply_position(const Layout& l, const std::vector<int64_t>& sizes, const A* v, const A* d,
                         int64_t tiles, int64_t first_group, int64_t last_group, A* u,
                         bool opens) const {
    for (int64_t group = first_group; group < last_group; ++group)
      for (int64_t k = 0; k < l.out_groups;) {
        const int chunk = next_chunk(l.out_groups - k);
        const int64_t rows = channels_at_once(chunk, kN);
        for (int64_t r = 0; r < sizes[static_cast<size_t>(group)]; r += rows)
          kOuter<A>[chunk - 1]({v + group * l.panel * kN + r, d + k * l.panel * kN, l.panel * kN,
                                tiles, u + (group * kN + r) * l.u_channel + k * kN, l.u_channel,
                                opens});
        k += chunk;
      }
  }

  /// The taps of one input channel and a vector of output channels, from the sums of all slices.
  template <int m>
  void gather(const Layout& l, int64_t channel, int64_t out, const A* first_slice) const {
    const int64_t taps = shape.kernel_h * shape.kernel_w;
    auto sum = [&](int64_t p) {
      const A* u = first_slice + p * l.u_position;
      Vec<A> total = load(u);
      if (l.slices > 1)
        for (int64_t slice = 1; slice < l.slices; ++slice) total += load(u + slice * l.u_size);
      return total;
    };
    Vec<A> by_tap[kMostTaps];
    if constexpr (m == 1) {
      for (int64_t tap = 0; tap < taps; ++tap) by_tap[tap] = sum(tap);
    } else {
      constexpr int side = Winograd<m>::positions;
      WideDoubles rows[side][3];
      for (int i = 0; i < side; ++i) {
        WideDoubles row[side];
        for (int j = 0; j < side; ++j) widen(sum(i * side + j), row[j]);
        Winograd<m>::gather_weight(row, rows[i]);
      }
      for (int j = 0; j < 3; ++j) {
        WideDoubles column[side], result[3];
        for (int i = 0; i < side; ++i) column[i] = rows[i][j];
        Winograd<m>::gather_weight(column, result);
        for (int i = 0; i < 3; ++i) by_tap[i * 3 + j] = narrow(result[i]);
      }
    }
    const int64_t outs = std::min<int64_t>(kN, shape.out_channels - out);
    // The taps of an output channel follow each other in memory.
    auto write = [&](auto* weights) {
      weights += out * to_stride + channel * taps;
      for (int64_t begin = 0; begin < taps; begin += kN) {
        const int64_t some = std::min<int64_t>(kN, taps - begin);
        Vec<A> block[kN];
        for (int64_t t = 0; t < kN; ++t) block[t] = t < some ? by_tap[begin + t] : Vec<A>{};
        transpose<A>(block);
        for (int64_t k = 0; k < outs; ++k)
          store_first<A>(weights + k * to_stride + begin, block[k], some);
      }
    };
    wide ? write(static_cast<A*>(to)) : write(static_cast<In*>(to));
  }
};

}  // namespace d3net::cpu::D3NET_ISA
